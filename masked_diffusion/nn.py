"""Helpers that scripts of ADM's users import from `nn`."""

import torch

from .diffusion_utils import mean_flat
from .layers.embeddings import timestep_embedding as _timestep_embedding
from .training.optim import update_ema
from .utils.not_rebuilt import module_getattr

__all__ = ["mean_flat", "timestep_embedding", "update_ema"]
__getattr__ = module_getattr(__name__)


def timestep_embedding(timesteps: torch.Tensor, dim: int, max_period: float = 10000) -> torch.Tensor:
    """`layers.embeddings.timestep_embedding`, with ADM's name for the first argument: (N,) -> (N, dim) float32."""
    return _timestep_embedding(timesteps, dim, max_period)
