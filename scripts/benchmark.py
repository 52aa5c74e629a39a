"""Measure how fast a model trains or samples here: images/s, FLOP, share of the device's matmul peak, peak memory."""

import copy
import datetime
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import Self

from masked_diffusion import create_diffusion, create_model, script_util
from masked_diffusion.config import ATTENTION_HELP, OPTIMIZERS
from masked_diffusion.guidance import Guidance, GuidedDenoiser
from masked_diffusion.layers.attention import Attention, RelativePositionBias
from masked_diffusion.layers.relative_attention import IMPLEMENTATIONS, KeptTokens
from masked_diffusion.models import DiT
from masked_diffusion.training.objective import TwoPassObjective
from masked_diffusion.training.optim import clip_gradients, create_optimizer, default_grad_clip
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.files import write_json
from masked_diffusion.utils.flops import forward_flops
from masked_diffusion.utils.options import Config, option
from masked_diffusion.utils.precision import PRECISIONS, autocast, check_precision, set_matmul_precision

Step = Callable[[], torch.Tensor]  # one step, which returns its loss
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


@dataclass(frozen=True)
class BenchmarkConfig(Config):
    """benchmark"""

    model: str = option("MDTv2_S_2", "family, size and patch size: MDTv2_XL_2, DiT_B_4, ...")
    image_size: int = option(256, "height and width of the images; the latent is an eighth of it", at_least=1)
    input_size: int | None = option(None, "height and width of the latent; None: image_size / 8", at_least=1)
    mask_ratio: float | None = option(0.3, "None: the full pass alone, as DiT has it", at_least=0, below=1)
    decode_layer: int | None = option(None, "blocks after the side-interpolater; None: the paper's number", at_least=0)
    mode: str = option("train", "measure a training or a denoising step", choices=("train", "sample"))
    optimizer: str | None = option(None, "its step belongs to the training step; None: no update", choices=OPTIMIZERS)
    batch_size: int = option(8, "images per step", at_least=1)
    steps: int = option(10, f"timed steps, after {WARMUP_STEPS} that are not", at_least=1)
    compare: bool = option(False, f"measure in turns: {', '.join(VARIANTS)}")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "where to run", choices=("cpu", "cuda"))
    threads: int = option(min(4, os.cpu_count()), "threads of the CPU", at_least=1)
    precision: str = option("fp32", "number format of the network's arithmetic", choices=tuple(PRECISIONS))
    attention: str = option("auto", ATTENTION_HELP, choices=IMPLEMENTATIONS)
    compile: bool = option(False, "compile the transformer blocks with torch.compile")
    grad_checkpoint: bool = option(False, "gradient checkpointing: less memory, activations computed twice")
    json: str | None = option(None, "file for the table and all settings")

    def check(self) -> Self:
        super().check()
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda, but PyTorch sees no GPU here: choose --device cpu")
        check_precision(self.precision, torch.device(self.device))
        return self

    def resolved(self) -> Self:
        """With the size of the latent, and without a masked pass where the family has none."""
        mask_ratio = None if self.model.startswith("DiT") else self.mask_ratio
        return self.replaced(input_size=self.input_size or self.image_size // 8, mask_ratio=mask_ratio)


# ---------------------------------------------------------------- what is measured


def model_options(config: BenchmarkConfig) -> dict[str, Any]:
    options = {"input_size": config.input_size, "mask_ratio": config.mask_ratio, "decode_layer": config.decode_layer}
    return {key: value for key, value in options.items() if value is not None}


def build_model(config: BenchmarkConfig) -> DiT:
    """The model in training mode; what starts at zero gets small random weights, so that every gradient flows."""
    torch.manual_seed(0)
    model = create_model(config.model, **model_options(config))
    for param in model.parameters():
        if param.requires_grad and not param.any():
            torch.nn.init.normal_(param, std=0.02)
    if config.grad_checkpoint:
        model.enable_grad_checkpoint()
    model.to(config.device).set_attention(config.attention, torch.device(config.device))
    return model


def training_step(model: DiT, config: BenchmarkConfig, precision: str) -> tuple[Step, int | None]:
    """Both passes forward and backward, and the optimizer's step if one is named; no VAE, and no gradient scaler.

    Every step has the same numbers, with the mask ratio in the middle of its range and the kept length rounded as
    under `--compile`, so that all steps and variants have the same work.

    :return: a function without arguments that returns the loss; kept tokens of the masked pass, or None.
    """
    objective = TwoPassObjective(model, create_diffusion(snr_gamma=5.0), precision, max(1, model.num_patches // 16))
    params, optimizer = list(model.parameters()), None
    if config.optimizer:
        optimizer = create_optimizer(config.optimizer, params, lr=1e-4, compile=config.compile)
    torch.manual_seed(1)
    latents = torch.randn(config.batch_size, model.in_channels, model.input_size, model.input_size).to(config.device)
    t = torch.randint(1000, (config.batch_size,)).to(config.device)
    y = torch.randint(model.num_classes, (config.batch_size,)).to(config.device)
    draws = objective.draw(latents, host_rand=lambda n: torch.full((n,), 0.5))

    def step():
        model.zero_grad(set_to_none=True)
        loss = objective(latents, t, y, **draws)["loss"].mean()
        loss.backward()
        if optimizer is not None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
            optimizer.step(**clip_gradients(optimizer, params, norm, default_grad_clip(config.optimizer)))
        return loss.detach()

    return step, draws["ids_keep"].shape[1] if objective.masked else None


def sampling_step(model: DiT, config: BenchmarkConfig, precision: str) -> tuple[Step, None]:
    """One denoising step of the batch with guidance, which is two rows of the network per image.

    :return: a function without arguments that returns the mean square of the result; None.
    """
    model.eval()
    guidance = Guidance(model.guidance_rule, cfg_scale=4.0, skip_below=-1)
    diffusion, denoise = create_diffusion("250"), GuidedDenoiser(autocast(model, precision), guidance, model.null_label)
    torch.manual_seed(1)
    x = torch.randn(config.batch_size, model.in_channels, model.input_size, model.input_size).to(config.device)
    t = torch.full((config.batch_size,), 120).to(config.device)
    y = torch.randint(model.num_classes, (config.batch_size,)).to(config.device)
    noise = torch.randn(x.shape).to(config.device)

    @torch.no_grad()
    def step():
        out = diffusion.p_sample(denoise, x, t, model_kwargs={"y": y}, randn_like=lambda _: noise)
        return out["sample"].square().mean()

    return step, None


def naive_bias(self: RelativePositionBias, ids_keep: torch.Tensor | None) -> torch.Tensor:
    """The relative position bias as in the published code: expanded to all samples and pairs, then gathered twice."""
    index = self.relative_position_index
    bias = self.relative_position_bias_table[index.view(-1)].view(*index.shape, -1).permute(2, 0, 1).contiguous()
    if ids_keep is None:
        return bias
    (n, kept), (heads, tokens, _) = ids_keep.shape, bias.shape
    bias = bias[None].expand(n, -1, -1, -1).gather(2, ids_keep[:, None, :, None].expand(-1, heads, -1, tokens))
    return bias.gather(3, ids_keep[:, None, None, :].expand(-1, heads, kept, -1))


def naive_forward(
    self: Attention, x: torch.Tensor, pair_index: KeptTokens | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`Attention.forward` written out: softmax(q k^T scale + bias) v. The published code makes `bias` in every call."""
    n, tokens, dim = x.shape
    q, k, v = self.qkv(x).reshape(n, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    logits = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    if self.rel_pos_bias is not None:
        logits = logits + naive_bias(self.rel_pos_bias, None if pair_index is None else pair_index.positions)
    return self.proj((logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(n, tokens, dim))


@contextmanager
def naive_attention() -> Iterator[None]:
    """Attention as the published code has it, for comparison."""
    with (
        mock.patch.object(Attention, "forward", naive_forward),
        mock.patch("masked_diffusion.models.look_up_kept", lambda ids, *_, **__: KeptTokens(ids, None, None)),
    ):
        yield


# ---------------------------------------------------------------- measuring


def counted_flops(config: BenchmarkConfig, num_kept: int | None = None) -> int:
    """FLOP of one image's forward pass from PyTorch's counter, which reads shapes: nothing is computed.

    The counter knows no fused attention of the CPU, so attention goes through its matrix products.
    """
    with torch.device("meta"):
        model = create_model(config.model, **model_options(config)).eval()
        x, t = torch.empty(1, model.in_channels, model.input_size, model.input_size), torch.zeros(1, dtype=torch.long)
        masked = {"enable_mask": True, "ids_keep": torch.zeros(1, num_kept, dtype=torch.long)} if num_kept else {}
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(x, t, t, **masked)
    return counter.get_total_flops()


def flops_per_image(config: BenchmarkConfig, model: DiT, num_kept: int | None) -> int:
    """FLOP that one image needs in a step, in closed form; activations computed twice count once.

    :raises UserError: when PyTorch's counter finds another number for a forward pass.
    """
    forward = 0
    for kept in (None,) if num_kept is None else (None, num_kept):
        closed, counted = forward_flops(model, kept), counted_flops(config, kept)
        if abs(closed / counted - 1) > 0.02:
            raise UserError(f"a forward pass has {closed} FLOP in closed form, but PyTorch counts {counted}")
        forward += closed
    # A backward pass has two products for each of the forward pass's; guidance runs two rows per image.
    return forward * (3 if config.mode == "train" else 2)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(step: Step, device: str) -> float:
    """Seconds of one call, to the end of its work on the device."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def matmul_peak(device: str, precision: str) -> float:
    """FLOP/s of the fastest of ten large square matrix products in `precision`."""
    set_matmul_precision(precision)
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=PRECISIONS[precision] or torch.float32) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(10))


def peak_memory(config: BenchmarkConfig) -> float | None:
    """MiB: of the allocator on a GPU; on a CPU the process's largest resident size so far, Python included.

    None under `--compare`, where the models of all variants are in memory.
    """
    if config.compare:
        return None
    if config.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class Variant:
    """One way to run the step.

    :param model: taken over; a compiled variant compiles its blocks.
    """

    def __init__(self, config, name, model, precision, compiled, naive):
        self.config, self.name, self.model, self.precision = config, name, model, precision
        self.naive, self.seconds, self.memory = naive, [], None
        if compiled:
            model.compile_blocks()
        make_step = training_step if config.mode == "train" else sampling_step
        self.step, self.num_kept = make_step(model, config, precision)

    def run(self, record: bool = True) -> None:
        """One step in this variant's settings."""
        set_matmul_precision(self.precision)
        if self.config.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with naive_attention() if self.naive else nullcontext():
            seconds = timed(self.step, self.config.device)
        if record:
            self.seconds.append(seconds)
        self.memory = peak_memory(self.config)

    def row(self, peak: float) -> dict[str, Any]:
        # The fastest step is the program's own: whatever else runs on the machine can only make a step slower.
        seconds, flops = min(self.seconds), flops_per_image(self.config, self.model, self.num_kept)
        with naive_attention() if self.naive else nullcontext():
            loss = self.step().item()
        return {
            "name": self.name,
            "ms": seconds * 1e3,
            "ms_median": statistics.median(self.seconds) * 1e3,
            "images_per_second": self.config.batch_size / seconds,
            "gflop_per_image": flops / 1e9,
            "tflops": flops * self.config.batch_size / seconds / 1e12,
            "share_of_peak": flops * self.config.batch_size / seconds / peak,
            "peak_memory_mib": self.memory,
            "loss": loss,
        }


def make_variants(config: BenchmarkConfig) -> list[Variant]:
    model = build_model(config)
    if not config.compare:
        return [Variant(config, config.mode, model, config.precision, config.compile, False)]
    return [Variant(config, name, copy.deepcopy(model), *how) for name, how in VARIANTS.items()]


def measure(config: BenchmarkConfig) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for each variant; their steps take turns, so that what else the machine does hits all alike."""
    variants = make_variants(config)
    for variant in variants:
        for _ in range(WARMUP_STEPS):
            variant.run(record=False)
    for _ in range(config.steps):
        for variant in variants:
            variant.run()
    peaks = {precision: matmul_peak(config.device, precision) for precision in {v.precision for v in variants}}
    rows = [variant.row(peaks[variant.precision]) for variant in variants]
    if config.compare:
        rows = [row | {"speedup": rows[0]["ms"] / row["ms"]} for row in rows]
    return rows, {precision: peak / 1e12 for precision, peak in peaks.items()}


# ---------------------------------------------------------------- reporting


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}"


def format_table(rows: list[dict[str, Any]], columns: dict[str, str] = COLUMNS) -> str:
    """Aligned text with one line per row and the columns that some row has.

    :param columns: how the values of each are formatted.
    """
    columns = {key: form for key, form in columns.items() if any(row.get(key) is not None for row in rows)}
    cells = [list(columns)] + [[form.format(row[key]) for key, form in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def main() -> None:
    config = script_util.parse_flags(BenchmarkConfig, __doc__).resolved()
    torch.set_num_threads(config.threads)
    rows, peaks = measure(config)
    report = {
        "date": datetime.date.today().isoformat(),
        "device": device_name(config.device),
        "torch": torch.__version__,
        "settings": config.values(),
        "matmul_tflops": peaks,
        "rows": rows,
    }
    print(f"{config.model}, {config.mode}, batch {config.batch_size}, {report['device']}, {config.threads} threads")
    print(f"torch {report['torch']}; matmul peak in TFLOP/s: {', '.join(f'{k} {v:.3f}' for k, v in peaks.items())}")
    print(format_table(rows))
    if config.json:
        write_json(config.json, report)


if __name__ == "__main__":
    script_util.run(main)
