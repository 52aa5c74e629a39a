"""Embeddings of positions, timesteps and labels."""

import math

import torch
import torch.nn as nn

from ..utils.errors import UserError


def sincos_pos_embed_2d(dim, grid_size):
    """The 2-D sine-cosine position table of MAE (column coordinate first, base 10000, sine then cosine).

    :return: (1, grid_size**2, dim) float32.
    """
    if dim % 4:
        raise UserError(f"hidden_size ({dim}) must be a multiple of 4 for a 2-D sine-cosine position table")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid_size, dim / 2)
    cols = axis[None, :, :].expand(grid_size, -1, -1)
    rows = axis[:, None, :].expand(-1, grid_size, -1)
    return torch.cat([cols, rows], dim=2).reshape(1, grid_size**2, dim).float()


def timestep_embedding(t, dim, max_period=10000):
    """Cosine-then-sine embedding of (N,) possibly fractional timesteps. Returns (N, dim) float32; dim is even."""
    half = dim // 2
    # The exponent is rounded to float32, as it was when the released weights were trained, and its exponential is
    # not: at t = 1000 one unit in the last place of a frequency, where kernels differ, moves the angle by 6e-5.
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    freqs = exponent.double().exp().float()
    angles = t[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedder(nn.Module):
    """(N,) timesteps -> (N, D)."""

    def __init__(self, hidden_size, frequency_embedding_size=256):
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t):
        return self.mlp(timestep_embedding(t, self.frequency_embedding_size).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """(N,) labels -> (N, D), with one extra row, the null class, for label dropout and guidance."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        # DiT adds the null row only where labels are ever dropped.
        self.null_label = num_classes if dropout_prob > 0 or num_classes == 0 else None
        self.embedding_table = nn.Embedding(num_classes + (self.null_label is not None), hidden_size)
        self.dropout_prob = dropout_prob

    def draw_dropped(self, num_samples, device, rand=torch.rand):
        """(num_samples,) bool: which labels a training step drops; None for an embedder that drops none."""
        if self.dropout_prob > 0:
            return rand(num_samples, device=device) < self.dropout_prob

    def forward(self, labels, dropped=None):
        """
        :param labels: (N,) int64. :param dropped: (N,) bool, True = null class; drawn in training mode if None.
        """
        if dropped is None and self.training:
            dropped = self.draw_dropped(len(labels), labels.device)
        if dropped is not None:
            labels = torch.where(dropped, self.null_label, labels)
        return self.embedding_table(labels)
