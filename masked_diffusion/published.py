"""Functions that scripts written for ADM, DiT or MDT import, and that nothing else in this package needs.

Such scripts import them from `masked_diffusion`, `script_util` or `train_util`. `docs/adm_dit_mdt.md` lists the
differences from the published functions.
"""

import argparse
from collections.abc import Iterable
from typing import Any

import blobfile as bf
from torch import Tensor

from . import logger
from .forward_process import ForwardProcess

NUM_CLASSES = 1000  # of ImageNet; also the null label of a model trained on ImageNet

# The types of options whose default is None.
_NUMBERS = {"mask_ratio": float, "decode_layer": int}


def diffusion_defaults() -> dict[str, Any]:
    """The options of `create_diffusion` that MDT has, with its defaults."""
    return {
        "learn_sigma": True,
        "diffusion_steps": 1000,
        "noise_schedule": "linear",
        "timestep_respacing": "",
        "use_kl": False,
        "predict_xstart": False,
        "sigma_small": False,
        "rescale_learned_sigmas": False,
    }


def adm_diffusion_defaults() -> dict[str, Any]:
    """The flags of the diffusion that ADM's `script_util` has, with its defaults."""
    options = diffusion_defaults() | {"learn_sigma": False, "rescale_timesteps": False}
    del options["sigma_small"]
    return options


def model_and_diffusion_defaults() -> dict[str, Any]:
    """MDT's options of the model and of the diffusion. `decode_layer` None means the number in the paper."""
    model = {"image_size": 256, "mask_ratio": None, "decode_layer": None, "class_cond": True, "use_fp16": False}
    return model | diffusion_defaults()


def str2bool(v: str | bool) -> bool:
    """Parse `True` or `False`, in all spellings that the published scripts take.

    :raises argparse.ArgumentTypeError: for any other text.
    """
    if isinstance(v, bool):
        return v
    if v.lower() in ("true", "t", "yes", "y", "1"):
        return True
    if v.lower() in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{v!r} is neither True nor False")


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: dict[str, Any]) -> None:
    """Add a flag for every entry, with the type of its default.

    A flag whose default is None takes a string, except for `mask_ratio` (float) and `decode_layer` (int).
    """
    for name, default in default_dict.items():
        kind = _NUMBERS.get(name, str) if default is None else str2bool if isinstance(default, bool) else type(default)
        parser.add_argument(f"--{name}", default=default, type=kind)


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """The named flags and their values."""
    return {key: getattr(args, key) for key in keys}


def parse_resume_step_from_filename(filename: str) -> int:
    """The step in a file name such as `log/model000100.pt`; 0 for a name without a step.

    Training uses `weights.checkpoint.parse_step`, which refuses a name without a step.
    """
    _, model, rest = str(filename).rpartition("model")
    digits = rest.partition(".")[0]
    return int(digits) if model and digits.isdecimal() else 0


def get_blob_logdir() -> str | None:
    """The log directory, which is also the directory of the checkpoints; None before `logger.configure`."""
    return logger.get_dir()


def find_resume_checkpoint() -> None:
    """Return None, as the published function does. `image_train.py` finds the newest checkpoint in another way."""


def find_ema_checkpoint(main_checkpoint: str | None, step: int, rate: float | str) -> str | None:
    """The path of the EMA weights in the directory of `main_checkpoint`, or None if there is no such file."""
    if main_checkpoint is None:
        return None
    path = bf.join(bf.dirname(main_checkpoint), f"ema_{rate}_{step:06d}.pt")
    return path if bf.exists(path) else None


def log_loss_dict(diffusion: ForwardProcess, ts: Tensor, losses: dict[str, Tensor]) -> None:
    """Log the mean of every loss, and its means over each quarter of the timesteps.

    :param ts: (N,) int64 timesteps in [0, diffusion.num_timesteps).
    :param losses: dict of (N,) tensors.
    """
    for key, values in losses.items():
        logger.logkv_mean(key, values.mean().item())
        for t, value in zip(ts.tolist(), values.tolist(), strict=True):
            logger.logkv_mean(f"{key}_q{4 * t // diffusion.num_timesteps}", value)
