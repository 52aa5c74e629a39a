"""What the scripts of ADM, DiT and MDT import, and nothing else here needs.

The names are found where those scripts look for them: in `masked_diffusion`, `script_util` and `train_util`.
`docs/adm_dit_mdt.md` tells what differs.
"""

import argparse

import blobfile as bf

from . import logger

NUM_CLASSES = 1000  # of ImageNet; the label of the null class of a model trained on it

# Options without a value by default whose type cannot be seen from it.
_NUMBERS = {"mask_ratio": float, "decode_layer": int}


def diffusion_defaults() -> dict:
    """Options of `create_diffusion` with MDT's defaults."""
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


def model_and_diffusion_defaults() -> dict:
    """MDT's options of a model, and those of `diffusion_defaults`; `decode_layer` None is the paper's number."""
    model = {"image_size": 256, "mask_ratio": None, "decode_layer": None, "class_cond": True, "use_fp16": False}
    return model | diffusion_defaults()


def str2bool(v: str | bool) -> bool:
    """`True` or `False` in the spellings of the published scripts.

    :raises argparse.ArgumentTypeError: for any other text.
    """
    if isinstance(v, bool):
        return v
    if v.lower() in ("true", "t", "yes", "y", "1"):
        return True
    if v.lower() in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{v!r} is neither True nor False")


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: dict) -> None:
    """A flag for every entry, of its default's type; None is a string, but for `mask_ratio` and `decode_layer`."""
    for name, default in default_dict.items():
        kind = _NUMBERS.get(name, str) if default is None else str2bool if isinstance(default, bool) else type(default)
        parser.add_argument(f"--{name}", default=default, type=kind)


def args_to_dict(args: argparse.Namespace, keys) -> dict:
    """The named attributes of parsed flags."""
    return {key: getattr(args, key) for key in keys}


def parse_resume_step_from_filename(filename: str) -> int:
    """The step in a name such as `log/model000100.pt`; 0 for a name without one.

    `weights.checkpoint.parse_step` refuses such a name instead, and training asks that one.
    """
    _, model, rest = str(filename).rpartition("model")
    digits = rest.partition(".")[0]
    return int(digits) if model and digits.isdecimal() else 0


def get_blob_logdir() -> str | None:
    """The directory that checkpoints go to: the logger's."""
    return logger.get_dir()


def find_resume_checkpoint() -> None:
    """None, as published: a hook for clusters. Here `image_train.py` finds the newest checkpoint of its directory."""


def find_ema_checkpoint(main_checkpoint: str | None, step: int, rate: float | str) -> str | None:
    """The EMA's file beside a `model{step}.pt`, or None where there is none."""
    if main_checkpoint is None:
        return None
    path = bf.join(bf.dirname(main_checkpoint), f"ema_{rate}_{step:06d}.pt")
    return path if bf.exists(path) else None


def log_loss_dict(diffusion, ts, losses: dict) -> None:
    """Log the mean of every loss, and the means of the four quarters of the timesteps.

    :param ts: (N,) int64 timesteps in [0, diffusion.num_timesteps).
    :param losses: dict of (N,) tensors.
    """
    for key, values in losses.items():
        logger.logkv_mean(key, values.mean().item())
        for t, value in zip(ts.tolist(), values.tolist(), strict=True):
            logger.logkv_mean(f"{key}_q{4 * t // diffusion.num_timesteps}", value)
