"""Optimizers, exponential moving averages and the learning rate."""

from collections.abc import Iterable

import torch

from ..config import OPTIMIZERS
from ..utils.errors import UserError
from .adan import Adan, local_shard


def create_optimizer(
    name: str, params: Iterable[torch.nn.Parameter], lr: float, weight_decay: float = 0.0, compile: bool = False
) -> torch.optim.Optimizer:
    """Create an optimizer by name.

    :param name: `adan` (the authors' optimizer; betas .98 .92 .99, eps 1e-8), `adan-pytorch` (the package of that name,
        whose first step differs), or `adamw` (for MDT and DiT).
    :param compile: see `Adan`; the others have no such option.
    :raises UserError: for any other name.
    """
    if name == "adan":
        return Adan(params, lr, (0.98, 0.92, 0.99), 1e-8, weight_decay, compile)
    if name == "adan-pytorch":
        from adan_pytorch import Adan as AdanPytorch

        # This package defines each beta as 1 - beta of the paper.
        return AdanPytorch(params, lr=lr, betas=(0.02, 0.08, 0.01), eps=1e-8, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)
    raise UserError(f"optimizer is {name!r}: choose one of {', '.join(OPTIMIZERS)}")


def default_grad_clip(name: str) -> float:
    """The global gradient norm to clip to by default: 1 for Adan; 0, which means no clipping, for AdamW."""
    return 0.0 if name == "adamw" else 1.0


def clip_gradients(
    optimizer: torch.optim.Optimizer, params: Iterable[torch.nn.Parameter], norm: torch.Tensor, max_norm: float
) -> dict[str, torch.Tensor]:
    """Clip the gradients for the next step of the optimizer, which may be sharded with ZeRO-1.

    :param norm: () their global norm. :param max_norm: 0 for no clipping.
    :return: options of `optimizer.step`: `Adan` scales the gradients itself, in its one pass over memory.
    """
    if not max_norm:
        return {}
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # the formula of torch.nn.utils.clip_grad_norm_
    if isinstance(getattr(optimizer, "optim", optimizer), Adan):
        return {"grad_factor": factor}
    torch._foreach_mul_([local_shard(param.grad) for param in params if param.grad is not None], factor)
    return {}


def annealed_lr(lr: float, step: int, anneal_steps: int) -> float:
    """The learning rate at a step: constant, or with anneal_steps > 0 falling linearly from `lr` to 0 at that step."""
    return lr * max(0.0, 1 - step / anneal_steps) if anneal_steps else lr


@torch.no_grad()
def update_ema(
    target_params: Iterable[torch.Tensor], source_params: Iterable[torch.Tensor], rate: float = 0.99
) -> None:
    """target <- rate * target + (1 - rate) * source, in place, over lists of tensors."""
    torch._foreach_lerp_(list(target_params), [p.detach() for p in source_params], 1 - rate)
