"""Optimizers, exponential moving averages and the learning rate."""

import torch

from ..config import OPTIMIZERS
from ..utils.errors import UserError


def create_optimizer(name, params, lr, weight_decay=0.0):
    """Make an optimizer by name.

    :param name: `adan` (timm's, which steps as the authors' does; betas .98 .92 .99, eps 1e-8), `adan-pytorch` (the
        package of that name, whose first step differs), or `adamw` (for MDT and DiT).
    :raises UserError: for any other name.
    """
    if name == "adan":
        from timm.optim import Adan

        return Adan(params, lr=lr, betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=weight_decay)
    if name == "adan-pytorch":
        from adan_pytorch import Adan

        # The package counts its betas from the other end: its b is 1 - b of the paper.
        return Adan(params, lr=lr, betas=(0.02, 0.08, 0.01), eps=1e-8, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)
    raise UserError(f"optimizer is {name!r}: choose one of {', '.join(OPTIMIZERS)}")


def default_grad_clip(name: str) -> float:
    """The global gradient norm that training clips to: Adan is trained with 1, AdamW without clipping (0)."""
    return 0.0 if name == "adamw" else 1.0


def annealed_lr(lr, step, anneal_steps):
    """`lr`, or with anneal_steps > 0 a straight line from `lr` to 0 at that step."""
    return lr * max(0.0, 1 - step / anneal_steps) if anneal_steps else lr


@torch.no_grad()
def update_ema(target_params, source_params, rate=0.99):
    """target <- rate * target + (1 - rate) * source, over lists of tensors."""
    torch._foreach_lerp_(list(target_params), [p.detach() for p in source_params], 1 - rate)
