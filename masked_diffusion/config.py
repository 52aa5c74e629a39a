"""Typed configuration: every flag of training with its default, range and help text, stated once.

Each field of a class below is a flag of the scripts (`script_util.parse_flags` makes them); each class is a group of
flags. `RunConfig` describes a training run and is saved as `config.json` beside its checkpoints. The flags of sampling
are in `sample_config`.
"""

from dataclasses import dataclass, field
from typing import Any

from typing_extensions import Self

from . import presets
from .diffusion_config import DiffusionConfig
from .layers.relative_attention import IMPLEMENTATIONS
from .utils import flag_values
from .utils.config_json import check_config_json
from .utils.errors import UserError
from .utils.options import Config, option
from .utils.precision import PRECISIONS, check_fp16

OPTIMIZERS = ("adan", "adan-pytorch", "adamw")
SHARDS = ("none", "zero1", "fsdp", "hsdp")
SCHEDULE_SAMPLERS = ("uniform", "loss-second-moment")
SNAPSHOT_DTYPES = ("fp32", "fp16")
CHECKPOINT_FORMATS = ("whole", "sharded")
ATTENTION_HELP = (
    "attention with a relative position bias: sdpa, of PyTorch; triton, the kernel for GPUs; auto: the kernel on a GPU "
    "in bf16 or fp16, and products in bf16 on a CPU that has instructions for it"
)
VAE_PRECISIONS = ("fp32", "bf16")
VAE_PRECISION_HELP = "number format of the autoencoder; in bf16, pixels differ by less than 1 of 255 on average"
# What versions that recorded nothing of the autoencoder but its name used for all of them.
OLDER_AUTOENCODER = {"scale": 0.18215, "shift": 0.0}
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class ModelConfig(Config):
    """model"""

    preset: str | None = option(
        None, "a published recipe; flags given beside it override its values", choices=tuple(presets.TRAINING),
        presets=presets.TRAINING,
    )  # fmt: skip
    model: str = option("MDTv2_S_2", "family, size and patch size: MDTv2_XL_2, MDT_B_2, DiT_S_4, ...", changes_run=True)
    image_size: int = option(256, "height and width of the images in pixels", at_least=1, changes_run=True)
    mask_ratio: float | None = option(
        None, "fraction of tokens that the masked pass drops (0.3 in the paper's runs); None: train without masking",
        at_least=0, below=1, changes_run=True,
    )  # fmt: skip
    decode_layer: int | None = option(
        None, "number of blocks after the side-interpolater; None: as in the paper", at_least=0, changes_run=True
    )
    num_classes: int | None = option(
        None, "number of classes, without the null class; None: as many as the data has", at_least=0, changes_run=True
    )
    qk_norm: bool = option(
        False, "normalize queries and keys of each head (RMSNorm); of a new model, not of weights without it",
        changes_run=True,
    )  # fmt: skip
    vae: str = option(
        "ema", "autoencoder: ema or mse (of Stable Diffusion); an AutoencoderKL, AutoencoderDC or AutoencoderTiny of "
        "diffusers by hub id (OWNER/NAME or OWNER/NAME/SUBFOLDER) or folder; or identity to train on pixels",
        changes_run=True,
    )  # fmt: skip
    vae_precision: str = option("fp32", VAE_PRECISION_HELP, choices=VAE_PRECISIONS, changes_run=True)


@dataclass(frozen=True)
class DataConfig(Config):
    """data"""

    data_dir: str = option(
        "", "folder of images named CLASS_ANYTHING.jpg, with its subfolders, or a folder that pack_images.py wrote; a "
        "local one, or gs://, az:// or https://ACCOUNT.blob.core.windows.net",
    )  # fmt: skip
    index: str | None = option(
        None, "folder that keeps what listing and opening the images of data_dir found, so that later starts need not "
        "do it again; several runs may share it; None: data_index in log_dir",
    )  # fmt: skip
    reindex: bool = option(
        False, "list and open the images again, whatever --index has; needed after files were overwritten in place, "
        "which the check at the start notices only in a sample, or after any change of a bucket",
    )  # fmt: skip
    latent_dir: str = option("", "latent cache written by scripts/encode_latents.py, instead of --data_dir")
    class_cond: bool = option(True, "train with class labels", changes_run=True)
    random_crop: bool = option(False, "crop at a random place and size, not the centre", changes_run=True)
    random_flip: bool = option(True, "mirror half of the images, chosen at random", changes_run=True)
    on_bad_image: str = option(
        "error", "what to do about images that cannot be read: stop with an error, or skip them",
        choices=("error", "skip"),
    )  # fmt: skip
    fast_decode: bool = option(
        False, "decode JPEGs whose short side is at least 2 x image_size at 1/2, 1/4 or 1/8, instead of halving them "
        "later: less CPU, pixels that differ by 1 to 2 of 255 on average (PSNR about 41 dB)", changes_run=True,
    )  # fmt: skip
    num_workers: int = option(4, "data loading processes per rank; 0: load in the training process", at_least=0)


@dataclass(frozen=True)
class TrainConfig(Config):
    """training"""

    batch_size: int = option(32, "images per rank (GPU) in one step", at_least=1)
    global_batch_size: int | None = option(
        None, "images of all ranks together in one step, instead of batch_size", at_least=1, excludes="batch_size"
    )
    microbatch: int | str = option(
        -1, "images per forward pass (gradient accumulation); -1: all of batch_size; auto: the most that fit in memory",
        read=flag_values.read_microbatch, check=flag_values.check_microbatch,
    )  # fmt: skip
    optimizer: str | None = option(
        None, "optimizer; None: adan for MDTv2, adamw for MDT and DiT", choices=OPTIMIZERS, changes_run=True
    )
    lr: float = option(3e-4, "learning rate", above=0, at_most=1000, changes_run=True)
    weight_decay: float = option(0.0, "weight decay", at_least=0, changes_run=True)
    grad_clip: float | None = option(
        None, "clip the gradients to this global norm; 0: no clipping; None: 1 for adan, 0 for adamw", at_least=0,
        changes_run=True,
    )  # fmt: skip
    lr_anneal_steps: int = option(
        0, "lower the learning rate linearly to zero until this step, and end training there; 0: constant rate",
        at_least=0, changes_run=True,
    )  # fmt: skip
    max_steps: int = option(0, "end training after this step; 0: train until stopped", at_least=0)
    ema_rate: str = option(
        "0.9999", "EMA rates, separated by commas", read=flag_values.read_list, check=flag_values.check_ema_rates,
        changes_run=True,
    )  # fmt: skip
    phema: str = option(
        "", "post-hoc EMA: save snapshots of power-function EMAs with these relative widths, such as 0.05,0.10",
        read=flag_values.read_list, check=flag_values.check_phema_widths, changes_run=True,
    )  # fmt: skip
    phema_dtype: str = option("fp32", "number format of the post-hoc EMA snapshots", choices=SNAPSHOT_DTYPES)
    schedule_sampler: str = option(
        "uniform", "distribution of the training timesteps", choices=SCHEDULE_SAMPLERS, changes_run=True
    )
    timestep_respacing: str = option(
        "", "empty, as in the published commands: training draws from all diffusion_steps",
        check=flag_values.check_no_respacing,
    )  # fmt: skip
    precision: str = option(
        "fp32", "number format of the network; bf16 and fp16 are mixed precision", choices=tuple(PRECISIONS),
        changes_run=True,
    )  # fmt: skip
    use_fp16: bool = option(False, "the same as --precision fp16")
    fp16_scale_growth: float = option(
        1e-3, "fp16: growth of the loss scale per step, as a log2", above=0, at_most=16, changes_run=True
    )
    attention: str = option("auto", ATTENTION_HELP, choices=IMPLEMENTATIONS)
    compile: bool = option(
        False, "compile the transformer blocks and the encoder of the VAE with torch.compile, and on a CPU the step of "
        "Adan",
    )  # fmt: skip
    exact_lengths: bool = option(
        False, "with --compile: do not round the number of kept tokens, and compile once with a dynamic length"
    )
    grad_checkpoint: bool = option(False, "gradient checkpointing: use less memory, compute the activations twice")
    split_backward: bool = option(
        False, "run a backward pass after each of the two forward passes: less memory, the same gradients"
    )
    shard: str = option(
        "none", "zero1: shard the optimizer state over the ranks; fsdp: shard weights, gradients, EMA and optimizer; "
        "hsdp: as fsdp over the ranks of each node, with a copy on every node",
        choices=SHARDS,
    )  # fmt: skip
    seed: int = option(
        0, "random seed of the data order, initial weights and noise (determinism)", at_least=0,
        at_most=LARGEST_SEED, changes_run=True,
    )  # fmt: skip

    def check(self) -> Self:
        super().check()
        check_fp16(self.use_fp16, self.precision)
        if self.microbatch == "auto" and self.shard in ("fsdp", "hsdp"):
            raise UserError(
                f"--microbatch auto does not work with --shard {self.shard}: a rank that runs out of memory while it "
                "tries would leave the others waiting; give a number"
            )
        return self


@dataclass(frozen=True)
class GuardianConfig(Config):
    """monitoring"""

    max_bad_steps: int = option(10, "stop after this many steps in a row whose loss is NaN or infinite", at_least=1)
    spike_zscore: float = option(
        6.0, "report a loss spike when the loss is this many standard deviations above the recent mean", above=0
    )
    rollback_on_spike: int = option(
        0, "after a loss spike, roll back to the last checkpoint and use other data, at most this often; 0: never",
        at_least=0,
    )  # fmt: skip
    hang_timeout: float = option(
        0.0, "when a step or a save takes more seconds than this, say where it hangs and end the process, so that the "
        "launcher restarts the job; 0: never", at_least=0,
    )  # fmt: skip


@dataclass(frozen=True)
class EvaluationConfig(Config):
    """evaluation during training"""

    eval_interval: int = option(0, "steps between evaluations of the EMA weights; 0: no evaluation", at_least=0)
    eval_samples: int = option(1000, "number of images to sample for each evaluation", at_least=2)
    eval_reference: str = option("", "reference npz of the evaluation, as for evaluations/evaluator.py")

    def check(self) -> Self:
        super().check()
        if self.eval_interval and not self.eval_reference:
            raise UserError(
                f"--eval_interval is {self.eval_interval}, but there is no reference to compare with: name an npz "
                "with --eval_reference"
            )
        return self


@dataclass(frozen=True)
class LogConfig(Config):
    """logging, checkpoints and resume"""

    log_dir: str | None = option(None, "folder of logs and checkpoints; None: $OPENAI_LOGDIR, or output")
    loggers: str = option(
        "tensorboard", "where rows, images and configuration go, beside the files: tensorboard, wandb, trackio, or "
        "several of them, separated by commas", read=flag_values.read_list, check=flag_values.check_loggers,
    )  # fmt: skip
    log_interval: int = option(100, "steps between log lines", at_least=1)
    save_interval: int = option(10000, "steps between checkpoints", at_least=1)
    sample_interval: int = option(0, "steps between sample grids of the EMA weights; 0: no grids", at_least=0)
    keep: int = option(3, "newest checkpoints to keep, and every EMA; 0: keep all checkpoints", at_least=0)
    checkpoint_format: str = option(
        "whole", "whole: the published files, gathered on rank 0; sharded: a folder per checkpoint, of which each rank "
        "writes its part (scripts/export.py makes whole files of it)", choices=CHECKPOINT_FORMATS,
    )  # fmt: skip
    async_save: bool = option(
        False, "with --checkpoint_format sharded: go on training while a copy of the state in host memory is written"
    )
    resume_checkpoint: str = option(
        "auto",
        "auto: resume from the newest checkpoint in log_dir; '': start a new run; a checkpoint in log_dir: resume from "
        "it; a file or folder elsewhere: start at step 0 from its weights (fine-tuning)",
    )
    continue_from: str = option(
        "", "resume from this model000100.pt of another folder, with its optimizer, EMA and step; save into log_dir"
    )
    allow_config_change: bool = option(False, "resume even if flags that change the result have new values")

    def check(self) -> Self:
        super().check()
        if self.async_save and self.checkpoint_format != "sharded":
            raise UserError(
                f"--async_save True works with --checkpoint_format sharded only, but it is {self.checkpoint_format}: "
                "choose sharded, or leave --async_save out"
            )
        return self


@dataclass(frozen=True)
class RunConfig(Config):
    """A training run: its flags, and what was determined before the first step.

    :param architecture: `name` and `options` for `create_model`; the file of `save_pretrained` has only the options.
    :param autoencoder: `channels`, `downsample`, `scale` and `shift` of the first stage; of a run of an older version
        only the last two; {} if nothing is known.
    :param classes: names of the classes in the order of their labels.
    :param data_signature: hash of the names of the training images; None if it is unknown.
    :param global_batch: images per step, summed over all ranks; None if it is unknown.
    :param auto_microbatch: what `training.batch.choose_microbatch` found, and in which circumstances; None: nothing.
    """

    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    guardian: GuardianConfig = GuardianConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    log: LogConfig = LogConfig()
    architecture: dict[str, Any] = field(default_factory=dict)
    autoencoder: dict[str, float] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    data_signature: str | None = None
    global_batch: int | None = None
    auto_microbatch: dict[str, Any] | None = None

    def check(self) -> Self:
        super().check()
        if self.diffusion.objective == "flow" and self.train.schedule_sampler != "uniform":
            raise UserError(
                f"--schedule_sampler {self.train.schedule_sampler} needs a diffusion: with --objective flow choose the "
                "times with --t_sampling"
            )
        return self

    @property
    def precision(self) -> str:
        """The number format in use: fp16 with `--use_fp16`, else `--precision`."""
        return "fp16" if self.train.use_fp16 else self.train.precision

    @property
    def rounds_lengths(self) -> bool:
        """Whether the number of tokens kept in a masked pass is rounded, so that fewer shapes are compiled."""
        return self.train.compile and not self.train.exact_lengths and self.model.mask_ratio is not None

    def to_json(self) -> dict[str, Any]:
        """The contents of `config.json`."""
        return {
            "model": self.architecture,
            "diffusion": self.diffusion.values(),
            "vae": self.model.vae,
            "autoencoder": self.autoencoder,
            "classes": list(self.classes),
            "data_signature": self.data_signature,
            "global_batch": self.global_batch,
            "auto_microbatch": self.auto_microbatch,
            "flags": {each.name: self.values()[each.name] for _, each in self.flags()},
        }

    @classmethod
    def from_json(cls, found: Any) -> Self:
        """Read the `config.json` of a training run (also of an older version), an export or `save_pretrained`.

        :param found: the parsed JSON.
        :raises UserError: for any other JSON. The message says what is wrong; the caller adds the file's name.
        """
        check_config_json(found)
        older = OLDER_AUTOENCODER if found.get("vae", "identity") != "identity" else {}
        flags = found.get("flags") or {}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
        values |= found.get("diffusion") or {}
        values |= {
            "vae": found.get("vae", "ema"),
            "architecture": found.get("model") or {"options": found},
            "autoencoder": found.get("autoencoder", older),
            "classes": tuple(found.get("classes") or ()),
            "data_signature": found.get("data_signature"),
            "global_batch": found.get("global_batch", flags.get("global_batch")),
            "auto_microbatch": found.get("auto_microbatch"),
        }
        run = cls.from_values(values)
        run.diffusion.check()  # training and sampling both need it, whichever program wrote the file
        return run
