"""Measure how fast a model trains or samples here: images/s, FLOP, share of the device's matmul peak, peak memory."""

import copy
import datetime
import os
import platform
import resource
import statistics
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from masked_diffusion import create_diffusion, create_model, script_util
from masked_diffusion.config import OPTIMIZERS
from masked_diffusion.guidance import Guidance, GuidedDenoiser
from masked_diffusion.layers.attention import Attention
from masked_diffusion.training.objective import TwoPassObjective
from masked_diffusion.training.optim import create_optimizer, default_grad_clip
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.files import write_json
from masked_diffusion.utils.flops import forward_flops
from masked_diffusion.utils.precision import PRECISIONS, autocast, check_precision, set_matmul_precision

WARMUP_STEPS = 2
# name: precision, whether blocks are compiled, whether attention is written out as in the published code
VARIANTS = {
    "naive": ("fp32", False, True),
    "eager fp32": ("fp32", False, False),
    "eager bf16": ("bf16", False, False),
    "compiled fp32": ("fp32", True, False),
    "compiled bf16": ("bf16", True, False),
}
COLUMNS = {
    "name": "{}",
    "ms": "{:.1f}",
    "ms_median": "{:.1f}",
    "images_per_second": "{:.2f}",
    "gflop_per_image": "{:.1f}",
    "tflops": "{:.3f}",
    "share_of_peak": "{:.1%}",
    "peak_memory_mib": "{:.0f}",
    "loss": "{:.5f}",
    "speedup": "{:.2f}",
}


def parse_args():
    parser = script_util.make_parser(__doc__)
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="MDTv2_S_2", help="family, size and patch size: MDTv2_XL_2, DiT_B_4, ...")
    model.add_argument("--image_size", type=int, default=256, help="of the images; the latent is an eighth of it")
    model.add_argument("--input_size", type=int, help="of the latent; None: image_size / 8")
    model.add_argument(
        "--mask_ratio", type=script_util.optional_float, default=0.3, help="None: the full pass alone, as DiT has it"
    )
    model.add_argument("--decode_layer", type=int, help="blocks after the side-interpolater; None: the paper's number")
    what = parser.add_argument_group("what to measure")
    what.add_argument("--mode", choices=("train", "sample"), default="train", help="a training or a denoising step")
    what.add_argument("--optimizer", choices=OPTIMIZERS, help="its step belongs to the training step; None: no update")
    what.add_argument("--batch_size", type=int, default=8, help="images per step")
    what.add_argument("--steps", type=int, default=10, help=f"timed steps, after {WARMUP_STEPS} that are not")
    what.add_argument("--compare", action="store_true", help=f"in turns: {', '.join(VARIANTS)}")
    how = parser.add_argument_group("how")
    how.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    how.add_argument("--threads", type=int, default=min(4, os.cpu_count()), help="of the CPU")
    how.add_argument("--precision", choices=PRECISIONS, default="fp32", help="arithmetic of the network")
    how.add_argument("--compile", type=script_util.str2bool, default=False, help="compile the blocks")
    how.add_argument("--grad_checkpoint", type=script_util.str2bool, default=False, help="compute activations twice")
    how.add_argument("--json", help="file for the table and all settings")
    return parser.parse_args()


# ---------------------------------------------------------------- what is measured


def model_options(args):
    options = {"input_size": args.input_size, "mask_ratio": args.mask_ratio, "decode_layer": args.decode_layer}
    return {key: value for key, value in options.items() if value is not None}


def build_model(args):
    """The model in training mode; what starts at zero gets small random weights, so that every gradient flows."""
    torch.manual_seed(0)
    model = create_model(args.model, **model_options(args))
    for param in model.parameters():
        if param.requires_grad and not param.any():
            torch.nn.init.normal_(param, std=0.02)
    if args.grad_checkpoint:
        model.enable_grad_checkpoint()
    return model.to(args.device)


def training_step(model, args, precision):
    """Both passes forward and backward, and the optimizer's step if one is named; no VAE, and no gradient scaler.

    Every step has the same numbers, with the mask ratio in the middle of its range and the kept length rounded as
    under `--compile`, so that all steps and variants have the same work.

    :return: a function without arguments that returns the loss; kept tokens of the masked pass, or None.
    """
    objective = TwoPassObjective(model, create_diffusion(snr_gamma=5.0), precision, max(1, model.num_patches // 16))
    optimizer = create_optimizer(args.optimizer, model.parameters(), lr=1e-4) if args.optimizer else None
    torch.manual_seed(1)
    latents = torch.randn(args.batch_size, model.in_channels, model.input_size, model.input_size).to(args.device)
    t = torch.randint(1000, (args.batch_size,)).to(args.device)
    y = torch.randint(model.num_classes, (args.batch_size,)).to(args.device)
    draws = objective.draw(latents, host_rand=lambda n: torch.full((n,), 0.5))

    def step():
        model.zero_grad(set_to_none=True)
        loss = objective(latents, t, y, **draws)["loss"].mean()
        loss.backward()
        if optimizer is not None:
            if default_grad_clip(args.optimizer):
                torch.nn.utils.clip_grad_norm_(model.parameters(), default_grad_clip(args.optimizer))
            optimizer.step()
        return loss.detach()

    return step, draws["ids_keep"].shape[1] if objective.masked else None


def sampling_step(model, args, precision):
    """One denoising step of the batch with guidance, which is two rows of the network per image.

    :return: a function without arguments that returns the mean square of the result; None.
    """
    model.eval()
    guidance = Guidance(model.guidance_rule, cfg_scale=4.0, skip_below=-1)
    diffusion, denoise = create_diffusion("250"), GuidedDenoiser(autocast(model, precision), guidance, model.null_label)
    torch.manual_seed(1)
    x = torch.randn(args.batch_size, model.in_channels, model.input_size, model.input_size).to(args.device)
    t = torch.full((args.batch_size,), 120).to(args.device)
    y = torch.randint(model.num_classes, (args.batch_size,)).to(args.device)
    noise = torch.randn(x.shape).to(args.device)

    @torch.no_grad()
    def step():
        out = diffusion.p_sample(denoise, x, t, model_kwargs={"y": y}, randn_like=lambda _: noise)
        return out["sample"].square().mean()

    return step, None


def naive_bias(self, ids_keep):
    """The relative position bias as in the published code: expanded to all samples and pairs, then gathered twice."""
    index = self.relative_position_index
    bias = self.relative_position_bias_table[index.view(-1)].view(*index.shape, -1).permute(2, 0, 1).contiguous()
    if ids_keep is None:
        return bias
    (n, kept), (heads, tokens, _) = ids_keep.shape, bias.shape
    bias = bias[None].expand(n, -1, -1, -1).gather(2, ids_keep[:, None, :, None].expand(-1, heads, -1, tokens))
    return bias.gather(3, ids_keep[:, None, None, :].expand(-1, heads, kept, -1))


def naive_forward(self, x, pair_index=None):
    """`Attention.forward` written out: softmax(q k^T scale + bias) v. Here `pair_index` is the (N, K) kept ids."""
    n, tokens, dim = x.shape
    q, k, v = self.qkv(x).reshape(n, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    logits = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    if self.rel_pos_bias is not None:
        logits = logits + naive_bias(self.rel_pos_bias, pair_index)
    return self.proj((logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(n, tokens, dim))


@contextmanager
def naive_attention():
    """Attention as the published code has it, for comparison."""
    with (
        mock.patch.object(Attention, "forward", naive_forward),
        mock.patch("masked_diffusion.models.gather_pairs", lambda index, ids_keep: ids_keep),
    ):
        yield


# ---------------------------------------------------------------- measuring


def counted_flops(args, num_kept=None):
    """FLOP of one image's forward pass from PyTorch's counter, which reads shapes: nothing is computed.

    The counter knows no fused attention of the CPU, so attention goes through its matrix products.
    """
    with torch.device("meta"):
        model = create_model(args.model, **model_options(args)).eval()
        x, t = torch.empty(1, model.in_channels, model.input_size, model.input_size), torch.zeros(1, dtype=torch.long)
        masked = {"enable_mask": True, "ids_keep": torch.zeros(1, num_kept, dtype=torch.long)} if num_kept else {}
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(x, t, t, **masked)
    return counter.get_total_flops()


def flops_per_image(args, model, num_kept):
    """FLOP that one image needs in a step, in closed form; activations computed twice count once.

    :raises UserError: when PyTorch's counter finds another number for a forward pass.
    """
    forward = 0
    for kept in (None,) if num_kept is None else (None, num_kept):
        closed, counted = forward_flops(model, kept), counted_flops(args, kept)
        if abs(closed / counted - 1) > 0.02:
            raise UserError(f"a forward pass has {closed} FLOP in closed form, but PyTorch counts {counted}")
        forward += closed
    # A backward pass has two products for each of the forward pass's; guidance runs two rows per image.
    return forward * (3 if args.mode == "train" else 2)


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def timed(step, device):
    """Seconds of one call, to the end of its work on the device."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def matmul_peak(device, precision):
    """FLOP/s of the fastest of ten large square matrix products in `precision`."""
    set_matmul_precision(precision)
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=PRECISIONS[precision] or torch.float32) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(10))


def peak_memory(args):
    """MiB: of the allocator on a GPU; on a CPU the process's largest resident size so far, Python included.

    None under `--compare`, where the models of all variants are in memory.
    """
    if args.compare:
        return None
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class Variant:
    """One way to run the step.

    :param model: taken over; a compiled variant compiles its blocks.
    """

    def __init__(self, args, name, model, precision, compiled, naive):
        self.args, self.name, self.model, self.precision = args, name, model, precision
        self.naive, self.seconds, self.memory = naive, [], None
        if compiled:
            model.compile_blocks()
        make_step = training_step if args.mode == "train" else sampling_step
        self.step, self.num_kept = make_step(model, args, precision)

    def run(self, record=True):
        """One step in this variant's settings."""
        set_matmul_precision(self.precision)
        if self.args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with naive_attention() if self.naive else nullcontext():
            seconds = timed(self.step, self.args.device)
        if record:
            self.seconds.append(seconds)
        self.memory = peak_memory(self.args)

    def row(self, peak):
        # The fastest step is the program's own: whatever else runs on the machine can only make a step slower.
        seconds, flops = min(self.seconds), flops_per_image(self.args, self.model, self.num_kept)
        with naive_attention() if self.naive else nullcontext():
            loss = self.step().item()
        return {
            "name": self.name,
            "ms": seconds * 1e3,
            "ms_median": statistics.median(self.seconds) * 1e3,
            "images_per_second": self.args.batch_size / seconds,
            "gflop_per_image": flops / 1e9,
            "tflops": flops * self.args.batch_size / seconds / 1e12,
            "share_of_peak": flops * self.args.batch_size / seconds / peak,
            "peak_memory_mib": self.memory,
            "loss": loss,
        }


def make_variants(args):
    model = build_model(args)
    if not args.compare:
        return [Variant(args, args.mode, model, args.precision, args.compile, False)]
    return [Variant(args, name, copy.deepcopy(model), *how) for name, how in VARIANTS.items()]


def measure(args):
    """A row for each variant; their steps take turns, so that what else the machine does hits all alike."""
    variants = make_variants(args)
    for variant in variants:
        for _ in range(WARMUP_STEPS):
            variant.run(record=False)
    for _ in range(args.steps):
        for variant in variants:
            variant.run()
    peaks = {precision: matmul_peak(args.device, precision) for precision in {v.precision for v in variants}}
    rows = [variant.row(peaks[variant.precision]) for variant in variants]
    if args.compare:
        rows = [row | {"speedup": rows[0]["ms"] / row["ms"]} for row in rows]
    return rows, {precision: peak / 1e12 for precision, peak in peaks.items()}


# ---------------------------------------------------------------- reporting


def device_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}"


def format_table(rows):
    """Aligned text with one line per row and the columns that some row has."""
    columns = {key: form for key, form in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    cells = [list(columns)] + [[form.format(row[key]) for key, form in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def main():
    args = parse_args()
    script_util.check_positive(args, "batch_size", "steps", "threads", "image_size")
    args.input_size = args.input_size or args.image_size // 8
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but PyTorch sees no GPU here: choose --device cpu")
    check_precision(args.precision, torch.device(args.device))
    if args.model.startswith("DiT"):
        args.mask_ratio = None
    torch.set_num_threads(args.threads)
    rows, peaks = measure(args)
    report = {
        "date": datetime.date.today().isoformat(),
        "device": device_name(args.device),
        "torch": torch.__version__,
        "settings": vars(args),
        "matmul_tflops": peaks,
        "rows": rows,
    }
    print(f"{args.model}, {args.mode}, batch {args.batch_size}, {report['device']}, {args.threads} threads")
    print(f"torch {report['torch']}; matmul peak in TFLOP/s: {', '.join(f'{k} {v:.3f}' for k, v in peaks.items())}")
    print(format_table(rows))
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    script_util.run(main)
