"""Multi-head self-attention with an optional learned relative position bias."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..utils.errors import UserError

UNREAD_ROWS = 3  # at the end of each bias table; nothing reads them, but the published checkpoints have them


def relative_position_index(height: int, width: int) -> torch.Tensor:
    """The row of the bias table for every ordered pair of tokens on a (height, width) grid.

    :return: (T, T) int64 with T = height * width; entry (i, j) is the row for the offset from token j to token i.
    """
    rows = torch.arange(height).repeat_interleave(width)
    cols = torch.arange(width).repeat(height)
    row_offset = rows[:, None] - rows[None, :] + height - 1
    col_offset = cols[:, None] - cols[None, :] + width - 1
    return row_offset * (2 * width - 1) + col_offset


def gather_pairs(index: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
    """Restrict a pairwise table to the kept tokens of each sample.

    :param index: (T, T) table over all ordered pairs.
    :param ids_keep: (N, K) positions of the kept tokens.
    :return: (N, K, K) table over the kept pairs.
    """
    return index[ids_keep[:, :, None], ids_keep[:, None, :]]


class RelativePositionBias(nn.Module):
    """A learned bias of the attention logits, for each head and each 2-D offset between two tokens.

    :param window_size: height and width of the grid of tokens.
    """

    def __init__(self, window_size: tuple[int, int], num_heads: int):
        super().__init__()
        height, width = window_size
        num_offsets = (2 * height - 1) * (2 * width - 1) + UNREAD_ROWS
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_offsets, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(height, width))

    def forward(self, pair_index: torch.Tensor | None = None) -> torch.Tensor:
        """
        :param pair_index: (N, K, K) int64 rows of the table for the kept tokens; None for all T tokens.
        :return: (N, heads, K, K), or (1, heads, T, T) for all tokens.
        """
        if pair_index is None:
            pair_index = self.relative_position_index[None]
        return F.embedding(pair_index, self.relative_position_bias_table).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Multi-head self-attention.

    :param num_patches: number of tokens of the square grid for a relative position bias; None for no bias.
    :raises UserError: if `num_heads` does not divide `dim`.
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False, num_patches: int | None = None):
        super().__init__()
        if dim % num_heads:
            raise UserError(f"hidden_size ({dim}) must be a multiple of num_heads ({num_heads})")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        window_size = (math.isqrt(num_patches),) * 2 if num_patches else None
        self.rel_pos_bias = RelativePositionBias(window_size, num_heads) if window_size else None

    def forward(self, x: torch.Tensor, pair_index: torch.Tensor | None = None) -> torch.Tensor:
        """
        :param x: (N, T, D) tokens.
        :param pair_index: (N, T, T) int64 from `gather_pairs` if x holds only the kept tokens of a masked pass.
        :return: (N, T, D).
        """
        N, T, D = x.shape
        q, k, v = self.qkv(x).view(N, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (N, heads, T, D/heads)
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias(pair_index).to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(N, T, D))
