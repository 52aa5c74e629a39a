"""Transformer blocks with adaLN-Zero conditioning, and the final layer.

Under autocast to bfloat16, tokens are bfloat16 from the patch embedding to the final layer: the residual stream, the
output of the norms, the modulated tokens and the gated sums. That is safe: each of these operations computes in float32
and rounds its result once, beside matrix products whose inputs are rounded to the same 8 bits in any case, and bfloat16
has the range of float32. In float32 stay:

- what costs nothing: the conditioning vectors (N, D), the sums with the position tables, the statistics of norms and
  softmax, the bias tables;
- what sums up over a batch or a run: the weights, their gradients over microbatches and ranks, losses, averages.

Under autocast to float16 the stream and the norms stay float32, where autocast leaves them so: the residual stream of a
trained network has outliers, and float16 ends at 65504.
"""

from typing import Any

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from .attention import Attention
from .relative_attention import KeptTokens


class LayerNorm(nn.LayerNorm):
    """A norm without weights, of which bfloat16 tokens come out in bfloat16; see the head of this file."""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, elementwise_affine=False, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.bfloat16:
            return super().forward(x)
        # What `F.layer_norm` calls, but unknown to autocast, which on a GPU would give float32.
        return torch.native_layer_norm(x, self.normalized_shape, None, None, self.eps)[0]


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Scale and shift (N, T, D) tokens: x (1 + scale) + shift, with (N, D) `shift` and `scale`."""
    if x.dtype == shift.dtype == torch.bfloat16:
        return torch.addcmul(shift[:, None], x, 1 + scale[:, None])  # rounds once
    return x * (1 + scale[:, None]) + shift[:, None]


def add_gated(x: torch.Tensor, gate: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """The next value of the residual stream: x + gate update, with (N, T, D) tokens and an (N, D) `gate`."""
    if x.dtype == gate.dtype == update.dtype == torch.bfloat16:
        return torch.addcmul(x, gate[:, None], update)  # rounds once: a small update is not rounded twice
    return x + gate[:, None] * update


class Mlp(nn.Module):
    """The two layers that a block applies to each token, with a GELU in its tanh form between them.

    Names are those of timm's `Mlp`, whose import would double the time that a script takes to start.
    """

    def __init__(self, in_features: int, hidden_features: int):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """:param x: (..., in_features). :return: the same shape."""
        return self.fc2(self.act(self.fc1(x)))


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero conditioning (Peebles & Xie 2023, figure 3).

    :param block_kwargs: options of `Attention`: `num_patches`, `qk_norm`.
    """

    grad_checkpoint: bool = False

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, **block_kwargs: Any):
        super().__init__()
        self.norm1 = LayerNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, qkv_bias=True, **block_kwargs)
        self.norm2 = LayerNorm(hidden_size)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.skip_linear = None

    def __call__(
        self,
        x: torch.Tensor,
        c: torch.Tensor,
        skip: torch.Tensor | None = None,
        ids_keep: torch.Tensor | KeptTokens | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """`forward`, with the bias from `Attention.dense_bias`.

        Here, because `compile_blocks` compiles what is called from here on: compiled code takes the bias as an input,
        and cannot hold the one of old weights.
        """
        if not torch.compiler.is_compiling():
            if not self._attends_as_built():
                ids_keep = ids_keep.positions if isinstance(ids_keep, KeptTokens) else ids_keep
            elif ids_keep is None:
                options = {"bias": self.attn.dense_bias(x)} | options
        options = {"skip": skip, "ids_keep": ids_keep} | options
        return super().__call__(x, c, **{name: value for name, value in options.items() if value is not None})

    def _attends_as_built(self) -> bool:
        """Whether no user's `forward` has taken the place of the block's or of the attention's, as users do."""
        attention = self.attn
        own = type(self).forward is DiTBlock.forward and getattr(type(attention), "forward", None) is Attention.forward
        return own and "forward" not in vars(attention)

    def forward(
        self,
        x: torch.Tensor,
        c: torch.Tensor,
        skip: torch.Tensor | None = None,
        ids_keep: torch.Tensor | KeptTokens | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        :param x: (N, T, D) tokens. :param c: (N, D) conditioning vectors.
        :param skip: (N, T, D) tokens of the long skip connection, for an `MDTBlock` that has one.
        :param ids_keep, bias: see `Attention.forward`.
        :return: (N, T, D).
        """
        if self.grad_checkpoint and torch.is_grad_enabled():
            return checkpoint(self.compute, x, c, skip, ids_keep, bias, use_reentrant=False)
        return self.compute(x, c, skip, ids_keep, bias)

    def compute(
        self,
        x: torch.Tensor,
        c: torch.Tensor,
        skip: torch.Tensor | None,
        ids_keep: torch.Tensor | KeptTokens | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """`forward` without activation checkpointing."""
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        # An attention that a user has put here may take fewer arguments, so it gets only those that there are.
        options = {name: value for name, value in (("ids_keep", ids_keep), ("bias", bias)) if value is not None}
        attended = self.attn(modulate(self.norm1(x), shift_msa, scale_msa), **options)
        x = add_gated(x, gate_msa, attended)
        return add_gated(x, gate_mlp, self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp)))


class MDTBlock(DiTBlock):
    """A `DiTBlock` that can have a long skip connection.

    :param skip: `forward` takes a skip input; `Linear(2D, D)` merges it with the tokens.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, skip: bool = False, **block_kwargs: Any
    ):
        super().__init__(hidden_size, num_heads, mlp_ratio, **block_kwargs)
        if skip:
            self.skip_linear = nn.Linear(2 * hidden_size, hidden_size)


class FinalLayer(nn.Module):
    """The layer after the last block: tokens to patches of the output."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = LayerNorm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """
        :param x: (N, T, D) tokens. :param c: (N, D) conditioning vectors.
        :return: (N, T, patch_size**2 * out_channels).
        """
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))
