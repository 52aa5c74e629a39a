"""Number formats of the network's arithmetic; weights, losses and the diffusion's own arithmetic stay float32."""

from collections.abc import Callable

import torch

from .errors import UserError

PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a format that the device does not train or sample in.

    :raises UserError: for a format that is unknown, or not to be had on the device.
    """
    if precision not in PRECISIONS:
        raise UserError(f"--precision is {precision!r}: choose one of {', '.join(PRECISIONS)}")
    if precision in ("fp16", "tf32") and device.type != "cuda":
        raise UserError(f"--precision {precision} needs a GPU: on a {device.type.upper()} choose fp32 or bf16")


def set_matmul_precision(precision: str) -> None:
    """Let float32 matrix products of this process run in TF32 for `tf32`, and in full float32 otherwise."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def autocast(model: Callable, precision: str) -> Callable:
    """`model` as a function that computes in `precision` and returns the format of its first argument."""
    dtype = PRECISIONS[precision]
    if dtype is None:
        return model

    def run(x, *args, **kwargs):
        with torch.autocast(x.device.type, dtype):
            out = model(x, *args, **kwargs)
        return out.to(x.dtype)

    return run
