"""The Triton kernels of `triton_attention`: attention with a relative position bias forward, and all four gradients.

The forward and backward passes are those of FlashAttention-2 (Dao 2023, algorithms 1 and 2), with a bias that is looked
up inside. Nothing of the size of all pairs is written in the forward pass. Everything is deterministic: no atomics.

The bias of query i and key j is row `center + a_i - a_j` of the head's column of the table, where
a = (position // width) * (2 width - 1) + position % width on a grid of that width; see `relative_position_index`.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # the kernels take powers of 2, which the hardware has an instruction for


@triton.jit
def load_features(base, stride, rows, length, START: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """(len(rows), SIZE) features from START on; zero beyond the length and beyond the WIDTH of a head."""
    columns = START + tl.arange(0, SIZE)
    mask = rows[:, None] < length
    if START + SIZE > WIDTH:
        mask = mask & (columns[None, :] < WIDTH)
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_features(base, stride, rows, length, value, START: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    columns = START + tl.arange(0, SIZE)
    mask = rows[:, None] < length
    if START + SIZE > WIDTH:
        mask = mask & (columns[None, :] < WIDTH)
    tl.store(base + rows[:, None] * stride + columns[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def address(positions, n, tokens, length, grid_width, KEPT: tl.constexpr):
    """The numbers `a` of some tokens of sample n; see the head of this file."""
    place = tokens
    if KEPT:
        place = tl.load(positions + n * length + tokens, mask=tokens < length, other=0).to(tl.int32)
    else:
        place = tl.where(tokens < length, tokens, 0)
    return place // grid_width * (2 * grid_width - 1) + place % grid_width


@triton.jit
def head_offset(n, h, stride_n, stride_h, ALIGN: tl.constexpr):
    """Where a sample's head begins. ALIGN: a multiple that the compiler cannot know, and vector loads need."""
    return tl.multiple_of(n.to(tl.int64) * stride_n + h.to(tl.int64) * stride_h, ALIGN)


@triton.jit
def program(length, BLOCK: tl.constexpr):
    """This program's block of tokens, and which head of which sample it works for. Blocks of a head are neighbours."""
    blocks = tl.cdiv(length, BLOCK)
    return tl.program_id(0) % blocks, tl.program_id(0) // blocks


@triton.jit
def attention_forward_kernel(
    q, k, v, bias, positions, out, lse, scale, length, heads, grid_width, bias_rows, center,
    q_n, q_h, q_t, k_n, k_h, k_t, v_n, v_h, v_t, o_n, o_h, o_t,
    WIDTH: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KEPT: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of BLOCK_M queries of one head of one sample, against all keys."""
    block, sequence = program(length, BLOCK_M)
    n, h = sequence // heads, sequence % heads
    q += head_offset(n, h, q_n, q_h, ALIGN)
    k += head_offset(n, h, k_n, k_h, ALIGN)
    v += head_offset(n, h, v_n, v_h, ALIGN)
    out += head_offset(n, h, o_n, o_h, ALIGN)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q1 = load_features(q, q_t, i, length, 0, D1, WIDTH)
    if D2 > 0:
        q2 = load_features(q, q_t, i, length, D1, D2, WIDTH)
        out2 = tl.zeros([BLOCK_M, D2], tl.float32)
    bias_i = bias + h * bias_rows + center + address(positions, n, i, length, grid_width, KEPT)
    out1 = tl.zeros([BLOCK_M, D1], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)  # the running maximum
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, length, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        logits = tl.dot(q1, tl.trans(load_features(k, k_t, j, length, 0, D1, WIDTH)), input_precision=PRECISION)
        if D2 > 0:
            k2 = load_features(k, k_t, j, length, D1, D2, WIDTH)
            logits = tl.dot(q2, tl.trans(k2), logits, input_precision=PRECISION)
        pair_bias = tl.load(bias_i[:, None] - address(positions, n, j, length, grid_width, KEPT)[None, :])
        logits = logits * (scale * LOG2E) + pair_bias * LOG2E
        logits = tl.where(j[None, :] < length, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        weights = weights.to(v.dtype.element_ty)
        v1 = load_features(v, v_t, j, length, 0, D1, WIDTH)
        out1 = tl.dot(weights, v1, out1 * shrink[:, None], input_precision=PRECISION)
        if D2 > 0:
            v2 = load_features(v, v_t, j, length, D1, D2, WIDTH)
            out2 = tl.dot(weights, v2, out2 * shrink[:, None], input_precision=PRECISION)
        top = new_top
    store_features(out, o_t, i, length, out1 / total[:, None], 0, D1, WIDTH)
    if D2 > 0:
        store_features(out, o_t, i, length, out2 / total[:, None], D1, D2, WIDTH)
    tl.store(lse + sequence * length + i, top + tl.log2(total), mask=i < length)


@triton.jit
def attention_queries_kernel(
    q, k, v, bias, positions, out, lse, grad_out, delta, grad_q, grad_pairs, scale, length, heads, grid_width,
    bias_rows, center, pairs_stride,
    q_n, q_h, q_t, k_n, k_h, k_t, v_n, v_h, v_t, o_n, o_h, o_t, go_n, go_h, go_t, gq_n, gq_h, gq_t,
    WIDTH: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KEPT: tl.constexpr, PAIRS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries, of their pairs' logits (with PAIRS), and `delta` for the keys' kernel."""
    block, sequence = program(length, BLOCK_M)
    n, h = sequence // heads, sequence % heads
    q += head_offset(n, h, q_n, q_h, ALIGN)
    k += head_offset(n, h, k_n, k_h, ALIGN)
    v += head_offset(n, h, v_n, v_h, ALIGN)
    out += head_offset(n, h, o_n, o_h, ALIGN)
    grad_out += head_offset(n, h, go_n, go_h, ALIGN)
    grad_q += head_offset(n, h, gq_n, gq_h, ALIGN)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q1 = load_features(q, q_t, i, length, 0, D1, WIDTH)
    go1 = load_features(grad_out, go_t, i, length, 0, D1, WIDTH)
    delta_i = tl.sum(go1.to(tl.float32) * load_features(out, o_t, i, length, 0, D1, WIDTH).to(tl.float32), 1)
    grad1 = tl.zeros([BLOCK_M, D1], tl.float32)
    if D2 > 0:
        q2 = load_features(q, q_t, i, length, D1, D2, WIDTH)
        go2 = load_features(grad_out, go_t, i, length, D1, D2, WIDTH)
        delta_i += tl.sum(go2.to(tl.float32) * load_features(out, o_t, i, length, D1, D2, WIDTH).to(tl.float32), 1)
        grad2 = tl.zeros([BLOCK_M, D2], tl.float32)
    row = sequence * length + i
    tl.store(delta + row, delta_i, mask=i < length)
    lse_i = tl.load(lse + row, mask=i < length, other=float("inf"))
    bias_i = bias + h * bias_rows + center + address(positions, n, i, length, grid_width, KEPT)
    pairs_i = grad_pairs + row.to(tl.int64) * pairs_stride
    for start in range(0, length, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k1 = load_features(k, k_t, j, length, 0, D1, WIDTH)
        logits = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        grad = tl.dot(go1, tl.trans(load_features(v, v_t, j, length, 0, D1, WIDTH)), input_precision=PRECISION)
        if D2 > 0:
            k2 = load_features(k, k_t, j, length, D1, D2, WIDTH)
            logits = tl.dot(q2, tl.trans(k2), logits, input_precision=PRECISION)
            v2 = load_features(v, v_t, j, length, D1, D2, WIDTH)
            grad = tl.dot(go2, tl.trans(v2), grad, input_precision=PRECISION)
        pair_bias = tl.load(bias_i[:, None] - address(positions, n, j, length, grid_width, KEPT)[None, :])
        weights = tl.exp2(logits * (scale * LOG2E) + pair_bias * LOG2E - lse_i[:, None])
        weights = tl.where(j[None, :] < length, weights, 0.0)
        grad = (weights * (grad - delta_i[:, None])).to(q.dtype.element_ty)
        if PAIRS:
            inside = (i[:, None] < length) & (j[None, :] < length)
            tl.store(pairs_i[:, None] + j[None, :], grad, mask=inside)
        grad1 = tl.dot(grad, k1, grad1, input_precision=PRECISION)
        if D2 > 0:
            grad2 = tl.dot(grad, k2, grad2, input_precision=PRECISION)
    store_features(grad_q, gq_t, i, length, grad1 * scale, 0, D1, WIDTH)
    if D2 > 0:
        store_features(grad_q, gq_t, i, length, grad2 * scale, D1, D2, WIDTH)


@triton.jit
def attention_keys_kernel(
    q, k, v, bias, positions, lse, grad_out, delta, grad_k, grad_v, scale, length, heads, grid_width, bias_rows, center,
    q_n, q_h, q_t, k_n, k_h, k_t, v_n, v_h, v_t, go_n, go_h, go_t, gk_n, gk_h, gk_t,
    WIDTH: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KEPT: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of BLOCK_N keys and values, from all queries."""
    block, sequence = program(length, BLOCK_N)
    n, h = sequence // heads, sequence % heads
    q += head_offset(n, h, q_n, q_h, ALIGN)
    k += head_offset(n, h, k_n, k_h, ALIGN)
    v += head_offset(n, h, v_n, v_h, ALIGN)
    grad_out += head_offset(n, h, go_n, go_h, ALIGN)
    grad_k += head_offset(n, h, gk_n, gk_h, ALIGN)
    grad_v += head_offset(n, h, gk_n, gk_h, ALIGN)
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k1 = load_features(k, k_t, j, length, 0, D1, WIDTH)
    v1 = load_features(v, v_t, j, length, 0, D1, WIDTH)
    grad_k1 = tl.zeros([BLOCK_N, D1], tl.float32)
    grad_v1 = tl.zeros([BLOCK_N, D1], tl.float32)
    if D2 > 0:
        k2 = load_features(k, k_t, j, length, D1, D2, WIDTH)
        v2 = load_features(v, v_t, j, length, D1, D2, WIDTH)
        grad_k2 = tl.zeros([BLOCK_N, D2], tl.float32)
        grad_v2 = tl.zeros([BLOCK_N, D2], tl.float32)
    bias_j = bias + h * bias_rows + center - address(positions, n, j, length, grid_width, KEPT)
    for start in range(0, length, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        q1 = load_features(q, q_t, i, length, 0, D1, WIDTH)
        go1 = load_features(grad_out, go_t, i, length, 0, D1, WIDTH)
        logits = tl.dot(k1, tl.trans(q1), input_precision=PRECISION)  # of key j and query i: transposed
        grad = tl.dot(v1, tl.trans(go1), input_precision=PRECISION)
        if D2 > 0:
            q2 = load_features(q, q_t, i, length, D1, D2, WIDTH)
            go2 = load_features(grad_out, go_t, i, length, D1, D2, WIDTH)
            logits = tl.dot(k2, tl.trans(q2), logits, input_precision=PRECISION)
            grad = tl.dot(v2, tl.trans(go2), grad, input_precision=PRECISION)
        row = sequence * length + i
        # Infinity gives the queries beyond the length the weight 0.
        lse_i = tl.load(lse + row, mask=i < length, other=float("inf"))
        delta_i = tl.load(delta + row, mask=i < length, other=0.0)
        pair_bias = tl.load(bias_j[:, None] + address(positions, n, i, length, grid_width, KEPT)[None, :])
        weights = tl.exp2(logits * (scale * LOG2E) + pair_bias * LOG2E - lse_i[None, :])
        grad = (weights * (grad - delta_i[None, :])).to(q.dtype.element_ty)
        weights = weights.to(v.dtype.element_ty)
        grad_v1 = tl.dot(weights, go1, grad_v1, input_precision=PRECISION)
        grad_k1 = tl.dot(grad, q1, grad_k1, input_precision=PRECISION)
        if D2 > 0:
            grad_v2 = tl.dot(weights, go2, grad_v2, input_precision=PRECISION)
            grad_k2 = tl.dot(grad, q2, grad_k2, input_precision=PRECISION)
    store_features(grad_k, gk_t, j, length, grad_k1 * scale, 0, D1, WIDTH)
    store_features(grad_v, gk_t, j, length, grad_v1, 0, D1, WIDTH)
    if D2 > 0:
        store_features(grad_k, gk_t, j, length, grad_k2 * scale, D1, D2, WIDTH)
        store_features(grad_v, gk_t, j, length, grad_v2, D1, D2, WIDTH)


@triton.jit
def sum_samples_kernel(
    grad_pairs, slots, dense, num_samples, length, heads, tokens, pairs_stride,
    SAMPLES: tl.constexpr, BLOCK: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Add up the gradients of BLOCK pairs of positions over all samples, SAMPLES at a time, for one head."""
    pair, h = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    i, j = pair // tokens, pair % tokens
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_samples, SAMPLES):
        n = start + tl.arange(0, SAMPLES)
        inside = (n < num_samples)[:, None] & (i < tokens)[None, :]
        slot_i, slot_j = i[None, :], j[None, :]
        if KEPT:  # where the sample has the two positions, if it kept them
            slot_i = tl.load(slots + n[:, None] * tokens + slot_i, mask=inside, other=length).to(tl.int32)
            slot_j = tl.load(slots + n[:, None] * tokens + slot_j, mask=inside, other=length).to(tl.int32)
            inside = inside & (slot_i < length) & (slot_j < length)
        row = (n[:, None] * heads + h).to(tl.int64) * length + slot_i
        total += tl.sum(tl.load(grad_pairs + row * pairs_stride + slot_j, mask=inside, other=0.0).to(tl.float32), 0)
    tl.store(dense + h.to(tl.int64) * tokens * tokens + pair, total, mask=i < tokens)


@triton.jit
def fold_pairs_kernel(
    dense, grad_table, heads, tokens, grid_height, grid_width, rows, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Add up the pairs of each offset: ROWS rows of the table, BLOCK queries at a time, for one head."""
    row, h = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    dense += h.to(tl.int64) * tokens * tokens
    down = row // (2 * grid_width - 1) - (grid_height - 1)
    right = row % (2 * grid_width - 1) - (grid_width - 1)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, tokens, BLOCK):
        i = start + tl.arange(0, BLOCK)
        y = (i // grid_width)[:, None] - down[None, :]  # of the key
        x = (i % grid_width)[:, None] - right[None, :]
        inside = (y >= 0) & (y < grid_height) & (x >= 0) & (x < grid_width)
        inside = inside & (i < tokens)[:, None] & (row < rows)[None, :]
        total += tl.sum(tl.load(dense + i[:, None] * tokens + y * grid_width + x, mask=inside, other=0.0), 0)
    tl.store(grad_table + row * heads + h, total, mask=row < rows)
