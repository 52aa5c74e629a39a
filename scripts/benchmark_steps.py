"""What the benchmark measures: steps of training and sampling, and the FLOP that they have."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import Self

from masked_diffusion import create_diffusion, create_model
from masked_diffusion.config import ATTENTION_HELP, OPTIMIZERS
from masked_diffusion.guidance import Guidance, GuidedDenoiser
from masked_diffusion.latents.autoencoder import IdentityFirstStage
from masked_diffusion.layers.attention import Attention, RelativePositionBias
from masked_diffusion.layers.relative_attention import IMPLEMENTATIONS, KeptTokens, check_implementation
from masked_diffusion.models import DiT
from masked_diffusion.sample_config import SOLVERS_OF
from masked_diffusion.sampling.image_sampler import ImageSampler, last_sample
from masked_diffusion.sampling.solvers import DiffusionSolver, FlowSolver, create_solver
from masked_diffusion.training.objective import TwoPassObjective
from masked_diffusion.training.optim import clip_gradients, create_optimizer, default_grad_clip
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.flops import forward_flops
from masked_diffusion.utils.options import Config, option
from masked_diffusion.utils.pictures import check_picture_name
from masked_diffusion.utils.precision import (
    PRECISIONS_OR_AUTO,
    autocast,
    cast_weights,
    check_precision,
    choose_precision,
    cpu_has_bf16,
)

WARMUP_STEPS = 2
# name: precision, whether blocks are compiled, whether attention is written out as in the published code
VARIANTS = {
    "naive": ("fp32", False, True),
    "eager fp32": ("fp32", False, False),
    "eager bf16": ("bf16", False, False),
    "compiled fp32": ("fp32", True, False),
    "compiled bf16": ("bf16", True, False),
}


def compared_variants(device: str) -> dict[str, tuple[str, bool, bool]]:
    """The `VARIANTS` of `--compare`. A CPU without instructions for bf16 takes minutes for a step in it: not there."""
    emulated = device == "cpu" and cpu_has_bf16() is False
    return {name: how for name, how in VARIANTS.items() if not (emulated and how[0] == "bf16")}


@dataclass(frozen=True)
class BenchmarkConfig(Config):
    """benchmark"""

    model: str = option("MDTv2_S_2", "family, size and patch size: MDTv2_XL_2, DiT_B_4, ...")
    image_size: int = option(256, "height and width of the images; the latent is an eighth of it", at_least=1)
    input_size: int | None = option(None, "height and width of the latent; None: image_size / 8", at_least=1)
    mask_ratio: float | None = option(0.3, "None: the full pass alone, as DiT has it", at_least=0, below=1)
    decode_layer: int | None = option(None, "blocks after the side-interpolater; None: the paper's number", at_least=0)
    objective: str = option("diffusion", "what is trained and sampled", choices=tuple(SOLVERS_OF))
    mode: str = option(
        "train", "measure a training step; sample: a guided denoising step; draw: guided sampling from noise to "
        "latents by the objective's default solver, with all its steps", choices=("train", "sample", "draw"),
    )  # fmt: skip
    num_sampling_steps: int = option(250, "sampling steps of --mode draw", at_least=1)
    optimizer: str | None = option(
        None, "its step belongs to the training step, which is measured without it, too; None: no update",
        choices=OPTIMIZERS,
    )  # fmt: skip
    batch_size: int = option(8, "images per step", at_least=1)
    steps: int = option(10, f"timed steps, after {WARMUP_STEPS} that are not", at_least=1)
    compare: bool = option(
        False, f"measure in turns: {', '.join(VARIANTS)} (bf16 is left out on a CPU without instructions for it)"
    )
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "where to run", choices=("cpu", "cuda"))
    threads: int = option(min(4, os.cpu_count()), "threads of the CPU", at_least=1)
    precision: str = option(
        "auto", "number format of the network's arithmetic; auto: bf16 where the device computes it faster, else fp32",
        choices=PRECISIONS_OR_AUTO,
    )  # fmt: skip
    attention: str = option("auto", ATTENTION_HELP, choices=IMPLEMENTATIONS)
    naive: bool = option(False, "write attention and bias out as in the published code, for comparison")
    compile: bool = option(False, "compile the transformer blocks with torch.compile")
    grad_checkpoint: bool = option(False, "gradient checkpointing: less memory, activations computed twice")
    json: str | None = option(None, "file for the table and all settings")
    profile: str | None = option(None, "picture of where the time of a step goes, and of the least that it could take")

    def check(self) -> Self:
        super().check()
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda, but PyTorch sees no GPU here: choose --device cpu")
        check_precision(choose_precision(self.precision, torch.device(self.device)), torch.device(self.device))
        check_implementation(self.attention, torch.device(self.device))
        if self.profile:
            if self.compare or self.mode == "draw":
                raise UserError("--profile is of one step: leave out --compare and --mode draw")
            check_picture_name(self.profile)
        return self

    def resolved(self) -> Self:
        """With the size of the latent and the number format, and without a masked pass where the family has none."""
        return self.replaced(
            input_size=self.input_size or self.image_size // 8,
            mask_ratio=None if self.model.startswith("DiT") else self.mask_ratio,
            precision=choose_precision(self.precision, torch.device(self.device)),
        )


# ---------------------------------------------------------------- what is measured


@dataclass
class Step:
    """What is timed.

    :param compute: forward and backward pass, or denoising; returns a loss. :param update: the optimizer's step.
    :param num_kept: tokens that the masked pass keeps, if there is one.
    """

    compute: Callable[[], torch.Tensor]
    update: Callable[[], None] | None = None
    num_kept: int | None = None
    optimizer: torch.optim.Optimizer | None = None

    def __call__(self) -> torch.Tensor:
        loss = self.compute()
        if self.update is not None:
            self.update()
        return loss


def model_options(config: BenchmarkConfig) -> dict[str, Any]:
    options = {"input_size": config.input_size, "mask_ratio": config.mask_ratio, "decode_layer": config.decode_layer}
    options["learn_sigma"] = config.objective != "flow"
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


def training_step(model: DiT, config: BenchmarkConfig, precision: str) -> Step:
    """Both passes forward and backward, and the optimizer's step if one is named; no VAE, and no gradient scaler.

    Every step has the same numbers, with the mask ratio in the middle of its range and the kept length rounded as
    under `--compile`, so that all steps and variants have the same work.
    """
    diffusion = create_diffusion(snr_gamma=5.0, objective=config.objective)
    objective = TwoPassObjective(model, diffusion, precision, max(1, model.num_patches // 16))
    params, optimizer = list(model.parameters()), None
    if config.optimizer:
        optimizer = create_optimizer(config.optimizer, params, lr=1e-4, compile=config.compile)
    torch.manual_seed(1)
    latents = torch.randn(config.batch_size, model.in_channels, model.input_size, model.input_size).to(config.device)
    t = torch.randint(1000, (config.batch_size,)).to(config.device)
    y = torch.randint(model.num_classes, (config.batch_size,)).to(config.device)
    draws = objective.draw(latents, host_rand=lambda n: torch.full((n,), 0.5))

    def compute() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        with cast_weights(model, precision):
            loss = objective(latents, t, y, **draws)["loss"].mean()
            loss.backward()
        return loss.detach()

    def update() -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        optimizer.step(**clip_gradients(optimizer, params, norm, default_grad_clip(config.optimizer)))

    num_kept = draws["ids_keep"].shape[1] if objective.masked else None
    return Step(compute, update if optimizer is not None else None, num_kept, optimizer)


def guidance_of(model: DiT) -> Guidance:
    """Guidance that runs two rows of the network per image, at every step."""
    return Guidance(model.guidance_rule, cfg_scale=4.0, skip_below=-1)


def make_solver(config: BenchmarkConfig, num_steps: int) -> DiffusionSolver | FlowSolver:
    """The default solver of the objective."""
    return create_solver(SOLVERS_OF[config.objective][0], num_steps, {"objective": config.objective})


def sampling_step(model: DiT, config: BenchmarkConfig, precision: str) -> Step:
    """One denoising step of the batch with guidance; its loss is the mean square of the result."""
    model.eval()
    solver = make_solver(config, 250)
    denoise = GuidedDenoiser(autocast(model, precision), guidance_of(model), model.null_label)
    torch.manual_seed(1)
    x = torch.randn(config.batch_size, model.in_channels, model.input_size, model.input_size).to(config.device)
    y = torch.randint(model.num_classes, (config.batch_size,)).to(config.device)
    noise = torch.randn(x.shape).to(config.device)
    options = {"clip_denoised": True, "model_kwargs": {"y": y}, "randn_like": lambda _: noise}

    @torch.no_grad()
    def compute() -> torch.Tensor:
        return solver.step(denoise, x, 120, **options)["sample"].square().mean()

    return Step(compute)


def drawing(model: DiT, config: BenchmarkConfig, precision: str) -> Step:
    """Sampling of the batch with guidance, as `image_sample.py` does it, but for the VAE."""
    model.eval()
    indices, labels = range(config.batch_size), torch.arange(config.batch_size) % model.num_classes

    @torch.no_grad()
    def draw(num_steps: int) -> torch.Tensor:
        sampler = ImageSampler(
            model,
            make_solver(config, num_steps),
            IdentityFirstStage(),
            guidance=guidance_of(model),
            precision=precision,
        )
        return last_sample(sampler.progressive(indices, labels)).square().mean()

    draw(2)  # compiles what is to be compiled: the warm-up
    return Step(lambda: draw(config.num_sampling_steps))


STEPS = {"train": training_step, "sample": sampling_step, "draw": drawing}


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
    self: Attention, x: torch.Tensor, ids_keep: KeptTokens | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`Attention.forward` written out: softmax(q k^T scale + bias) v. The published code makes `bias` in every call."""
    n, tokens, dim = x.shape
    q, k, v = self.qkv(x).reshape(n, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    logits = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    if self.rel_pos_bias is not None:
        logits = logits + naive_bias(self.rel_pos_bias, None if ids_keep is None else ids_keep.positions)
    return self.proj((logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(n, tokens, dim))


@contextmanager
def naive_attention() -> Iterator[None]:
    """Attention as the published code has it, for comparison."""
    with (
        mock.patch.object(Attention, "forward", naive_forward),
        mock.patch("masked_diffusion.models.look_up_kept", lambda ids, *_, **__: KeptTokens(ids, None, None)),
    ):
        yield


# ---------------------------------------------------------------- FLOP


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
    return forward * forward_passes(config)


def forward_passes(config: BenchmarkConfig) -> int:
    """How many forward passes of one image have the FLOP of what is measured.

    A backward pass has two products for each of the forward pass's; guidance runs two rows per image.
    """
    return {"train": 3, "sample": 2, "draw": 2 * config.num_sampling_steps}[config.mode]
