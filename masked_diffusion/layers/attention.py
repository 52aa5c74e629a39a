"""Multi-head self-attention with an optional learned relative position bias."""

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..utils.errors import UserError
from .relative_attention import (
    UNREAD_ROWS,
    KeptTokens,
    PairBias,
    biased_attention,
    gather_pairs,
    relative_attention,
    relative_position_index,
    runs_kernel,
)


class RelativePositionBias(nn.Module):
    """A learned bias of the attention logits, for each head and each 2-D offset between two tokens.

    :param window_size: height and width of the grid of tokens.
    """

    def __init__(self, window_size: tuple[int, int], num_heads: int):
        super().__init__()
        height, width = self.window_size = window_size
        num_offsets = (2 * height - 1) * (2 * width - 1) + UNREAD_ROWS
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_offsets, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(height, width))
        self.made: tuple | None = None  # see `dense`

    def forward(self, pair_index: torch.Tensor | None = None) -> torch.Tensor:
        """
        :param pair_index: (N, K, K) int64 rows of the table for the kept tokens; None for all T tokens.
        :return: (N, heads, K, K), or (1, heads, T, T) for all tokens.
        """
        if pair_index is None:
            pair_index = self.relative_position_index[None]
        return PairBias.apply(self.relative_position_bias_table, pair_index, None, self.window_size)

    def dense(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The bias of all pairs for use without gradients, on a CPU: made once, and again when a weight has changed.

        Weights are compared by value, since `weight.data.copy_(...)` leaves no other trace. On a GPU that would wait
        for it, and looking the bias up costs little beside the attention.

        :return: (1, heads, T, T); None on other devices, and for sharded weights.
        """
        table, index = self.relative_position_bias_table, self.relative_position_index
        if type(table) is not nn.Parameter or table.device.type != "cpu":
            return None
        kind, made = (table.dtype, dtype), self.made
        if made is None or made[0] != kind or not (torch.equal(made[1], table) and torch.equal(made[2], index)):
            made = (kind, table.detach().clone(), index.clone(), self().to(dtype).contiguous())
            self.made = made
        return made[3]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"made": None}  # a copy has weights of its own


class HeadNorm(nn.RMSNorm):
    """RMSNorm of the features of each head, in the number format of its input.

    :param width: of a head.
    """

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., width)."""
        # Some versions of autocast return float32, but attention needs q and k in the format of v.
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention.

    :param qk_scale, attn_drop, proj_drop: published arguments; other values than the defaults are refused.
    :param num_patches: number of tokens of the square grid for a relative position bias; None for no bias.
    :param qk_norm: normalize the queries and keys of each head, which keeps the logits from growing without bound
        (Dehghani et al. 2023, "Scaling vision transformers to 22 billion parameters", sec. 2).
    :raises UserError: if `num_heads` does not divide `dim`, and for another scale and for dropout.
    """

    implementation: str = "auto"  # one of `relative_attention.IMPLEMENTATIONS`
    fused_attn: bool = True  # with `head_dim`, `scale` and the dropouts, what users' own forwards read

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        num_patches: int | None = None,
        qk_norm: bool = False,
    ):
        super().__init__()
        if dim % num_heads:
            raise UserError(f"hidden_size ({dim}) must be a multiple of num_heads ({num_heads})")
        if qk_scale is not None or attn_drop or proj_drop:
            given = f"qk_scale={qk_scale}, attn_drop={attn_drop}, proj_drop={proj_drop}"
            raise UserError(f"attention has no other scale and no dropout, but got {given}: leave all three out")
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale, self.attn_drop, self.proj_drop = self.head_dim**-0.5, nn.Dropout(0.0), nn.Dropout(0.0)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.q_norm, self.k_norm = (HeadNorm(self.head_dim) if qk_norm else nn.Identity() for _ in range(2))
        window_size = (math.isqrt(num_patches),) * 2 if num_patches else None
        self.rel_pos_bias = RelativePositionBias(window_size, num_heads) if window_size else None

    def forward(
        self,
        x: torch.Tensor,
        ids_keep: torch.Tensor | KeptTokens | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        :param x: (N, T, D) tokens.
        :param ids_keep: if x holds only the kept tokens of a masked pass: their (N, T) int64 positions, or what
            `look_up_kept` made of them once for all layers.
        :param bias: from `dense_bias`, instead of looking it up.
        :return: (N, T, D).
        """
        N, T, D = x.shape
        q, k, v = self.qkv(x).view(N, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (N, heads, T, D/heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rel_pos_bias is None:
            x = F.scaled_dot_product_attention(q, k, v)
        elif bias is not None:
            x = biased_attention(q, k, v, bias, self.implementation)
        else:
            x = relative_attention(
                q, k, v, self.rel_pos_bias.relative_position_bias_table, ids_keep, self.rel_pos_bias.window_size,
                self.implementation, self.rel_pos_bias.relative_position_index,
            )  # fmt: skip
        return self.proj(x.transpose(1, 2).reshape(N, T, D))

    def get_masked_rel_bias(self, B: int, ids_keep: torch.Tensor) -> torch.Tensor:
        """The bias between the kept tokens, as published; nothing here calls it.

        :param B: number of samples. :param ids_keep: (B, K) int64 positions. :return: (B, heads, K, K).
        """
        return self.rel_pos_bias(gather_pairs(self.rel_pos_bias.relative_position_index, ids_keep))

    def runs_kernel(self, x: torch.Tensor) -> bool:
        """Whether attention of these tokens runs in the Triton kernel."""
        return runs_kernel(self.implementation, x.device, compute_dtype(x), x.shape[-1] // self.num_heads)

    def dense_bias(self, x: torch.Tensor) -> torch.Tensor | None:
        """The bias for all T tokens in evaluation without gradients: made once for the weights, not once per call.

        :param x: (N, T, D) tokens. :return: (1, heads, T, T), or None where `forward` looks the bias up.
        """
        if self.rel_pos_bias is None:
            return None
        if self.training:
            self.rel_pos_bias.made = None  # memory that training has better use for
        if self.training or torch.is_grad_enabled() or self.runs_kernel(x):
            return None
        return self.rel_pos_bias.dense(compute_dtype(x))


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The number format that a matrix product of x has, with or without autocast."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else x.dtype
