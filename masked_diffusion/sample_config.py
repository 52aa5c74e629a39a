"""Typed configuration: every flag of sampling with its default, range and help text, stated once; see `config`."""

from dataclasses import dataclass

from typing_extensions import Self

from .config import ATTENTION_HELP, LARGEST_SEED, VAE_PRECISION_HELP, VAE_PRECISIONS
from .diffusion_config import NOISE_SCHEDULES
from .guidance import RULES
from .layers.relative_attention import IMPLEMENTATIONS
from .utils import flag_values
from .utils.errors import UserError
from .utils.options import Config, option
from .utils.precision import PRECISIONS_OR_AUTO, check_fp16

SOLVERS_OF = {  # by objective; the first is the default
    "diffusion": ("ddpm", "ddim", "dpm++", "sde-dpm++", "unipc", "heun", "euler"),
    "flow": ("flow-euler", "flow-heun", "flow-sde"),
}
SOLVERS = tuple(solver for solvers in SOLVERS_OF.values() for solver in solvers)
CLASS_RULES = ("random", "balanced", "list")
QUANTIZERS = ("truncate", "round")
CFG_SCALE, SCALE_POW = 3.8, 4.0  # of MDTv2's published results


@dataclass(frozen=True)
class TrainedConfig(Config):
    """what the model was trained with: not needed, the checkpoint tells it; if given, it must agree"""

    class_cond: bool | None = option(None, "with class labels")
    learn_sigma: bool | None = option(None, "with a learned variance")
    diffusion_steps: int | None = option(None, "timesteps of the noise schedule", at_least=1)
    noise_schedule: str | None = option(None, "noise schedule", choices=NOISE_SCHEDULES)
    sigma_small: bool | None = option(None, "the variance of the posterior instead of beta")
    use_kl: bool | None = option(None, "on the variational bound instead of the MSE")
    predict_xstart: bool | None = option(None, "to predict x_start instead of eps")
    rescale_learned_sigmas: bool | None = option(None, "variational loss term times diffusion_steps / 1000")


@dataclass(frozen=True)
class WeightsConfig(Config):
    """model"""

    model_path: str = option(
        "",
        "checkpoint (.pt, .safetensors), training folder (its newest EMA is used), or hub id",
        check=flag_values.check_source,
    )
    vae_decoder: str | None = option(
        None, "autoencoder, as --vae of training, whose channels, factor, scale and shift it must have; None: the one "
        "used in training, else ema",
    )  # fmt: skip
    vae_precision: str = option("fp32", VAE_PRECISION_HELP, choices=VAE_PRECISIONS)
    decode_batch: int | None = option(
        None, "number of images that the VAE decodes at once; None: the whole batch", at_least=1
    )
    precision: str = option(
        "fp32", "number format of the network; bf16 and fp16 are mixed precision; auto: bf16 where this machine "
        "computes it faster, else fp32", choices=PRECISIONS_OR_AUTO,
    )  # fmt: skip
    use_fp16: bool = option(False, "the same as --precision fp16")
    attention: str = option("auto", ATTENTION_HELP, choices=IMPLEMENTATIONS)
    compile: bool = option(
        False, "compile the transformer blocks and the decoder of the VAE with torch.compile; on a GPU, a step of the "
        "network is one CUDA graph",
    )  # fmt: skip
    model: str | None = option(None, "not needed, the checkpoint tells it; if given, it must agree")
    image_size: int | None = option(None, "not needed, the checkpoint tells it; if given, it must agree", at_least=1)
    decode_layer: int | None = option(None, "not needed, the checkpoint tells it; if given, it must agree", at_least=0)
    mask_ratio: float | None = option(None, "ignored, as sampling does not mask; accepted for the published commands")
    trained: TrainedConfig = TrainedConfig()

    def check(self) -> Self:
        super().check()
        check_fp16(self.use_fp16, self.precision)
        return self


@dataclass(frozen=True)
class SolverConfig(Config):
    """solver"""

    solver: str | None = option(
        None, "sampling algorithm; None: ddpm, or ddim with --use_ddim; flow-euler for a model of --objective flow",
        choices=SOLVERS,
    )  # fmt: skip
    num_sampling_steps: str = option(
        "250", "number of sampling steps; ddpm and ddim also take 10,15,20 (steps per part of the schedule) and ddim50",
        check=flag_values.check_steps,
    )  # fmt: skip
    use_ddim: bool = option(False, "the same as --solver ddim")
    clip_denoised: bool = option(False, "clip the predicted x_start to [-1, 1]")
    seed: int = option(0, "random seed; image i depends only on it and i", at_least=0, at_most=LARGEST_SEED)

    def name(self, objective: str) -> str:
        """The solver in use: `--solver`, else ddim with `--use_ddim`, else the default of the model's objective."""
        return self.solver or ("ddim" if self.use_ddim else SOLVERS_OF[objective][0])

    def check(self) -> Self:
        super().check()
        if self.use_ddim and self.solver not in (None, "ddim"):
            raise UserError(f"--use_ddim True and --solver {self.solver} contradict each other: leave one out")
        return self


@dataclass(frozen=True)
class GuidanceConfig(Config):
    """guidance"""

    cfg_cond: bool | None = option(
        None, "use classifier-free guidance with the rule of the model's family; None: no guidance, as False"
    )
    guidance: str | None = option(
        None, "guidance rule; if left out, --cfg_cond means power-cosine for MDT and MDTv2, constant for DiT",
        choices=RULES, read=str,
    )  # fmt: skip
    cfg_scale: float | None = option(None, f"guidance scale; None: {CFG_SCALE:g}", at_least=0)
    scale_pow: float | None = option(None, f"power of the power-cosine schedule; None: {SCALE_POW:g}", at_least=0)
    guidance_interval: tuple[float, float] | None = option(
        None, "timesteps at which --guidance interval guides; None: all", at_least=0, metavar=("FIRST", "LAST"),
        check=flag_values.check_interval,
    )  # fmt: skip
    guide_path: str | None = option(None, "a weaker checkpoint that guides instead of the null class (autoguidance)")
    guided_channels: int | str | None = option(
        "auto", "number of channels that are guided, or all; auto: 3 of up to 4 channels, as in the published results, "
        "all of more", check=flag_values.check_channels, read=flag_values.read_channels,
    )  # fmt: skip
    skip_guidance_below: float = option(
        0.0, "skip the guiding pass at steps whose guidance weight is at most this far from 1; negative: never skip"
    )

    def rule(self, model_rule: str) -> str:
        """The guidance rule in use, one of `guidance.RULES`.

        :param model_rule: the rule of the model's family.
        """
        if self.guidance is not None:
            return self.guidance
        return "constant" if self.guide_path else model_rule if self.cfg_cond else "none"

    def unused(self, rule: str) -> list[str]:
        """The flags that were given although this rule ignores them."""
        uses = {"cfg_scale": rule != "none", "scale_pow": rule == "power-cosine"}
        uses |= {"guidance_interval": rule == "interval", "guide_path": rule != "none"}
        return [f"--{name}" for name, used in uses.items() if not used and getattr(self, name) is not None]

    def check(self) -> Self:
        super().check()
        if self.cfg_cond is False and self.guidance not in (None, "none") and not self.guide_path:
            raise UserError(
                f"--cfg_cond False and --guidance {self.guidance} contradict each other: leave one of them out"
            )
        if self.cfg_cond is None and self.guidance is None and not self.guide_path and self.unused("none"):
            raise UserError(
                f"{self.unused('none')[0]} is given, but nothing is guided: add --cfg_cond True (the rule of the "
                "model's family), --guidance RULE or --guide_path FILE; or --cfg_cond False to draw without guidance"
            )
        return self


@dataclass(frozen=True)
class SampleConfig(Config):
    """What an image sampler is made of: weights, solver and guidance."""

    weights: WeightsConfig = WeightsConfig()
    solver: SolverConfig = SolverConfig()
    guidance: GuidanceConfig = GuidanceConfig()

    @property
    def precision(self) -> str:
        """The number format that was asked for: fp16 with `--use_fp16`, else `--precision`, which may be auto."""
        return "fp16" if self.weights.use_fp16 else self.weights.precision
