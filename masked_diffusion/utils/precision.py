"""Mixed precision: the number format of the network. Weights, losses and the diffusion itself stay float32."""

from collections.abc import Callable
from typing import Any

import torch

from .errors import UserError

PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a format that the device does not support.

    :raises UserError: for a format that is unknown or not supported.
    """
    if precision not in PRECISIONS:
        raise UserError(f"--precision is {precision!r}: choose one of {', '.join(PRECISIONS)}")
    if precision in ("fp16", "tf32") and device.type != "cuda":
        raise UserError(f"--precision {precision} needs a GPU: on a {device.type.upper()} choose fp32 or bf16")


def set_matmul_precision(precision: str) -> None:
    """Compute the float32 matrix products of this process in TF32 for `tf32`, and in full float32 otherwise."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def autocast(model: Callable, precision: str) -> Callable:
    """Wrap `model` so that it computes in `precision`; its output has the dtype of its first argument."""
    dtype = PRECISIONS[precision]
    if dtype is None:
        return model

    def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.autocast(x.device.type, dtype):
            out = model(x, *args, **kwargs)
        return out.to(x.dtype)

    return run


def check_fp16(use_fp16: bool, precision: str) -> None:
    """Refuse two number formats at once.

    :raises UserError: for `--use_fp16 True` with a `--precision` that is neither fp16 nor the default.
    """
    if use_fp16 and precision not in ("fp32", "fp16"):
        raise UserError(f"--use_fp16 True and --precision {precision} contradict each other: leave one out")
