"""Mixed precision: the number format of the network. Weights, losses and the diffusion itself stay float32.

`layers.blocks` says which part of the network computes in which format.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from .errors import UserError

PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS_OR_AUTO = (*PRECISIONS, "auto")  # choices of a flag that `choose_precision` reads
CPU_FLAGS = Path("/proc/cpuinfo")
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # as Linux calls the instructions of x86 and ARM processors
WORTHWHILE = 1.2  # how much faster than fp32 a matrix product in bf16 must be


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a format that the device does not support.

    :raises UserError: for a format that is unknown or not supported.
    """
    if precision not in PRECISIONS:
        raise UserError(f"--precision is {precision!r}: choose one of {', '.join(PRECISIONS)}")
    if precision in ("fp16", "tf32") and device.type != "cuda":
        raise UserError(f"--precision {precision} needs a GPU: on a {device.type.upper()} choose fp32 or bf16")


def choose_precision(precision: str, device: torch.device) -> str:
    """The number format that `precision` stands for: `auto` is bf16 where the device computes it faster, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if computes_bf16(device.type) else "fp32"


@cache
def computes_bf16(device_type: str) -> bool:
    """Whether a device computes bf16 in hardware, and a CPU faster than fp32. Measured once in a process, in 50 ms."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_has_bf16() is not False and bf16_speedup() >= WORTHWHILE


@cache
def cpu_has_bf16() -> bool | None:
    """Whether the processor has instructions for bf16; None where the system does not tell, as outside of Linux."""
    if not CPU_FLAGS.exists():
        return None
    words = {word for line in CPU_FLAGS.read_text().splitlines() for word in line.partition(":")[2].split()}
    return bool(words & BF16_FLAGS)


def bf16_speedup(size: int = 512) -> float:
    """How many times faster than in fp32 the CPU multiplies square matrices in bf16.

    The instructions alone do not tell: a Xeon of 2023 without AMX has some, and takes twice as long as in fp32.
    """

    def seconds(a: torch.Tensor) -> float:
        start = time.perf_counter()
        a @ a
        return time.perf_counter() - start

    matrices = [torch.ones(size, size, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    times = [[seconds(a) for a in matrices] for _ in range(8)]  # in turns; the first ones prepare
    fp32, bf16 = (min(column) for column in zip(*times, strict=True))
    return fp32 / bf16


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


@contextmanager
def cast_weights(model: nn.Module, precision: str) -> Iterator[None]:
    """Within the block, the linear layers and convolutions of `model` have their weights in `precision`, cast once.

    For all of a training step's forward and backward passes: autocast by itself casts every weight again in each pass
    and microbatch, in compiled blocks, and where activations are recomputed. Gradients reach the weights themselves,
    in float32, through the cast; those of both passes are summed before it. Sharded weights (FSDP) are left to
    autocast, since a rank has them only while a block runs. `fp32` and `tf32` change nothing.
    """
    dtype, kinds = PRECISIONS[precision], nn.Linear | nn.Conv2d
    layers = [module for module in model.modules() if isinstance(module, kinds)] if dtype is not None else []
    own = [dict(layer._parameters) for layer in layers]
    try:
        for layer in layers:
            for name, weight in layer._parameters.items():
                if type(weight) is nn.Parameter:
                    layer._parameters[name] = weight.to(dtype)
        yield
    finally:
        for layer, weights in zip(layers, own, strict=True):
            layer._parameters.update(weights)


def check_fp16(use_fp16: bool, precision: str) -> None:
    """Refuse two number formats at once.

    :raises UserError: for `--use_fp16 True` with a `--precision` that names another one.
    """
    if use_fp16 and precision not in ("fp32", "fp16", "auto"):
        raise UserError(f"--use_fp16 True and --precision {precision} contradict each other: leave one out")
