"""What the scripts share: flags made of configurations, and how a script ends."""

import argparse
import difflib
import hashlib
import json
import re
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import Field
from pathlib import Path
from typing import Any, TypeVar

from . import dist_util, logger
from .models import create_model
from .respace import create_diffusion
from .training.ema import DTYPES
from .training.optim import OPTIMIZERS
from .training.parallel import SHARDS
from .utils.errors import UserError
from .utils.files import write_json
from .utils.options import Config, is_optional
from .utils.precision import PRECISIONS
from .weights.checkpoint import CONFIG_NAME, latest_step

C = TypeVar("C", bound=Config)
INTERRUPTED = 130  # what a shell calls the exit code of a program that Ctrl-C ended

# ---------------------------------------------------------------- flags


def str2bool(text: str) -> bool:
    """`True` or `False` in the spellings of the published scripts."""
    if isinstance(text, bool):
        return text
    if text.lower() in ("true", "t", "yes", "y", "1"):
        return True
    if text.lower() in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


class Parser(argparse.ArgumentParser):
    """Shows defaults, takes no abbreviations, and refuses with a `UserError` that names what may have been meant."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags of {self.prog})")

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            self.error(f"{flag} is no flag of {self.prog}" + (f": did you mean {near[0]}?" if near else ""))
        return found


def parse_flags(config_class: type[C], description: str, argv: Sequence[str] | None = None, **defaults: Any) -> C:
    """A configuration from the command line, with every value in its range.

    A field is a flag: booleans may stand alone (`--compile`) or with a value (`--compile True`), optional values take
    `None`, and DiT's spelling with hyphens works too.

    :param argv: the command line, without the program's name; None: of this process.
    :param defaults: by field name, where a script has others than the class.
    :raises UserError: for a flag that there is not, and for a value that it cannot have.
    """
    parser = Parser(description=description)
    # Of torch.distributed.launch; torchrun says the same in the environment.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    groups = {}
    for owner, field in config_class.flags():
        if owner not in groups:
            groups[owner] = parser.add_argument_group(owner.__doc__.splitlines()[0])
        _add_flag(
            groups[owner], field, typing.get_type_hints(owner)[field.name], defaults.get(field.name, field.default)
        )
    argv = sys.argv[1:] if argv is None else argv
    found = vars(parser.parse_args([_with_underscores(word) for word in argv]))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    return config_class.from_values(values).check()


def _with_underscores(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if re.match(r"--[a-z]", name) else word


def _add_flag(group, field: Field, annotation: Any, default: Any) -> None:
    meta = field.metadata
    options = {"default": default, "help": meta["help"].replace("%", "%%")}
    may_be_none = is_optional(annotation) and not meta["read"]
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)] if may_be_none else [annotation]
    kind = kinds[0]
    if typing.get_origin(kind) is tuple:
        of, *rest = typing.get_args(kind)
        options |= {"nargs": "+" if rest == [Ellipsis] else 1 + len(rest), "metavar": meta["metavar"]}
        kind, may_be_none = of, False  # a word None in a list is a word
    if kind is bool:
        options |= {"nargs": "?", "const": True}
    read = meta["read"] or {bool: str2bool}.get(kind, kind)
    options["type"] = _optional(read) if may_be_none else read
    if meta["choices"]:
        options["choices"] = (*meta["choices"], None) if may_be_none else meta["choices"]
        options["metavar"] = "{" + ",".join(meta["choices"]) + "}"
    group.add_argument(f"--{field.name}", **options)


def _optional(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def read_optional(text):
        return None if text.lower() == "none" else read(text)

    read_optional.__name__ = getattr(read, "__name__", "value")  # argparse says it in `invalid int value: 'x'`
    return read_optional


def optional_float(text):
    return None if text.lower() == "none" else float(text)


def make_parser(description):
    parser = Parser(description=description)
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def check_positive(args, *names):
    """Refuse flags that are not positive, before anything starts."""
    for name in names:
        if getattr(args, name) <= 0:
            raise UserError(f"{name} is {getattr(args, name)}: it must be positive")


def precision_of(args):
    return "fp16" if args.use_fp16 else args.precision


def add_model_flags(parser):
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="MDTv2_S_2", help="family, size and patch size: MDTv2_XL_2, DiT_B_4, ...")
    group.add_argument("--image_size", type=int, default=256, help="height and width of the images")
    group.add_argument(
        "--mask_ratio", type=optional_float, help="share of tokens a masked pass drops; None: no such pass"
    )
    group.add_argument("--decode_layer", type=int, help="blocks after the side-interpolater; None: the paper's number")
    group.add_argument("--num_classes", type=int, help="rows of the label table; None: as many as the data has")
    group.add_argument("--vae", default="ema", help="first stage: ema, mse, a hub id, a folder; identity for pixels")


def add_diffusion_flags(parser):
    group = parser.add_argument_group("diffusion")
    group.add_argument("--diffusion_steps", type=int, default=1000, help="timesteps of the noise schedule")
    group.add_argument("--noise_schedule", default="linear", help="linear or squaredcos_cap_v2")
    group.add_argument("--learn_sigma", type=str2bool, default=True, help="learn the reverse process's variance")
    group.add_argument(
        "--sigma_small", type=str2bool, default=False, help="without learn_sigma: the posterior's variance"
    )
    group.add_argument("--use_kl", type=str2bool, default=False, help="train on the variational bound")
    group.add_argument("--predict_xstart", type=str2bool, default=False, help="predict x_start instead of eps")
    group.add_argument("--predict_v", type=str2bool, default=False, help="predict v instead of eps")
    group.add_argument("--rescale_learned_sigmas", type=str2bool, default=False, help="bound times steps / 1000")
    group.add_argument(
        "--snr_gamma", type=optional_float, default=argparse.SUPPRESS,
        help="Min-SNR weight of the MSE, or None (default: 5.0 for MDTv2, None for MDT and DiT)",
    )  # fmt: skip


def add_train_flags(parser):
    data = parser.add_argument_group("data")
    data.add_argument("--data_dir", default="", help="folder of images named CLASS_ANYTHING, with subfolders")
    data.add_argument("--latent_dir", default="", help="what encode_latents.py made of the images, instead of data_dir")
    data.add_argument("--class_cond", type=str2bool, default=True, help="train with class labels")
    data.add_argument("--random_crop", type=str2bool, default=False, help="crop at random instead of the centre")
    data.add_argument("--random_flip", type=str2bool, default=True, help="mirror half of the images")
    data.add_argument("--on_bad_image", choices=("error", "skip"), default="error", help="unreadable or tiny images")
    data.add_argument(
        "--num_workers", type=int, default=4, help="loader processes per rank; 0: in the training process"
    )

    train = parser.add_argument_group("training")
    train.add_argument("--batch_size", type=int, default=32, help="images per rank and step")
    train.add_argument("--microbatch", type=int, default=-1, help="images per forward pass; -1: all of batch_size")
    train.add_argument("--optimizer", choices=OPTIMIZERS, help="None: adan for MDTv2, adamw for MDT and DiT")
    train.add_argument("--lr", type=float, default=3e-4, help="learning rate")
    train.add_argument("--weight_decay", type=float, default=0.0, help="weight decay")
    train.add_argument("--grad_clip", type=float, help="global gradient norm, 0: unclipped; None: 1 for adan, else 0")
    train.add_argument(
        "--lr_anneal_steps", type=int, default=0, help="anneal lr to zero until this step, and end there"
    )
    train.add_argument("--max_steps", type=int, default=0, help="end after this step; 0: go on")
    train.add_argument("--ema_rate", default="0.9999", help="EMA rates, separated by commas")
    train.add_argument("--phema", default="", help="widths of EMAs to reconstruct from later, such as 0.05,0.10")
    train.add_argument("--phema_dtype", choices=DTYPES, default="fp32", help="format of their snapshots")
    train.add_argument("--schedule_sampler", default="uniform", help="timesteps: uniform or loss-second-moment")
    train.add_argument("--precision", choices=PRECISIONS, default="fp32", help="arithmetic of the network")
    train.add_argument("--compile", type=str2bool, default=False, help="compile the blocks")
    train.add_argument("--exact_lengths", type=str2bool, default=False, help="with compile: do not round kept lengths")
    train.add_argument("--grad_checkpoint", type=str2bool, default=False, help="compute activations twice, keep few")
    train.add_argument("--split_backward", type=str2bool, default=False, help="backward after each pass: less memory")
    train.add_argument("--shard", choices=SHARDS, default="none", help="zero1: optimizer state, fsdp: everything")
    train.add_argument("--use_fp16", type=str2bool, default=False, help="the same as --precision fp16")
    train.add_argument("--fp16_scale_growth", type=float, default=1e-3, help="log2 of the loss scale's growth per step")
    train.add_argument("--seed", type=int, default=0, help="of data order, weights and noise")

    guard = parser.add_argument_group("guardian")
    guard.add_argument("--max_bad_steps", type=int, default=10, help="stop after so many non-finite steps in a row")
    guard.add_argument("--spike_zscore", type=float, default=6.0, help="report losses so far above the recent mean")
    guard.add_argument("--rollback_on_spike", type=int, default=0, help="go back to the last checkpoint, so many times")

    look = parser.add_argument_group("evaluation on the way")
    look.add_argument("--eval_interval", type=int, default=0, help="steps between evaluations of the EMA; 0: none")
    look.add_argument("--eval_samples", type=int, default=1000, help="images to draw for each")
    look.add_argument("--eval_reference", default="", help="npz to compare them with, as for evaluations/evaluator.py")

    files = parser.add_argument_group("files")
    files.add_argument("--log_dir", help="None: $OPENAI_LOGDIR, or output")
    files.add_argument("--keep", type=int, default=0, help="keep the newest so many checkpoints; 0: all")
    files.add_argument("--sample_interval", type=int, default=0, help="steps between EMA sample grids; 0: none")
    files.add_argument("--allow_config_change", type=str2bool, default=False, help="resume with other flags")
    files.add_argument("--log_interval", type=int, default=100, help="steps between log lines")
    files.add_argument("--save_interval", type=int, default=10000, help="steps between checkpoints")
    files.add_argument(
        "--resume_checkpoint", default="auto", help="auto: the newest of log_dir; a file; or '' to start afresh"
    )


def model_config(args, first_stage, num_classes):
    """Name and options of the model that flags describe.

    :raises UserError: when the first stage cannot halve image_size down to the model's input.
    """
    if args.image_size % first_stage.downsample:
        raise UserError(f"image_size ({args.image_size}) must be a multiple of {first_stage.downsample}")
    options = {
        "input_size": args.image_size // first_stage.downsample,
        "in_channels": first_stage.channels,
        "num_classes": num_classes,
        "learn_sigma": args.learn_sigma,
    }
    given = {"mask_ratio": args.mask_ratio, "decode_layer": args.decode_layer}
    options |= {key: value for key, value in given.items() if value is not None}
    return {"name": args.model, "options": options}


def diffusion_config(args):
    """Options of `create_diffusion` that flags describe."""
    config = {
        "diffusion_steps": args.diffusion_steps,
        "noise_schedule": args.noise_schedule,
        "learn_sigma": args.learn_sigma,
        "sigma_small": args.sigma_small,
        "use_kl": args.use_kl,
        "predict_xstart": args.predict_xstart,
        "predict_v": args.predict_v,
        "rescale_learned_sigmas": args.rescale_learned_sigmas,
    }
    return config | {"snr_gamma": getattr(args, "snr_gamma", 5.0 if args.model.startswith("MDTv2") else None)}


# Flags that change what a run computes. Others, of speed and files, may change when it is resumed.
RUN_FLAGS = (
    "model image_size mask_ratio decode_layer num_classes vae diffusion_steps noise_schedule learn_sigma sigma_small "
    "use_kl predict_xstart predict_v rescale_learned_sigmas snr_gamma class_cond random_crop random_flip optimizer lr "
    "weight_decay grad_clip lr_anneal_steps ema_rate phema schedule_sampler precision use_fp16 exact_lengths seed "
    "global_batch"
)


def save_config(log_dir, config, allow_change=False):
    """Leave the configuration beside the checkpoints.

    :raises UserError: when the folder holds a run with another value of a flag that matters, unless changes are
        allowed; names the flag and both values.
    """
    file = Path(log_dir, CONFIG_NAME)
    before = {} if latest_step(log_dir) is None or not file.exists() else json.loads(file.read_text())
    for name in RUN_FLAGS.split():
        old, new = before.get("flags", {}).get(name), config["flags"].get(name)
        if before and old != new and not allow_change:
            raise UserError(
                f"--{name} was {old} when {log_dir} was begun, now it is {new}: repeat it, "
                "choose another --log_dir, or say --allow_config_change True"
            )
    if dist_util.is_main():
        write_json(Path(log_dir, CONFIG_NAME), config)


def create_model_and_diffusion(config):
    """The model and the diffusion of a configuration."""
    return create_model(config["model"]["name"], **config["model"]["options"]), create_diffusion(**config["diffusion"])


# ---------------------------------------------------------------- how a script ends


def run(main: Callable[[], None]) -> None:
    """Run an entry point to its end.

    What the user can mend (`UserError`) is printed as one sentence, once over all ranks, with exit code 2, and torchrun
    does not start the job again for it. Ctrl-C ends with code 130 and no traceback. Everything else is a fault of the
    program: its traceback is printed, and kept in log.txt.
    """
    try:
        main()
    except UserError as error:
        _keep_traceback()
        key = "error " + hashlib.sha256(str(error).encode()).hexdigest()
        if dist_util.is_first_of_node(key):
            if dist_util.is_first(key):
                print(f"error: {error or type(error).__name__}", file=sys.stderr, flush=True)
            dist_util.end_restarts()  # after the message: torchrun then ends the others
        sys.exit(2)
    except KeyboardInterrupt:
        if dist_util.is_main():
            print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception:
        _keep_traceback()
        raise
    finally:
        dist_util.cleanup()


def _keep_traceback() -> None:
    if logger.get_dir() and dist_util.is_main():
        with suppress(OSError), Path(logger.get_dir(), "log.txt").open("a") as file:
            file.write(traceback.format_exc())
