"""Typed configuration: every flag of training and sampling with its default, range and help text, stated once.

A field of a class below is a flag of the scripts (`script_util.parse_flags` makes them); a class is a group of flags.
`RunConfig` is a training run, and what `config.json` beside its checkpoints holds; `SampleConfig` is for sampling.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import Self

from .guidance import RULES
from .utils import flag_values
from .utils.errors import UserError
from .utils.options import Config, option
from .utils.precision import PRECISIONS

OPTIMIZERS = ("adan", "adan-pytorch", "adamw")
SHARDS = ("none", "zero1", "fsdp")
SCHEDULE_SAMPLERS = ("uniform", "loss-second-moment")
NOISE_SCHEDULES = ("linear", "squaredcos_cap_v2")
SNAPSHOT_DTYPES = ("fp32", "fp16")
SOLVERS = ("ddpm", "ddim", "dpm++", "sde-dpm++", "unipc", "heun", "euler")
CLASS_RULES = ("random", "balanced", "list")
QUANTIZERS = ("truncate", "round")
CFG_SCALE, SCALE_POW = 3.8, 4.0  # of the published numbers of MDTv2
LARGEST_SEED = 2**63 - 1

# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class ModelConfig(Config):
    """model"""

    model: str = option("MDTv2_S_2", "family, size and patch size: MDTv2_XL_2, MDT_B_2, DiT_S_4, ...", changes_run=True)
    image_size: int = option(256, "height and width of the images in pixels", at_least=1, changes_run=True)
    mask_ratio: float | None = option(
        None, "share of tokens that the masked pass drops (0.3 in the paper's runs); None: train without masking",
        at_least=0, below=1, changes_run=True,
    )  # fmt: skip
    decode_layer: int | None = option(
        None, "blocks after the side-interpolater; None: the paper's number", at_least=0, changes_run=True
    )
    num_classes: int | None = option(
        None, "rows of the label table, without the null class; None: as many as the data has", at_least=0,
        changes_run=True,
    )  # fmt: skip
    vae: str = option(
        "ema", "first stage: ema or mse (Stable Diffusion's), a hub id, a folder, or identity for pixels",
        changes_run=True,
    )  # fmt: skip


@dataclass(frozen=True)
class DiffusionConfig(Config):
    """diffusion"""

    diffusion_steps: int = option(1000, "timesteps of the noise schedule", at_least=1, changes_run=True)
    noise_schedule: str = option("linear", "betas of the noise schedule", choices=NOISE_SCHEDULES, changes_run=True)
    learn_sigma: bool = option(True, "learn the variance of the reverse process", changes_run=True)
    sigma_small: bool = option(False, "without learn_sigma: the posterior's variance, not beta", changes_run=True)
    use_kl: bool = option(False, "train on the variational bound instead of the MSE", changes_run=True)
    predict_xstart: bool = option(False, "predict x_start instead of eps", changes_run=True)
    predict_v: bool = option(False, "predict v instead of eps", changes_run=True)
    rescale_learned_sigmas: bool = option(False, "multiply the variational term by steps / 1000", changes_run=True)
    snr_gamma: float | str | None = option(
        "auto", "Min-SNR weight of the MSE; None: no weight; auto: 5 for MDTv2, None for MDT and DiT",
        read=flag_values.read_gamma, check=flag_values.check_gamma, changes_run=True,
    )  # fmt: skip

    def options(self, default_snr_gamma: float | None) -> dict[str, Any]:
        """Keywords for `create_diffusion`.

        :param default_snr_gamma: what `auto` stands for: the default of the model's family.
        """
        gamma = default_snr_gamma if self.snr_gamma == "auto" else self.snr_gamma
        return self.values() | {"snr_gamma": gamma}


@dataclass(frozen=True)
class DataConfig(Config):
    """data"""

    data_dir: str = option(
        "", "folder of images named CLASS_ANYTHING.jpg, searched with its subfolders, or what pack_images.py made of it"
    )
    latent_dir: str = option("", "folder that scripts/encode_latents.py made of the images, instead of --data_dir")
    class_cond: bool = option(True, "train with class labels", changes_run=True)
    random_crop: bool = option(False, "crop at random instead of the centre", changes_run=True)
    random_flip: bool = option(True, "mirror half of the images", changes_run=True)
    on_bad_image: str = option(
        "error", "what to do about images that cannot be read or are tiny", choices=("error", "skip")
    )
    num_workers: int = option(4, "data loading processes per rank; 0: load in the training process", at_least=0)


@dataclass(frozen=True)
class TrainConfig(Config):
    """training"""

    batch_size: int = option(32, "images per rank and step", at_least=1)
    microbatch: int = option(-1, "images per forward pass (gradient accumulation); -1: all of batch_size", at_least=-1)
    optimizer: str | None = option(
        None, "None: adan for MDTv2, adamw for MDT and DiT", choices=OPTIMIZERS, changes_run=True
    )
    lr: float = option(3e-4, "learning rate", above=0, changes_run=True)
    weight_decay: float = option(0.0, "weight decay", at_least=0, changes_run=True)
    grad_clip: float | None = option(
        None, "clip gradients to this global norm; 0: no clipping; None: 1 for adan, 0 for adamw", at_least=0,
        changes_run=True,
    )  # fmt: skip
    lr_anneal_steps: int = option(
        0, "anneal the learning rate to zero until this step, and end there; 0: constant", at_least=0, changes_run=True
    )
    max_steps: int = option(0, "end after this step; 0: train until stopped", at_least=0)
    ema_rate: str = option(
        "0.9999", "EMA rates, separated by commas", check=flag_values.check_ema_rates, changes_run=True
    )
    phema: str = option(
        "", "relative widths of power-function EMAs to save snapshots of, such as 0.05,0.10 (post-hoc EMA)",
        check=flag_values.check_phema_widths, changes_run=True,
    )  # fmt: skip
    phema_dtype: str = option("fp32", "number format of those snapshots", choices=SNAPSHOT_DTYPES)
    schedule_sampler: str = option(
        "uniform", "how timesteps are drawn in training", choices=SCHEDULE_SAMPLERS, changes_run=True
    )
    precision: str = option(
        "fp32", "number format of the network's arithmetic (mixed precision)", choices=tuple(PRECISIONS),
        changes_run=True,
    )  # fmt: skip
    use_fp16: bool = option(False, "the same as --precision fp16")
    fp16_scale_growth: float = option(
        1e-3, "fp16: log2 of the loss scale's growth per step", at_least=0, changes_run=True
    )
    compile: bool = option(False, "compile the transformer blocks with torch.compile")
    exact_lengths: bool = option(
        False, "with compile: do not round the number of kept tokens, and compile one form for all lengths"
    )
    grad_checkpoint: bool = option(False, "gradient checkpointing: less memory, activations computed twice")
    split_backward: bool = option(False, "backward after each of the two passes: less memory, the same gradients")
    shard: str = option("none", "zero1: shard the optimizer state over the ranks; fsdp: everything", choices=SHARDS)
    seed: int = option(
        0, "seed of data order, initial weights and noise (determinism)", at_least=0, at_most=LARGEST_SEED,
        changes_run=True,
    )  # fmt: skip


@dataclass(frozen=True)
class GuardianConfig(Config):
    """monitoring"""

    max_bad_steps: int = option(10, "stop after this many steps in a row whose loss is NaN or infinite", at_least=1)
    spike_zscore: float = option(
        6.0, "report a loss this many standard deviations above the recent mean as a spike", above=0
    )
    rollback_on_spike: int = option(
        0, "after a spike, go back to the last checkpoint and on with other data, at most this many times; 0: never",
        at_least=0,
    )  # fmt: skip


@dataclass(frozen=True)
class EvaluationConfig(Config):
    """evaluation during training"""

    eval_interval: int = option(0, "steps between evaluations of the EMA; 0: none", at_least=0)
    eval_samples: int = option(1000, "images to draw for each", at_least=2)
    eval_reference: str = option("", "npz to compare them with, as for evaluations/evaluator.py")

    def check(self) -> Self:
        super().check()
        if self.eval_interval and not self.eval_reference:
            raise UserError(
                f"--eval_interval is {self.eval_interval}, but there is nothing to compare with: name an npz with "
                "--eval_reference"
            )
        return self


@dataclass(frozen=True)
class LogConfig(Config):
    """logging, checkpoints and resume"""

    log_dir: str | None = option(None, "folder of logs and checkpoints; None: $OPENAI_LOGDIR, or output")
    log_interval: int = option(100, "steps between log lines", at_least=1)
    save_interval: int = option(10000, "steps between checkpoints", at_least=1)
    sample_interval: int = option(0, "steps between grids of samples of the EMA; 0: none", at_least=0)
    keep: int = option(0, "keep the newest checkpoints, this many; 0: all", at_least=0)
    resume_checkpoint: str = option(
        "auto",
        "auto: resume from the newest checkpoint of log_dir; '': start afresh; a checkpoint of log_dir: resume from "
        "it; a file or folder elsewhere: start at step 0 from its weights (fine-tuning)",
    )
    continue_from: str = option(
        "", "model000100.pt of another folder: resume from it in log_dir, with its optimizer, EMA and step"
    )
    allow_config_change: bool = option(False, "resume although flags that change the run have other values")


@dataclass(frozen=True)
class RunConfig(Config):
    """A training run: its flags, and what was found out before the first step.

    :param architecture: `name` and `options` for `create_model`; what `save_pretrained` leaves has options alone.
    :param classes: names of the classes in the order of their labels.
    :param data_signature: of the files that were trained on; None where it is not known.
    :param global_batch: images per step over all ranks.
    """

    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    guardian: GuardianConfig = GuardianConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    log: LogConfig = LogConfig()
    architecture: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    data_signature: str | None = None
    global_batch: int | None = None

    @property
    def precision(self) -> str:
        """`--precision`, or what `--use_fp16` stands for."""
        return "fp16" if self.train.use_fp16 else self.train.precision

    @property
    def rounds_lengths(self) -> bool:
        """Whether the number of tokens kept in a masked pass is rounded, so that few shapes are compiled."""
        return self.train.compile and not self.train.exact_lengths and self.model.mask_ratio is not None

    def to_json(self) -> dict[str, Any]:
        """What `config.json` holds."""
        return {
            "model": self.architecture,
            "diffusion": self.diffusion.values(),
            "vae": self.model.vae,
            "classes": list(self.classes),
            "data_signature": self.data_signature,
            "global_batch": self.global_batch,
            "flags": {each.name: self.values()[each.name] for _, each in self.flags()},
        }

    @classmethod
    def from_json(cls, found: Any) -> Self:
        """Read a `config.json` of training, of `scripts/export.py` or of `save_pretrained`, old or new.

        :raises UserError: for JSON that is none of these; says what is wrong, and the caller says in which file.
        """
        if not isinstance(found, dict):
            raise UserError(f"it holds a {type(found).__name__} instead of a dictionary")
        parts = {key: found.get(key) or {} for key in ("model", "diffusion", "flags")}
        for key, part in parts.items():
            if not isinstance(part, dict):
                raise UserError(f"its {key!r} is {part!r} instead of a dictionary")
        architecture = parts["model"]
        if architecture and not (
            isinstance(architecture.get("name"), str) and isinstance(architecture.get("options", {}), dict)
        ):
            raise UserError(f"its 'model' is {architecture!r}: it needs a 'name', and 'options' that are a dictionary")
        classes, vae = found.get("classes") or [], found.get("vae", "ema")
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise UserError("its 'classes' are no list of names")
        if not isinstance(vae, str):
            raise UserError(f"its 'vae' is {vae!r} instead of a name")
        known = {name: tuple(value) if isinstance(value, list) else value for name, value in parts["flags"].items()}
        global_batch = found.get("global_batch", parts["flags"].get("global_batch"))
        facts = {
            "architecture": architecture or {"options": found},
            "classes": tuple(classes),
            "data_signature": found.get("data_signature"),
            "global_batch": global_batch,
        }
        run = cls.from_values(known | parts["diffusion"] | {"vae": vae} | facts)
        run.diffusion.check()  # sampling depends on it, whatever the file is
        return run

    def differences(self, before: Self) -> Iterator[tuple[str, Any, Any]]:
        """What a run that is resumed would compute otherwise: name, value of `before` and of this one.

        Both are resolved; what an older configuration does not know is passed over.
        """
        now, then = self.values(), before.values()
        for _, each in self.flags():
            if each.metadata["changes_run"] and now[each.name] != then[each.name]:
                yield f"--{each.name}", then[each.name], now[each.name]
        if self.rounds_lengths != before.rounds_lengths:
            yield "--compile without --exact_lengths", before.rounds_lengths, self.rounds_lengths
        if None not in (self.global_batch, before.global_batch) and self.global_batch != before.global_batch:
            yield "the global batch (--batch_size times the number of ranks)", before.global_batch, self.global_batch
        if before.classes and self.classes != before.classes:
            yield "the class names", *_first_difference(before.classes, self.classes)
        elif None not in (self.data_signature, before.data_signature) and self.data_signature != before.data_signature:
            yield "the list of image files", before.data_signature[:12], self.data_signature[:12]


def _first_difference(before: tuple[str, ...], now: tuple[str, ...]) -> tuple[str, str]:
    """How two lists of class names differ, in few words for each."""
    if len(before) != len(now):
        return f"{len(before)} classes", f"{len(now)} classes"
    label = next(i for i, names in enumerate(zip(before, now, strict=True)) if names[0] != names[1])
    return f"{before[label]!r} for label {label}", f"{now[label]!r}"


# ---------------------------------------------------------------- sampling


@dataclass(frozen=True)
class WeightsConfig(Config):
    """model"""

    model_path: str = option(
        "",
        "checkpoint (.pt, .safetensors), training folder (its newest EMA), or hub id",
        check=flag_values.check_source,
    )
    vae_decoder: str | None = option(
        None, "what decodes latents: ema, mse, a hub id, a folder, or identity; None: what training used, else ema"
    )
    decode_batch: int | None = option(None, "images that the VAE decodes at a time; None: the batch", at_least=1)
    precision: str = option("fp32", "number format of the network's arithmetic", choices=tuple(PRECISIONS))
    use_fp16: bool = option(False, "the same as --precision fp16")
    compile: bool = option(False, "compile the transformer blocks with torch.compile")
    model: str | None = option(None, "read off the checkpoint; if given, it must agree")
    image_size: int | None = option(None, "read off the checkpoint; if given, it must agree", at_least=1)
    decode_layer: int | None = option(None, "read off the checkpoint; if given, it must agree", at_least=0)
    mask_ratio: float | None = option(None, "taken for the published commands: sampling masks nothing")


@dataclass(frozen=True)
class SolverConfig(Config):
    """solver"""

    solver: str | None = option(None, "None: ddpm, or ddim with --use_ddim", choices=SOLVERS)
    num_sampling_steps: str = option(
        "250", "steps: 250; for ddpm and ddim also 10,15,20 and ddim50", check=flag_values.check_steps
    )
    use_ddim: bool = option(False, "the same as --solver ddim")
    clip_denoised: bool = option(False, "clip predicted x_start to [-1, 1]")
    seed: int = option(0, "image i is a function of the seed and i", at_least=0, at_most=LARGEST_SEED)

    @property
    def name(self) -> str:
        """`--solver`, or what `--use_ddim` stands for."""
        return self.solver or ("ddim" if self.use_ddim else "ddpm")

    def check(self) -> Self:
        super().check()
        if self.use_ddim and self.name != "ddim":
            raise UserError(f"--use_ddim True and --solver {self.solver} contradict each other: leave one out")
        return self


@dataclass(frozen=True)
class GuidanceConfig(Config):
    """guidance"""

    cfg_cond: bool | None = option(None, "guide, by the rule of the model's family; None: no guidance, as False")
    guidance: str | None = option(
        None, "guidance rule; left out: with --cfg_cond, power-cosine for MDT and MDTv2, constant for DiT",
        choices=RULES, read=str,
    )  # fmt: skip
    cfg_scale: float | None = option(None, f"guidance scale; None: {CFG_SCALE:g}", at_least=0)
    scale_pow: float | None = option(None, f"power of the power-cosine schedule; None: {SCALE_POW:g}", at_least=0)
    guidance_interval: tuple[float, float] | None = option(
        None, "timesteps that the rule interval guides; None: all", at_least=0, metavar=("FIRST", "LAST"),
        check=flag_values.check_interval,
    )  # fmt: skip
    guide_path: str | None = option(None, "a weaker checkpoint that guides instead of the null class (autoguidance)")
    guided_channels: int | None = option(
        3, "how many channels are guided, or all", at_least=1, read=flag_values.read_channels
    )
    skip_guidance_below: float = option(
        0.0, "leave the guiding half out where the weight is this close to 1; 0: where it is 1; negative: never"
    )

    def rule(self, model_rule: str) -> str:
        """The rule that guides, one of `guidance.RULES`.

        :param model_rule: of the model's family.
        """
        if self.guidance is not None:
            return self.guidance
        return "constant" if self.guide_path else model_rule if self.cfg_cond else "none"

    def unused(self, rule: str) -> list[str]:
        """Flags that were given, and that this rule does not look at."""
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
    """Which weights, how to solve, how to guide: what an image sampler is made of."""

    weights: WeightsConfig = WeightsConfig()
    solver: SolverConfig = SolverConfig()
    guidance: GuidanceConfig = GuidanceConfig()

    @property
    def precision(self) -> str:
        """`--precision`, or what `--use_fp16` stands for."""
        return "fp16" if self.weights.use_fp16 else self.weights.precision
