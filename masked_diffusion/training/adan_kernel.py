"""Adan as one Triton kernel: a single pass over the memory of all parameters, their state and their averages."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
PROGRAMS = 64  # per tensor: enough to keep a GPU busy with the largest ones, and few to waste on small ones


def update_all(
    rows: list[list[Tensor]], settings: dict[str, float], grad_factor: Tensor | None, weights: list[float]
) -> None:
    """What `adan.adan_update` does, for all parameters in one launch.

    :param rows: parameter, gradient, the four tensors of the state and the averages of each parameter: contiguous,
        float32, on one device.
    :param settings: from `adan._settings`.
    :param weights: one for each average, 1 - rate.
    """
    device = rows[0][0].device
    numel_and_addresses = [[row[0].numel(), *(tensor.data_ptr() for tensor in row)] for row in rows]
    table = _to_device(torch.tensor(numel_and_addresses), device)
    numbers = _to_device(torch.tensor(weights or [0.0]), device)
    factor = torch.ones((), device=device) if grad_factor is None else grad_factor
    betas = {name: settings[name] for name in ("beta1", "beta2", "beta3")}
    complements = [1 - beta for beta in betas.values()]  # in float64 here: in the kernel they would lose bits
    others = ("eps", "step_size", "step_size_diff", "bias_correction3_sqrt", "decay")
    _adan_kernel[(PROGRAMS, len(rows))](
        table,
        factor,
        numbers,
        betas["beta2"],
        betas["beta3"],
        *complements,
        *(settings[name] for name in others),
        NUM_AVERAGES=len(weights),
        BLOCK=BLOCK,
    )


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device for which the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@triton.jit
def _adan_kernel(
    table,
    factor_ptr,
    weights_ptr,
    beta2,
    beta3,
    one_minus_beta1,
    one_minus_beta2,
    one_minus_beta3,
    eps,
    step_size,
    step_size_diff,
    bias_correction3_sqrt,
    decay,
    NUM_AVERAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Row of the table: numbers of the tensor, then the addresses of parameter, gradient, state and averages.
    row = table + tl.program_id(1) * (7 + NUM_AVERAGES)
    numel = tl.load(row)
    param_ptr = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    grad_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    exp_avg_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    exp_avg_sq_ptr = tl.load(row + 4).to(tl.pointer_type(tl.float32))
    exp_avg_diff_ptr = tl.load(row + 5).to(tl.pointer_type(tl.float32))
    neg_pre_grad_ptr = tl.load(row + 6).to(tl.pointer_type(tl.float32))
    factor = tl.load(factor_ptr)
    zeros = tl.zeros((BLOCK,), tl.float32)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < numel:
        at = start + tl.arange(0, BLOCK)
        inside = at < numel
        grad = tl.load(grad_ptr + at, mask=inside) * factor
        diff = tl.load(neg_pre_grad_ptr + at, mask=inside) + grad
        exp_avg = tl.load(exp_avg_ptr + at, mask=inside)
        exp_avg += one_minus_beta1 * (grad - exp_avg)
        exp_avg_diff = tl.load(exp_avg_diff_ptr + at, mask=inside) * beta2 + one_minus_beta2 * diff
        look_ahead = diff * beta2 + grad
        exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=inside) * beta3 + one_minus_beta3 * look_ahead * look_ahead
        denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), zeros + bias_correction3_sqrt) + eps
        param = tl.load(param_ptr + at, mask=inside)
        param -= tl.div_rn(step_size * exp_avg, denominator)
        param -= tl.div_rn(step_size_diff * exp_avg_diff, denominator)
        param = tl.div_rn(param, zeros + decay)
        tl.store(param_ptr + at, param, mask=inside)
        tl.store(exp_avg_ptr + at, exp_avg, mask=inside)
        tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=inside)
        tl.store(exp_avg_diff_ptr + at, exp_avg_diff, mask=inside)
        tl.store(neg_pre_grad_ptr + at, 0.0 - grad, mask=inside)
        for i in tl.static_range(NUM_AVERAGES):
            average_ptr = tl.load(row + 7 + i).to(tl.pointer_type(tl.float32))
            average = tl.load(average_ptr + at, mask=inside)
            average += tl.load(weights_ptr + i) * (param - average)
            tl.store(average_ptr + at, average, mask=inside)
        start += stride
