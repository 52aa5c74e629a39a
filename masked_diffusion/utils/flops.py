"""Floating-point operations of a forward pass, computed from the sizes. One multiply-add counts as two operations."""

from collections.abc import Iterable

import torch.nn as nn


def block_flops(num_tokens: int, hidden_size: int, mlp_ratio: float, skip: bool) -> int:
    """FLOP of one block on one image: four matrix products per token, attention and modulation."""
    hidden = int(hidden_size * mlp_ratio)
    per_token = 4 * hidden_size**2 + 2 * hidden_size * hidden + (2 * hidden_size**2 if skip else 0)
    attention = 2 * num_tokens**2 * hidden_size
    return 2 * (num_tokens * per_token + attention + 6 * hidden_size**2)


def forward_flops(model: nn.Module, num_kept: int | None = None) -> int:
    """FLOP of the forward pass of one image.

    :param model: a DiT, MDT or MDTv2; it may be on the meta device.
    :param num_kept: number of tokens that a masked pass keeps; None: the full pass.
    """
    tokens, width, patch = model.num_patches, model.hidden_size, model.patch_size

    def stack(blocks: Iterable[nn.Module], num_tokens: int) -> int:
        return sum(block_flops(num_tokens, width, model.mlp_ratio, b.skip_linear is not None) for b in blocks)

    blocks = model.all_blocks()
    side = list(getattr(model, "sideblocks", ()))
    decoder = model.decoder_blocks()
    encoder = [b for b in blocks if all(b is not other for other in (*side, *decoder))]
    total = stack(encoder, num_kept or tokens) + stack(decoder, tokens) + (stack(side, tokens) if num_kept else 0)
    embed = 2 * tokens * width * model.in_channels * patch**2
    condition = 2 * (model.t_embedder.frequency_embedding_size * width + width**2)
    final = 2 * (tokens * width * model.out_channels * patch**2 + 2 * width**2)
    return total + embed + condition + final
