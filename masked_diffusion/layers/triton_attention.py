"""Attention with a relative position bias by the kernels of `triton_kernels`: launching them, and autograd."""

import os
from typing import Any

import torch
import triton

from .triton_kernels import (
    attention_forward_kernel,
    attention_keys_kernel,
    attention_queries_kernel,
    fold_pairs_kernel,
    sum_samples_kernel,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # decides what `triton.jit` makes of the kernels

# ---------------------------------------------------------------- launching


def split_width(width: int) -> tuple[int, int]:
    """A head's width as two powers of two, of which the second may be 0: 72 is worked as 64 + 16, not as 128."""
    first = max(16, 1 << (width.bit_length() - 1))
    return first, 0 if width <= first else max(16, triton.next_power_of_2(width - first))


def block_size(length: int, width: int) -> int:
    """Rows of a tile: 128 where that pads the length no further than 64 does; 32 and 16 for the shortest lengths.

    Heads of more than 80 features do not fit into registers in tiles of 128.
    """
    if length <= 32:
        return max(16, triton.next_power_of_2(length))
    return 128 if width <= 80 and triton.cdiv(length, 128) * 2 <= triton.cdiv(length, 64) else 64


def tile_options(width: int, block: int) -> dict[str, int]:
    """Warps and stages with which the compiler keeps a tile in registers and in the shared memory of small GPUs."""
    wide = width > 80
    return {"num_warps": 8 if block == 128 or wide else 4, "num_stages": 1 if wide else 2}


def _precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies float32; half precision has one way only."""
    return "ieee" if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"


def _alignment(*tensors: torch.Tensor) -> int:
    """8 where every head of the tensors begins at a multiple of 8 numbers, else 1."""
    return 8 if all(t.stride(dim) % 8 == 0 for t in tensors for dim in (0, 1, 2)) else 1


def _unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _empty_like(q: torch.Tensor) -> torch.Tensor:
    """(N, heads, K, d), in the order (N, K, heads, d) in memory: the heads join without a copy."""
    n, heads, length, width = q.shape
    return q.new_empty(n, length, heads, width).transpose(1, 2)


def _columns(table: torch.Tensor) -> torch.Tensor:
    """(rows, heads) table -> (heads, rows) float32: the bias of neighbouring keys is in neighbouring places."""
    return table.float().t().contiguous()


def _center(grid_height: int, grid_width: int) -> int:
    """The row of the offset (0, 0)."""
    return 2 * grid_height * grid_width - grid_height - grid_width


@torch.library.custom_op("masked_diffusion::relative_attention", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor | None,
    slots: torch.Tensor | None,
    grid_height: int,
    grid_width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    n, heads, length, width = q.shape
    out, lse, bias = _empty_like(q), q.new_empty(n, heads, length, dtype=torch.float32), _columns(table)
    place = q if positions is None else positions.contiguous()  # q: not read
    d1, d2 = split_width(width)
    block_m, block_n = block_size(length, width), min(64, block_size(length, width))
    attention_forward_kernel[(triton.cdiv(length, block_m) * n * heads,)](
        q, k, v, bias, place, out, lse, width**-0.5, length, heads, grid_width,
        bias.shape[1], _center(grid_height, grid_width),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        WIDTH=width, D1=d1, D2=d2, BLOCK_M=block_m, BLOCK_N=block_n, KEPT=positions is not None,
        ALIGN=_alignment(q, k, v, out), PRECISION=_precision(q.dtype),
        **tile_options(width, block_m),
    )  # fmt: skip
    return out, lse


@_forward.register_fake
def _(q, k, v, table, positions, slots, grid_height, grid_width):
    return _empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("masked_diffusion::relative_attention_backward", mutates_args=())
def _backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor | None,
    slots: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    grid_height: int,
    grid_width: int,
    table_too: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, grad_out = (_unit_stride(tensor) for tensor in (q, k, v, grad_out))
    n, heads, length, width = q.shape
    grad_q, grad_k, grad_v, delta, bias = *(_empty_like(q) for _ in range(3)), torch.empty_like(lse), _columns(table)
    d1, d2 = split_width(width)
    block = min(64, block_size(length, width))
    pairs_stride = triton.cdiv(length, 16) * 16  # aligned rows
    grad_pairs = q.new_empty(n, heads, length, pairs_stride) if table_too else q
    place, slots = (q, q) if positions is None else (positions.contiguous(), slots.contiguous())
    sizes = (length, heads, grid_width, bias.shape[1], _center(grid_height, grid_width))
    options = {
        "WIDTH": width, "D1": d1, "D2": d2, "BLOCK_M": block, "BLOCK_N": block, "KEPT": positions is not None,
        "ALIGN": _alignment(q, k, v, out, grad_out, grad_q), "PRECISION": _precision(q.dtype),
        **tile_options(width, block),
    }  # fmt: skip
    launch = (triton.cdiv(length, block) * n * heads,)
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    attention_queries_kernel[launch](
        q, k, v, bias, place, out, lse, grad_out, delta, grad_q, grad_pairs, width**-0.5, *sizes, pairs_stride,
        *strides, *out.stride()[:3], *grad_out.stride()[:3], *grad_q.stride()[:3], PAIRS=table_too, **options,
    )  # fmt: skip
    attention_keys_kernel[launch](
        q, k, v, bias, place, lse, grad_out, delta, grad_k, grad_v, width**-0.5, *sizes,
        *strides, *grad_out.stride()[:3], *grad_k.stride()[:3], **options,
    )  # fmt: skip
    if not table_too:
        return grad_q, grad_k, grad_v, table.new_empty(0)
    tokens = grid_height * grid_width
    dense = lse.new_empty(heads, tokens, tokens)
    sum_samples_kernel[(triton.cdiv(tokens * tokens, 1024), heads)](
        grad_pairs, slots, dense, n, length, heads, tokens, pairs_stride,
        SAMPLES=4, BLOCK=1024, KEPT=positions is not None, num_warps=8,
    )  # fmt: skip
    grad_table = torch.zeros_like(table, dtype=torch.float32, memory_format=torch.contiguous_format)
    rows = (2 * grid_height - 1) * (2 * grid_width - 1)
    fold_pairs_kernel[(triton.cdiv(rows, 32), heads)](
        dense, grad_table, heads, tokens, grid_height, grid_width, rows, ROWS=32, BLOCK=64, num_warps=4
    )
    return grad_q, grad_k, grad_v, grad_table.to(table.dtype)


@_backward.register_fake
def _(grad_out, q, k, v, table, positions, slots, out, lse, grid_height, grid_width, table_too):
    grad_table = table.new_empty(table.shape if table_too else 0)
    return _empty_like(q), _empty_like(q), _empty_like(q), grad_table


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, grid_height, grid_width = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.grid = (grid_height, grid_width)


def _gradients(ctx: Any, grad_out: torch.Tensor, _: torch.Tensor) -> tuple:
    table_too = ctx.needs_input_grad[3]
    *grads, grad_table = _backward(grad_out, *ctx.saved_tensors, *ctx.grid, table_too)
    return *grads, grad_table if table_too else None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor | None,
    slots: torch.Tensor | None,
    grid: tuple[int, int],
) -> torch.Tensor:
    """`relative_attention` by these kernels. q, k and v are read with whatever strides they have.

    :param slots: of the same tokens as `positions`; see `KeptTokens`.
    :return: (N, heads, K, d), in memory (N, K, heads, d).
    """
    return _forward(q, k, v, table, positions, slots, *grid)[0]
