"""Floating-point operations of a forward pass, computed from the sizes. One multiply-add counts as two operations."""

from collections import Counter
from collections.abc import Iterable

import torch.nn as nn

RATIOS = 1000  # points of the range of the mask ratio over which its mean is taken


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
    total = sum(block_flops(n, width, model.mlp_ratio, skip) for n, skip in block_inputs(model, num_kept))
    embed = 2 * tokens * width * model.in_channels * patch**2
    condition = 2 * (model.t_embedder.frequency_embedding_size * width + width**2)
    final = 2 * (tokens * width * model.out_channels * patch**2 + 2 * width**2)
    return total + embed + condition + final


def training_flops(model: nn.Module) -> float:
    """FLOP of one image in one training step, on average over the ratio that a masked pass draws.

    The backward pass costs twice the forward pass. The optimizer's own work is not counted.
    """
    total = float(forward_flops(model))
    if model.mask_ratio is not None:
        ratios = [model.mask_ratio + model.mask_ratio_spread * (i + 0.5) / RATIOS for i in range(RATIOS)]
        counts = Counter(int(model.num_patches * (1 - ratio)) for ratio in ratios)
        total += sum(count * forward_flops(model, num_kept) for num_kept, count in counts.items()) / RATIOS
    return 3 * total


def attention_flops(model: nn.Module, num_kept: int | None = None) -> int:
    """The part of `forward_flops` that q k^T and the product with v have."""
    return sum(4 * n**2 * model.hidden_size for n, _ in block_inputs(model, num_kept))


def attention_values(model: nn.Module, num_kept: int | None = None) -> int:
    """Numbers that attention reads and writes at least in the forward pass of one image: q, k, v and its output."""
    return sum(4 * n * model.hidden_size for n, _ in block_inputs(model, num_kept))


def elementwise_values(model: nn.Module, num_kept: int | None = None) -> int:
    """Numbers that the blocks read and write at least between the matrix products of the forward pass of one image.

    Each tensor between two matrix products is counted once where it is read and once where it is written. In units of
    (T, D): norm and modulation before attention 2; gate, sum, norm and modulation after it 4; GELU twice the MLP's
    ratio; gate and sum after it 3; the concatenation of a long skip 4.
    """
    per_block = 2 + 4 + 2 * model.mlp_ratio + 3
    return int(sum(n * model.hidden_size * (per_block + 4 * skip) for n, skip in block_inputs(model, num_kept)))


def block_inputs(model: nn.Module, num_kept: int | None = None) -> list[tuple[int, bool]]:
    """For every block that the forward pass of one image runs: its number of tokens, and whether it has a long skip.

    :param num_kept: number of tokens that a masked pass keeps; None: the full pass.
    """

    def stack(blocks: Iterable[nn.Module], num_tokens: int) -> list[tuple[int, bool]]:
        return [(num_tokens, block.skip_linear is not None) for block in blocks]

    side, decoder = list(getattr(model, "sideblocks", ())), model.decoder_blocks()
    encoder = [block for block in model.all_blocks() if all(block is not other for other in (*side, *decoder))]
    tokens = model.num_patches
    return stack(encoder, num_kept or tokens) + stack(decoder, tokens) + (stack(side, tokens) if num_kept else [])
