"""Attention with a learned relative position bias: one function, three implementations that a test holds equal.

`sdpa` is PyTorch's attention with the bias as its mask: it runs on every device. `triton` is the kernel of
`triton_attention`, which never writes the bias of all pairs. `auto` takes the kernel on a GPU in half precision, and
`cpu_attention` in bfloat16 on a CPU that has instructions for it.
"""

import importlib.util
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..utils.errors import UserError
from ..utils.precision import cpu_has_bf16
from .cpu_attention import BiasedAttention

IMPLEMENTATIONS = ("auto", "sdpa", "triton")
UNREAD_ROWS = 3  # at the end of each bias table; nothing reads them, but the published checkpoints have them
LARGEST_HEAD = 128  # features of a head that the kernel was made for
HAS_TRITON = importlib.util.find_spec("triton") is not None

# ---------------------------------------------------------------- pairs of tokens


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


class KeptTokens(NamedTuple):
    """The kept tokens of a masked pass, and what every layer looks up for them: made once in a forward pass.

    :param positions: (N, K) int64, all different within a sample.
    :param slots: (N, T) int64, the inverse: which of the K tokens is at a position; K where the token was dropped.
    :param rows: (N, K, K) int64 rows of the bias table for `sdpa`; None if only the kernel runs.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    rows: torch.Tensor | None


def look_up_kept(positions: torch.Tensor, index: torch.Tensor, rows_too: bool = True) -> KeptTokens:
    """The `KeptTokens` of (N, K) positions.

    :param index: (T, T) from `relative_position_index`.
    """
    num_samples, num_kept = positions.shape
    order = torch.arange(num_kept, device=positions.device).expand(num_samples, -1)
    slots = positions.new_full((num_samples, len(index)), num_kept).scatter_(1, positions, order)
    return KeptTokens(positions, slots, gather_pairs(index, positions) if rows_too else None)


# ---------------------------------------------------------------- the bias, and the gradient of its table


class PairBias(torch.autograd.Function):
    """Look up the bias of pairs. Backward sums over all pairs of an offset, without an embedding's backward."""

    @staticmethod
    def forward(
        ctx: Any, table: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor | None, grid: tuple[int, int]
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, slots)
        ctx.num_rows, ctx.grid = len(table), grid
        return F.embedding(rows, table).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        return table_gradient(grad, *ctx.saved_tensors, ctx.num_rows, *ctx.grid), None, None, None


# An operator, so that torch.compile does not trace into it: it would turn the sums into atomic additions.
@torch.library.custom_op("masked_diffusion::table_gradient", mutates_args=())
def table_gradient(
    grad: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor | None, num_rows: int, grid_height: int, grid_width: int
) -> torch.Tensor:
    """The gradient of the bias table: for each offset, the sum over the pairs of tokens that have it.

    On a GPU half a million additions into 961 rows would wait for one another. So there the samples are summed first,
    for each pair of positions, and then the pairs of each offset: both sums only read, in a fixed order.

    :param grad: (B, heads, K, K) of the bias. :param rows: (B, K, K) of the table.
    :param slots: see `KeptTokens`; None for all T tokens, whose `grad` is summed over the samples already.
    :return: (num_rows, heads).
    """
    heads, tokens = grad.shape[1], grid_height * grid_width
    dense = slots is not None or rows.shape == (1, tokens, tokens)
    if grad.device.type == "cpu" or not dense:
        # In the order of `embedding_dense_backward`, so with the same bits.
        total = grad.new_zeros(heads, num_rows)
        for sample, sample_rows in zip(grad.reshape(len(grad), heads, -1), rows, strict=True):
            total.scatter_add_(1, sample_rows.reshape(1, -1).expand(heads, -1), sample)
        return total.t().contiguous()
    total = sum_samples(grad, slots) if slots is not None else grad[0]
    offsets = fold_pairs(total, grid_height, grid_width)
    return F.pad(offsets, (0, num_rows - offsets.shape[1])).t().contiguous()


@table_gradient.register_fake
def _(grad, rows, slots, num_rows, grid_height, grid_width):
    return grad.new_empty(num_rows, grad.shape[1])


def sum_samples(grad: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Sum over the samples, for each pair of positions: (N, heads, K, K) -> (heads, T, T)."""
    grad = F.pad(grad, (0, 1, 0, 1))  # the zeros that dropped tokens read
    samples = torch.arange(len(grad), device=grad.device)[:, None, None]
    return grad[samples, :, slots[:, :, None], slots[:, None, :]].sum(0).permute(2, 0, 1)


def fold_pairs(pairs: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Sum over the pairs of tokens with the same offset, in the order of the bias table.

    :param pairs: (heads, T, T) with T = height * width. :return: (heads, (2 height - 1) (2 width - 1)).
    """
    heads = len(pairs)
    pairs = pairs.reshape(heads, height, width, height, width).transpose(2, 3)
    pairs = _sum_diagonals(pairs.reshape(-1, width, width))  # by the offset of the columns
    pairs = pairs.view(heads, height, height, -1).permute(0, 3, 1, 2)
    pairs = _sum_diagonals(pairs.reshape(-1, height, height))  # and of the rows
    return pairs.view(heads, 2 * width - 1, -1).transpose(1, 2).reshape(heads, -1)


def _sum_diagonals(square: torch.Tensor) -> torch.Tensor:
    """(B, S, S) -> (B, 2S - 1): the sums of entries (i, j) with equal i - j, from -(S - 1) to S - 1."""
    size = square.shape[-1]
    # Rows of 2S numbers, read as rows of 2S - 1: row i moves i places to the right, and diagonals become columns.
    square = F.pad(square.flip(2), (0, size)).flatten(1)[:, : size * (2 * size - 1)]
    return square.view(-1, size, 2 * size - 1).sum(1)


# ---------------------------------------------------------------- which implementation runs


def gpu_has_kernel() -> bool:
    """Whether Triton and a GPU of compute capability 8.0 or newer are there."""
    return HAS_TRITON and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def cpu_multiplies_bf16() -> bool:
    """Whether the processor is known to have instructions for bfloat16."""
    return cpu_has_bf16() is True


# All that `torch.compiler.assume_constant_result` does, whose import of the compiler takes every script a second.
gpu_has_kernel._dynamo_marked_constant = cpu_multiplies_bf16._dynamo_marked_constant = True


def runs_kernel(implementation: str, device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether attention runs in the Triton kernel, and not in `sdpa`.

    `auto` takes the kernel on a GPU in half precision; see `IMPLEMENTATIONS`.
    """
    if implementation != "auto":
        return implementation == "triton"
    half = dtype in (torch.bfloat16, torch.float16)
    return half and device.type == "cuda" and head_width <= LARGEST_HEAD and gpu_has_kernel()


def runs_products(implementation: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention runs in the matrix products of `cpu_attention`, and not in `sdpa`."""
    return implementation == "auto" and device.type == "cpu" and dtype == torch.bfloat16 and cpu_multiplies_bf16()


def check_implementation(implementation: str, device: torch.device) -> None:
    """Refuse an implementation that this machine does not have.

    :raises UserError: for an unknown name, and for `triton` without Triton or without a GPU.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"--attention is {implementation!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    if implementation != "triton":
        return
    if not HAS_TRITON:
        raise UserError("--attention triton needs the package triton, which is not installed: choose sdpa")
    from . import triton_attention

    if device.type != "cuda" and not triton_attention.INTERPRETED:
        raise UserError(f"--attention triton needs a GPU: on a {device.type.upper()} choose sdpa or auto")


def check_inputs(q: torch.Tensor) -> None:
    """Refuse what the kernel cannot compute.

    :param q: (N, heads, K, d).
    :raises UserError: as `check_implementation`, and for a wide head and a dtype that the kernel does not have.
    """
    check_implementation("triton", q.device)
    if q.shape[-1] > LARGEST_HEAD:
        raise UserError(
            f"--attention triton has heads of up to {LARGEST_HEAD} features, not {q.shape[-1]}: choose sdpa"
        )
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"--attention triton computes in fp32, bf16 or fp16, not in {q.dtype}: choose sdpa")


# ---------------------------------------------------------------- attention


def relative_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor | KeptTokens | None,
    grid: tuple[int, int],
    implementation: str = "auto",
    index: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, where the bias of a pair of tokens depends on their offset.

    :param q, k, v: (N, heads, K, d) of one floating-point dtype.
    :param table: (rows, heads) float32, with at least (2 height - 1) (2 width - 1) rows.
    :param positions: (N, K) int64 places of the tokens on the grid, all different within a sample, or what
        `look_up_kept` made of them; None for all T = K tokens in their order.
    :param grid: height and width.
    :param implementation: one of `IMPLEMENTATIONS`.
    :param index: `relative_position_index` of the grid, if it is there already.
    :return: (N, heads, K, d).
    :raises UserError: as `check_inputs`, where the kernel runs.
    """
    kernel = runs_kernel(implementation, q.device, q.dtype, q.shape[-1])
    if index is None and not (kernel and positions is None):
        index = relative_position_index(*grid).to(q.device)
    if isinstance(positions, torch.Tensor):
        positions = look_up_kept(positions, index, rows_too=not kernel)
    if kernel:
        from . import triton_attention

        check_inputs(q)
        places = (None, None) if positions is None else positions[:2]
        return triton_attention.attention(q, k, v, table, *places, grid)
    if positions is None:
        rows, slots = index[None], None
    else:
        rows = gather_pairs(index, positions.positions) if positions.rows is None else positions.rows
        slots = positions.slots
    return biased_attention(q, k, v, PairBias.apply(table, rows, slots, grid), implementation)


def biased_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, implementation: str
) -> torch.Tensor:
    """`relative_attention` with the (N or 1, heads, K, K) bias of all pairs, outside of the kernel."""
    if runs_products(implementation, q.device, q.dtype):
        return BiasedAttention.apply(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
