"""Embeddings of positions, timesteps and labels."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn as nn

from ..utils.errors import UserError

Draw = Callable[..., torch.Tensor]  # draws random numbers, called like torch.rand

# ---------------------------------------------------------------- images


class PatchEmbed(nn.Module):
    """A token for every square patch of an image: a convolution that moves by the size of its kernel.

    Names are those of timm's `PatchEmbed`, whose import would double the time that a script takes to start.
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.img_size, self.patch_size = (img_size, img_size), (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """:param x: (N, in_chans, img_size, img_size). :return: (N, num_patches, embed_dim), row by row."""
        return self.proj(x).flatten(2).transpose(1, 2)


# ---------------------------------------------------------------- positions


def get_1d_sincos_pos_embed_from_grid(embed_dim: int, pos: np.ndarray) -> np.ndarray:
    """Sine-then-cosine embedding of coordinates, base 10000.

    :param embed_dim: width, an even number. :param pos: M coordinates, in an array of any shape.
    :return: (M, embed_dim) float64.
    """
    omega = 10000.0 ** -(np.arange(embed_dim // 2, dtype=np.float64) / (embed_dim // 2))
    angles = np.asarray(pos, dtype=np.float64).reshape(-1, 1) * omega
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def get_2d_sincos_pos_embed_from_grid(embed_dim: int, grid: np.ndarray) -> np.ndarray:
    """The embeddings of both coordinates, concatenated.

    :param embed_dim: width, a multiple of 4. :param grid: the first and the second coordinate, M numbers each.
    :return: (M, embed_dim) float64.
    :raises UserError: if embed_dim is not a multiple of 4.
    """
    if embed_dim % 4:
        raise UserError(f"hidden_size ({embed_dim}) must be a multiple of 4 for a 2-D sine-cosine position table")
    halves = [get_1d_sincos_pos_embed_from_grid(embed_dim // 2, coordinate) for coordinate in grid]
    return np.concatenate(halves, axis=1)


def get_2d_sincos_pos_embed(
    embed_dim: int, grid_size: int, cls_token: bool = False, extra_tokens: int = 0
) -> np.ndarray:
    """The 2-D sine-cosine position table of MAE for a square grid, row by row.

    The first half of the width belongs to the column coordinate, the second half to the row coordinate.

    :param cls_token: insert `extra_tokens` rows of zeros before the rows of the grid.
    :return: (grid_size**2, embed_dim) float64, or (extra_tokens + grid_size**2, embed_dim) with `cls_token`.
    """
    rows, columns = np.meshgrid(np.arange(grid_size), np.arange(grid_size), indexing="ij")
    table = get_2d_sincos_pos_embed_from_grid(embed_dim, np.stack([columns, rows]))
    return np.concatenate([np.zeros((extra_tokens, embed_dim)), table]) if cls_token else table


def sincos_pos_embed_2d(dim: int, grid_size: int) -> torch.Tensor:
    """`get_2d_sincos_pos_embed` as a tensor: (1, grid_size**2, dim) float32."""
    return torch.from_numpy(get_2d_sincos_pos_embed(dim, grid_size)).float()[None]


def add_positions(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Add a position table to tokens: the sum is float32, and bfloat16 tokens are rounded to bfloat16 again.

    :param x: (N, T, D) tokens. :param table: (1, T, D).
    :return: (N, T, D).
    """
    total = x + table
    return total.to(x.dtype) if x.dtype == torch.bfloat16 else total


# ---------------------------------------------------------------- timesteps


def timestep_embedding(t: torch.Tensor, dim: int, max_period: float = 10000) -> torch.Tensor:
    """Cosine-then-sine embedding of timesteps.

    :param t: (N,) timesteps, possibly fractional. :param dim: width; if it is odd, the last column is zero.
    :return: (N, dim) float32.
    """
    half = dim // 2
    # The exponent is float32, as when the released weights were trained. Its exponential is taken in float64: float32
    # kernels differ in the last bit of a frequency, which at t = 1000 changes the angle by 6e-5.
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    freqs = exponent.double().exp().float()
    angles = t[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin(), angles.new_zeros(len(t), dim % 2)], dim=1)


class TimestepEmbedder(nn.Module):
    """Embed timesteps: `timestep_embedding`, then a two-layer MLP."""

    timestep_embedding = staticmethod(timestep_embedding)

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256):
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """(N,) timesteps -> (N, D)."""
        return self.mlp(self.timestep_embedding(t, self.frequency_embedding_size).to(self.mlp[0].weight.dtype))


# ---------------------------------------------------------------- labels


class LabelEmbedder(nn.Module):
    """Embed labels, with an extra null class for label dropout and guidance.

    :param dropout_prob: probability of replacing a label by the null class in training.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        # As in DiT, there is a null class only with label dropout; here also for a model without classes.
        self.null_label = num_classes if dropout_prob > 0 or num_classes == 0 else None
        self.embedding_table = nn.Embedding(num_classes + (self.null_label is not None), hidden_size)
        self.num_classes, self.dropout_prob = num_classes, dropout_prob

    def draw_drop_ids(self, num_samples: int, device: torch.device, rand: Draw = torch.rand) -> torch.Tensor | None:
        """Draw the labels that a training step drops.

        :return: (num_samples,) bool, True = null class; None without label dropout.
        """
        if self.dropout_prob > 0:
            return rand(num_samples, device=device) < self.dropout_prob
        return None

    def token_drop(self, labels: torch.Tensor, force_drop_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Replace some labels by the null class.

        :param labels: (N,) int64. :param force_drop_ids: (N,), 1 or True = null class; None draws them.
        :return: (N,) int64.
        :raises UserError: for a model without a null class.
        """
        if force_drop_ids is None:
            force_drop_ids = self.draw_drop_ids(len(labels), labels.device)
        if self.null_label is None or force_drop_ids is None:
            raise UserError("labels cannot be dropped: this model was made with class_dropout_prob=0")
        return torch.where(force_drop_ids == 1, self.null_label, labels)

    def check_labels(self, labels: torch.Tensor) -> None:
        """Check that the table has a row for every label.

        Labels on a GPU are not checked: that would wait for the GPU, where a wrong label is an error in any case.

        :raises UserError: for a label outside the table.
        """
        if labels.device.type != "cpu" or torch.compiler.is_compiling() or not labels.numel():
            return
        low, high = (int(value) for value in labels.aminmax())
        last = self.embedding_table.num_embeddings - 1
        if low < 0 or high > last:
            null = "" if self.null_label is None else f", of which {self.null_label} is the null class"
            raise UserError(f"labels lie between {low} and {high}, but this model has rows 0 to {last}{null}")

    def forward(
        self, labels: torch.Tensor, train: bool | None = None, force_drop_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        :param labels: (N,) int64.
        :param train: apply label dropout; None applies it in training mode.
        :param force_drop_ids: (N,), 1 or True = null class; replaces the random choice of label dropout.
        :return: (N, D).
        :raises UserError: for labels outside the table (on the CPU only), and as `token_drop`.
        """
        self.check_labels(labels)
        train = self.training if train is None else train
        if force_drop_ids is not None or (train and self.dropout_prob > 0):
            labels = self.token_drop(labels, force_drop_ids)
        return self.embedding_table(labels)
