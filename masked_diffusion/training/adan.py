"""Adan in one pass over memory, together with gradient clipping and the exponential moving averages of the weights."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .. import logger

Average = tuple[Sequence[Tensor], float]  # one tensor per parameter, and the rate of the average
# Numbers of each tensor that all operations work through before the next ones: on a CPU, so few that they stay in its
# caches; on a GPU, as many as temporary tensors may be large.
PIECE = {"cpu": 1 << 18, "cuda": 1 << 23}
FIXED = ("beta1", "beta2", "beta3", "eps")
CHANGING = ("step_size", "step_size_diff", "bias_correction3_sqrt", "decay")
STATE = ("exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad")


class Adan(torch.optim.Optimizer):
    """Adan (Xie et al. 2022, "Adan: Adaptive Nesterov Momentum Algorithm", algorithm 1), as the authors' code has it.

    Numbers and state dict are those of timm's `Adan`: either class loads the other's state.

    :param compile: compile the update with torch.compile where the weights are on a CPU. It runs twice as fast, and
        rounds differently in the last bit. Without a compiler, or for tensors that are not contiguous, the update runs
        uncompiled.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        compile: bool = False,
    ) -> None:
        # The last three are settings of timm's class, which has other rules beside the authors'.
        unused = {"no_prox": False, "caution": False, "foreach": None}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay} | unused)
        self.compile = compile

    @torch.no_grad()
    def step(
        self, closure: Any = None, grad_factor: Tensor | None = None, averages: Sequence[Average] = ()
    ) -> Tensor | None:
        """Update the weights.

        :param closure: computes the loss again, as in every optimizer of PyTorch.
        :param grad_factor: () float32; multiplies the gradients first, which is how they are clipped. The `.grad` of
            the parameters is undefined after the step.
        :param averages: moves each average towards the new weights: average <- rate * average + (1 - rate) * weight.
            It has one tensor per parameter of all groups, in their order.
        :return: what `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        weights, first = [1 - rate for _, rate in averages], 0
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            rows, still = [], []
            for i, param in enumerate(group["params"], first):
                own = [local_shard(tensors[i]) for tensors, _ in averages]
                if param.grad is None:
                    still.append((local_shard(param), own))
                else:
                    state = self._state(param, group["step"], grad_factor)
                    rows.append([*map(local_shard, (param, param.grad, *state)), *own])
            first += len(group["params"])
            if rows:
                _update(rows, _settings(group), grad_factor, weights, self.compile)
            for param, own in still:  # a weight without a gradient has an average all the same
                for average, weight in zip(own, weights, strict=True):
                    average.lerp_(param, weight)
        return loss

    def _state(self, param: Tensor, step: int, grad_factor: Tensor | None) -> list[Tensor]:
        state = self.state[param]
        if not state:
            state |= {key: torch.zeros_like(param) for key in STATE[:-1]}
        if "neg_pre_grad" not in state or step == 1:
            # There is no gradient before the first: its difference is zero.
            state["neg_pre_grad"] = -param.grad
            if grad_factor is not None:
                local_shard(state["neg_pre_grad"]).mul_(grad_factor)
        return [state[key] for key in STATE]


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _settings(group: dict[str, Any]) -> dict[str, float]:
    """The numbers of one step."""
    (beta1, beta2, beta3), lr, step = group["betas"], group["lr"], group["step"]
    return {
        "beta1": beta1,
        "beta2": beta2,
        "beta3": beta3,
        "eps": group["eps"],
        "step_size": lr / (1 - beta1**step),
        "step_size_diff": lr * beta2 / (1 - beta2**step),
        "bias_correction3_sqrt": (1 - beta3**step) ** 0.5,
        "decay": 1 + lr * group["weight_decay"],
    }


def _update(
    rows: list[list[Tensor]],
    settings: dict[str, float],
    grad_factor: Tensor | None,
    weights: list[float],
    compiled: bool,
) -> None:
    """Update all parameters of a group in the fastest way that their device has.

    :param rows: parameter, gradient, state and averages of each parameter.
    """
    device = rows[0][0].device
    rows = [row for row in rows if row[0].numel()]  # with FSDP, a rank can have nothing of a small parameter
    if all(tensor.is_contiguous() and tensor.dtype == torch.float32 for row in rows for tensor in row):
        if device.type == "cuda" and (kernel := _kernel(device)) is not None:
            kernel(rows, settings, grad_factor, weights)
            return
        if device.type == "cpu" and compiled and (one_pass := _compiled(len(weights))) is not None:
            factor = torch.ones(()) if grad_factor is None else grad_factor
            numbers = torch.tensor([settings[name] for name in CHANGING] + weights)
            for row in rows:
                one_pass(
                    [tensor.detach().view(-1) for tensor in row], factor, numbers, *(settings[name] for name in FIXED)
                )
            return
    for params, grads, *state_and_averages in _pieces(rows, PIECE.get(device.type, PIECE["cuda"])):
        state, averages = state_and_averages[: len(STATE)], state_and_averages[len(STATE) :]
        adan_update(params, grads, *state, averages, grad_factor, weights, **settings)


def _pieces(rows: Iterable[list[Tensor]], limit: int) -> Iterator[tuple[list[Tensor], ...]]:
    """Walk through all tensors in step. Yields lists of flat views, one list per column of `rows`.

    The views of a list have `limit` numbers together, or fewer. What is not contiguous comes whole.
    """
    piece, size = [], 0
    for row in rows:
        if all(tensor.is_contiguous() for tensor in row):
            parts = zip(*(tensor.view(-1).split(limit) for tensor in row), strict=True)
        else:
            parts = [row]
        for part in parts:
            if piece and size + part[0].numel() > limit:
                yield tuple(map(list, zip(*piece, strict=True)))
                piece, size = [], 0
            piece.append(part)
            size += part[0].numel()
    if piece:
        yield tuple(map(list, zip(*piece, strict=True)))


def adan_update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_diffs: list[Tensor],
    neg_pre_grads: list[Tensor],
    averages: list[list[Tensor]],
    grad_factor: Tensor | None,
    weights: list[float],
    *,
    beta1: float,
    beta2: float,
    beta3: float,
    eps: float,
    step_size: float,
    step_size_diff: float,
    bias_correction3_sqrt: float,
    decay: float,
) -> None:
    """One step of Adan on lists of tensors, in place.

    The order of the operations is the authors', so that the results are theirs to the last bit.

    :param neg_pre_grads: minus the gradients of the step before.
    :param averages: one list for each of `weights`, which are 1 - rate.
    :param step_size, step_size_diff, bias_correction3_sqrt: with the corrections of the bias towards zero.
    :param decay: 1 + lr * weight_decay.
    """
    if grad_factor is not None:
        torch._foreach_mul_(grads, grad_factor)
    torch._foreach_add_(neg_pre_grads, grads)  # g_k - g_{k-1}
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)  # m_k
    torch._foreach_mul_(exp_avg_diffs, beta2)
    torch._foreach_add_(exp_avg_diffs, neg_pre_grads, alpha=1 - beta2)  # v_k
    torch._foreach_mul_(neg_pre_grads, beta2)
    torch._foreach_add_(neg_pre_grads, grads)  # g_k + beta2 (g_k - g_{k-1})
    torch._foreach_mul_(exp_avg_sqs, beta3)
    torch._foreach_addcmul_(exp_avg_sqs, neg_pre_grads, neg_pre_grads, value=1 - beta3)  # n_k
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, bias_correction3_sqrt)
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(params, exp_avgs, denominators, value=-step_size)
    torch._foreach_addcdiv_(params, exp_avg_diffs, denominators, value=-step_size_diff)
    if decay != 1:
        torch._foreach_div_(params, decay)
    torch._foreach_zero_(neg_pre_grads)
    torch._foreach_sub_(neg_pre_grads, grads)  # for the next step
    for average, weight in zip(averages, weights, strict=True):
        torch._foreach_lerp_(average, params, weight)


def _one_pass(
    tensors: list[Tensor], grad_factor: Tensor, numbers: Tensor, beta1: float, beta2: float, beta3: float, eps: float
) -> None:
    """`adan_update` of one flat parameter as expressions that a compiler can fuse.

    :param tensors: a row of `_update`. :param numbers: those of `CHANGING`, then the weights of the averages; in a
        tensor, as code would be compiled again for every float that changes.
    """
    param, grad, exp_avg, exp_avg_sq, exp_avg_diff, neg_pre_grad, *averages = tensors
    step_size, step_size_diff, bias_correction3_sqrt, decay, *weights = numbers.unbind()
    grad = grad * grad_factor
    diff = neg_pre_grad + grad
    exp_avg.add_((grad - exp_avg) * (1 - beta1))
    exp_avg_diff.mul_(beta2).add_(diff * (1 - beta2))
    look_ahead = diff * beta2 + grad
    exp_avg_sq.mul_(beta3).add_(look_ahead * look_ahead * (1 - beta3))
    denominator = exp_avg_sq.sqrt() / bias_correction3_sqrt + eps
    param.sub_(step_size * exp_avg / denominator).sub_(step_size_diff * exp_avg_diff / denominator).div_(decay)
    neg_pre_grad.copy_(-grad)
    for average, weight in zip(averages, weights, strict=True):
        average.add_((param - average) * weight)


def _trial(num_averages: int, device: torch.device) -> list[Tensor]:
    return [torch.zeros(64, device=device) for _ in range(6 + num_averages)]


@cache
def _compiled(num_averages: int) -> Any:
    """`_one_pass` compiled for tensors of any length, or None where that fails."""
    one_pass = torch.compile(_one_pass, dynamic=True, fullgraph=True)
    numbers = torch.ones(len(CHANGING) + num_averages)
    try:
        one_pass(_trial(num_averages, torch.device("cpu")), torch.ones(()), numbers, 0.98, 0.92, 0.99, 1e-8)
    except Exception as error:  # PyTorch has no one class for a compiler that is missing or fails
        _log_fallback("the optimizer is not compiled", error)
        return None
    return one_pass


@cache
def _kernel(device: torch.device) -> Any:
    """The Triton kernel that updates all parameters in one launch, or None where it cannot run."""
    try:
        from .adan_kernel import update_all

        update_all([_trial(1, device)], dict.fromkeys((*FIXED, *CHANGING), 1.0), None, [0.1])
    except Exception as error:  # Triton is missing, or the compiler that it needs: no one class either
        _log_fallback("the optimizer runs without its Triton kernel", error)
        return None
    return update_all


def _log_fallback(what: str, error: Exception) -> None:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    logger.log(f"{what} and takes several passes over memory: {reason[:200]}")
