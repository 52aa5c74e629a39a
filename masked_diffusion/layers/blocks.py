"""Transformer blocks with adaLN-Zero conditioning, and the final layer."""

from functools import partial
from typing import Any

import torch
import torch.nn as nn
from timm.layers import Mlp
from torch.utils.checkpoint import checkpoint

from .attention import Attention
from .relative_attention import KeptTokens


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Scale and shift (N, T, D) tokens: x (1 + scale) + shift, with (N, D) `shift` and `scale`."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero conditioning (Peebles & Xie 2023, figure 3).

    :param num_patches: number of tokens of the square grid for a relative position bias; None for no bias.
    """

    grad_checkpoint: bool = False

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, num_patches: int | None = None):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qkv_bias=True, num_patches=num_patches)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=partial(nn.GELU, approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.skip_linear = None

    def __call__(
        self,
        x: torch.Tensor,
        c: torch.Tensor,
        skip: torch.Tensor | None = None,
        pair_index: torch.Tensor | KeptTokens | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """`forward`, with the bias from `Attention.dense_bias`.

        Here, because `compile_blocks` compiles what is called from here on: compiled code takes the bias as an input,
        and cannot hold the one of old weights.
        """
        if pair_index is None and not torch.compiler.is_compiling():
            bias = self.attn.dense_bias(x)
            options = options if bias is None else {"bias": bias} | options
        return super().__call__(x, c, skip=skip, pair_index=pair_index, **options)

    def forward(
        self,
        x: torch.Tensor,
        c: torch.Tensor,
        skip: torch.Tensor | None = None,
        pair_index: torch.Tensor | KeptTokens | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        :param x: (N, T, D) tokens. :param c: (N, D) conditioning vectors.
        :param skip: (N, T, D) tokens of the long skip connection, for an `MDTBlock` that has one.
        :param pair_index, bias: see `Attention.forward`.
        :return: (N, T, D).
        """
        if self.grad_checkpoint and torch.is_grad_enabled():
            return checkpoint(self.compute, x, c, skip, pair_index, bias, use_reentrant=False)
        return self.compute(x, c, skip, pair_index, bias)

    def compute(
        self,
        x: torch.Tensor,
        c: torch.Tensor,
        skip: torch.Tensor | None,
        pair_index: torch.Tensor | KeptTokens | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """`forward` without activation checkpointing."""
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), pair_index, bias)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class MDTBlock(DiTBlock):
    """A `DiTBlock` that can have a long skip connection.

    :param skip: `forward` takes a skip input; `Linear(2D, D)` merges it with the tokens.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        skip: bool = False,
        num_patches: int | None = None,
    ):
        super().__init__(hidden_size, num_heads, mlp_ratio, num_patches)
        if skip:
            self.skip_linear = nn.Linear(2 * hidden_size, hidden_size)


class FinalLayer(nn.Module):
    """The layer after the last block: tokens to patches of the output."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """
        :param x: (N, T, D) tokens. :param c: (N, D) conditioning vectors.
        :return: (N, T, patch_size**2 * out_channels).
        """
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))
