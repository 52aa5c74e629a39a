"""Optimizers, exponential moving averages and the learning rate."""

from collections.abc import Iterable

import torch

from ..config import OPTIMIZERS
from ..utils.errors import UserError


def create_optimizer(
    name: str, params: Iterable[torch.nn.Parameter], lr: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Create an optimizer by name.

    :param name: `adan` (timm's, which matches the authors' optimizer; betas .98 .92 .99, eps 1e-8), `adan-pytorch` (the
        package of that name, whose first step differs), or `adamw` (for MDT and DiT).
    :raises UserError: for any other name.
    """
    if name == "adan":
        from timm.optim import Adan

        return Adan(params, lr=lr, betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=weight_decay)
    if name == "adan-pytorch":
        from adan_pytorch import Adan

        # This package defines each beta as 1 - beta of the paper.
        return Adan(params, lr=lr, betas=(0.02, 0.08, 0.01), eps=1e-8, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)
    raise UserError(f"optimizer is {name!r}: choose one of {', '.join(OPTIMIZERS)}")


def default_grad_clip(name: str) -> float:
    """The global gradient norm to clip to by default: 1 for Adan; 0, which means no clipping, for AdamW."""
    return 0.0 if name == "adamw" else 1.0


def annealed_lr(lr: float, step: int, anneal_steps: int) -> float:
    """The learning rate at a step: constant, or with anneal_steps > 0 falling linearly from `lr` to 0 at that step."""
    return lr * max(0.0, 1 - step / anneal_steps) if anneal_steps else lr


@torch.no_grad()
def update_ema(
    target_params: Iterable[torch.Tensor], source_params: Iterable[torch.Tensor], rate: float = 0.99
) -> None:
    """target <- rate * target + (1 - rate) * source, in place, over lists of tensors."""
    torch._foreach_lerp_(list(target_params), [p.detach() for p in source_params], 1 - rate)
