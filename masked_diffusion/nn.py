"""Helpers that scripts of ADM's users import from `nn`."""

from collections.abc import Iterable

import torch

from .diffusion_utils import mean_flat
from .layers.embeddings import timestep_embedding as _timestep_embedding
from .training.optim import update_ema as _update_ema
from .utils.not_rebuilt import module_getattr

__all__ = ["mean_flat", "timestep_embedding", "update_ema"]
__getattr__ = module_getattr(__name__)


def timestep_embedding(timesteps: torch.Tensor, dim: int, max_period: float = 10000) -> torch.Tensor:
    """`layers.embeddings.timestep_embedding`, with ADM's name for the first argument: (N,) -> (N, dim) float32."""
    return _timestep_embedding(timesteps, dim, max_period)


def update_ema(
    target_params: Iterable[torch.Tensor], source_params: Iterable[torch.Tensor], rate: float = 0.99
) -> None:
    """`training.optim.update_ema`, also where the number formats differ; the longer list's other tensors are left."""
    pairs = list(zip(target_params, source_params, strict=False))
    if pairs:
        _update_ema([target for target, _ in pairs], [source.to(target.dtype) for target, source in pairs], rate)
