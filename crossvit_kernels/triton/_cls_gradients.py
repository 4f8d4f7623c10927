"""What cls_cross_attention's gradient does with one row per image, before and after the pass over the tokens."""

import triton
import triton.language as tl

from ._cls_rows import combine_splits, load_tile, load_vector
from ._math import product


@triton.jit
def value_gradient(
    grad_out_ptr,
    norm_weight_ptr,
    v_weight_ptr,
    key_query_ptr,
    context_ptr,
    pairs_ptr,
    means_ptr,
    delta_ptr,
    weight_parts_ptr,
    bias_parts_ptr,
    batch,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """For 16 images and one head: g = W_v^T dout, and of it what `token_gradient` takes.

    weight_parts, bias_parts: the sums over these images of g z and g, rows of the norm's gradients; None: not needed.
    """
    head = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)
    valid = rows < batch
    HEADS: tl.constexpr = D // HEAD
    MASK_HEAD: tl.constexpr = HEAD % HEAD_BLOCK != 0
    MASK_K: tl.constexpr = D % BLOCK_K != 0
    dtype: tl.constexpr = v_weight_ptr.dtype.element_ty
    grads = ()
    for j0 in tl.static_range(0, HEAD, HEAD_BLOCK):
        j = j0 + tl.arange(0, HEAD_BLOCK)
        at = grad_out_ptr + rows[:, None] * D + (head * HEAD + j)[None, :]
        grads = grads + (load_tile(at, valid, j < HEAD, True, MASK_HEAD).to(dtype),)
    delta = tl.zeros((16,), tl.float32)
    mean_u = tl.zeros((16,), tl.float32)
    mean_dz = tl.zeros((16,), tl.float32)
    part = (tl.program_id(0) * HEADS + head).to(tl.int64) * D
    of_head = ((rows * HEADS + head) * D)[:, None]
    of_pair = ((rows * HEADS + head) * 2 * D)[:, None]
    for k in tl.range(0, D, BLOCK_K, num_stages=STAGES):  # said here, for z and u: no product takes them
        c = k + tl.arange(0, BLOCK_K)
        inside = valid[:, None] & (c < D)[None, :]
        g = tl.zeros((16, BLOCK_K), tl.float32)
        for j0 in tl.static_range(0, HEAD, HEAD_BLOCK):
            j = j0 + tl.arange(0, HEAD_BLOCK)
            weights = v_weight_ptr + (head * HEAD + j)[:, None] * D + c[None, :]
            weight = load_tile(weights, j < HEAD, c < D, MASK_HEAD, MASK_K)
            g = product(grads[j0 // HEAD_BLOCK], weight, g, PRECISION)
        gamma = load_vector(norm_weight_ptr, c, c < D, 1.0)[None, :]
        z = load_tile(context_ptr + of_head + c[None, :], valid, c < D, True, MASK_K)
        u = load_tile(key_query_ptr + of_head + c[None, :], valid, c < D, True, MASK_K)
        u = (u * gamma).to(dtype)
        dz = (g * gamma).to(dtype)
        tl.store(pairs_ptr + of_pair + c[None, :], u, mask=inside)
        tl.store(pairs_ptr + of_pair + D + c[None, :], dz, mask=inside)
        mean_u += tl.sum(u.to(tl.float32), 1)
        mean_dz += tl.sum(dz.to(tl.float32), 1)
        delta += tl.sum(dz.to(tl.float32) * z, 1)
        if weight_parts_ptr is not None:
            tl.store(weight_parts_ptr + part + c, tl.sum(tl.where(inside, g * z, 0.0), 0), mask=c < D)
        if bias_parts_ptr is not None:
            tl.store(bias_parts_ptr + part + c, tl.sum(tl.where(inside, g, 0.0), 0), mask=c < D)
    tl.store(delta_ptr + rows * HEADS + head, delta, mask=valid)
    tl.store(means_ptr + (rows * HEADS + head) * 2, mean_u / D, mask=valid)
    tl.store(means_ptr + (rows * HEADS + head) * 2 + 1, mean_dz / D, mask=valid)


@triton.jit
def query_gradient(
    partial_ptr,
    sums_ptr,
    norm_weight_ptr,
    k_weight_ptr,
    key_query_ptr,
    grad_query_ptr,
    weight_parts_ptr,
    batch,
    splits,
    scale,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """For ROWS images and one head: t, joined from SPLITS_BLOCK > 1 splits, and the query's gradient W_k gamma t scale.

    weight_parts: the sums over these images of t W_k^T query; None: not needed.
    """
    head = tl.program_id(1)
    HEADS: tl.constexpr = D // HEAD
    if SPLITS_BLOCK > 1:
        images = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        shares = tl.full((ROWS, SPLITS_BLOCK), 1.0, tl.float32)
        combine_splits(
            partial_ptr, sums_ptr, images, images < batch, head, shares, splits, D, HEADS, SPLITS_BLOCK, BLOCK_K
        )
        tl.debug_barrier()  # other threads of this program wrote the sums
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, 16)
    valid = (rows < batch) & (tl.arange(0, 16) < ROWS)
    dtype: tl.constexpr = k_weight_ptr.dtype.element_ty
    MASK_HEAD: tl.constexpr = HEAD % HEAD_BLOCK != 0
    MASK_K: tl.constexpr = D % BLOCK_K != 0
    of_head = ((rows * HEADS + head) * D)[:, None]
    part = (tl.program_id(0) * HEADS + head).to(tl.int64) * D
    for j0 in tl.static_range(0, HEAD, HEAD_BLOCK):
        j = j0 + tl.arange(0, HEAD_BLOCK)
        weights = k_weight_ptr + (head * HEAD + j)[:, None] * D
        grad = tl.zeros((16, HEAD_BLOCK), tl.float32)
        for k in tl.range(0, D, BLOCK_K, num_stages=3):
            c = k + tl.arange(0, BLOCK_K)
            t = load_tile(sums_ptr + of_head + c[None, :], valid, c < D, True, MASK_K)
            if weight_parts_ptr is not None and j0 == 0:
                a = load_tile(key_query_ptr + of_head + c[None, :], valid, c < D, True, MASK_K)
                tl.store(weight_parts_ptr + part + c, tl.sum(a * t, 0), mask=c < D)
            t = t * load_vector(norm_weight_ptr, c, c < D, 1.0)[None, :]
            weight = load_tile(weights + c[None, :], j < HEAD, c < D, MASK_HEAD, MASK_K)
            grad = product(t.to(dtype), weight.T, grad, PRECISION)
        tl.store(
            grad_query_ptr + rows[:, None] * D + (head * HEAD + j)[None, :],
            grad * scale,
            mask=valid[:, None] & (j < HEAD)[None, :],
        )


@triton.jit
def normalized_cls(
    cls_ptr, mean_ptr, rstd_ptr, rows, valid, c, cls_stride, tokens, D: tl.constexpr, BLOCK: tl.constexpr
):
    """x^_0 of these images, in some columns."""
    mean = tl.load(mean_ptr + rows * tokens, mask=valid, other=0.0)
    rstd = tl.load(rstd_ptr + rows * tokens, mask=valid, other=0.0)
    x = load_tile(cls_ptr + rows[:, None] * cls_stride + c[None, :], valid, c < D, True, D % BLOCK != 0)
    x = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
    return tl.where((c < D)[None, :], x, 0.0)


@triton.jit
def query_input_gradient(
    grad_query_ptr,
    q_weight_ptr,
    cls_ptr,
    mean_ptr,
    rstd_ptr,
    grad_input_ptr,
    weight_parts_ptr,
    bias_parts_ptr,
    batch,
    cls_stride,
    tokens,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """For 16 images and BLOCK_E columns: dy_0 = W_q^T dquery.

    weight_parts, bias_parts: the sums over these images of dy_0 x^_0 and dy_0; None: not needed.
    """
    rows = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)
    valid = rows < batch
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    dtype: tl.constexpr = q_weight_ptr.dtype.element_ty
    grad = tl.zeros((16, BLOCK_E), tl.float32)
    for k in tl.range(0, D, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        dq = load_tile(grad_query_ptr + rows[:, None] * D + c[None, :], valid, c < D, True, D % BLOCK_K != 0)
        weights = q_weight_ptr + c[:, None] * D + e[None, :]
        weight = load_tile(weights, c < D, e < D, D % BLOCK_K != 0, D % BLOCK_E != 0)
        grad = product(dq.to(dtype), weight, grad, PRECISION)
    inside = valid[:, None] & (e < D)[None, :]
    tl.store(grad_input_ptr + rows[:, None] * D + e[None, :], grad, mask=inside)
    part = tl.program_id(0).to(tl.int64) * D + e
    if weight_parts_ptr is not None:
        x = normalized_cls(cls_ptr, mean_ptr, rstd_ptr, rows, valid, e, cls_stride, tokens, D, BLOCK_E)
        tl.store(weight_parts_ptr + part, tl.sum(tl.where(inside, grad * x, 0.0), 0), mask=e < D)
    if bias_parts_ptr is not None:
        tl.store(bias_parts_ptr + part, tl.sum(tl.where(inside, grad, 0.0), 0), mask=e < D)


@triton.jit
def _outer_products(
    left_ptr,
    wide_ptr,
    cls_ptr,
    mean_ptr,
    rstd_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    out_ptr,
    batch,
    cls_stride,
    tokens,
    scale,
    CLS: tl.constexpr,
    SHIFT: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """sum_b (scale left_b) (gamma wide_b [+ beta])^T for HEAD_BLOCK rows of one head and BLOCK_E columns; beta where
    SHIFT, and where CLS `wide` is x^_0."""
    column_blocks: tl.constexpr = (D + BLOCK_E - 1) // BLOCK_E
    row_blocks: tl.constexpr = (HEAD + HEAD_BLOCK - 1) // HEAD_BLOCK
    block = tl.program_id(0) // column_blocks
    head = block // row_blocks
    j = block % row_blocks * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    e = tl.program_id(0) % column_blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    gamma = load_vector(norm_weight_ptr, e, e < D, 1.0)[None, :]
    beta = load_vector(norm_bias_ptr, e, (e < D) & SHIFT, 0.0)[None, :]
    grad = tl.zeros((HEAD_BLOCK, BLOCK_E), tl.float32)
    for b0 in tl.range(0, batch, BLOCK_B):
        b = tl.cast(b0, tl.int64) + tl.arange(0, BLOCK_B)
        valid = b < batch
        left = left_ptr + b[:, None] * D + (head * HEAD + j)[None, :]
        left = load_tile(left, valid, j < HEAD, True, HEAD % HEAD_BLOCK != 0).to(tl.float32) * scale
        if CLS:
            wide = normalized_cls(cls_ptr, mean_ptr, rstd_ptr, b, valid, e, cls_stride, tokens, D, BLOCK_E)
        else:
            wide = wide_ptr + ((b * (D // HEAD) + head) * D)[:, None] + e[None, :]
            wide = load_tile(wide, valid, e < D, True, D % BLOCK_E != 0)
        wide = tl.where(valid[:, None], wide * gamma + beta, 0.0)
        grad = product(left.to(DTYPE).T, wide.to(DTYPE), grad, PRECISION)
    out = out_ptr + (head * HEAD + j)[:, None] * D + e[None, :]
    tl.store(out, grad.to(out_ptr.dtype.element_ty), mask=(j < HEAD)[:, None] & (e < D)[None, :])


@triton.jit
def weight_gradients(
    grad_out_ptr,
    context_ptr,
    query_ptr,
    sums_ptr,
    grad_query_ptr,
    cls_ptr,
    mean_ptr,
    rstd_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    batch,
    cls_stride,
    tokens,
    scale,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The gradient of W_q, W_k or W_v, by program_id(1), from all images; HEAD_BLOCK rows of a head, BLOCK_E columns:

    dW_q = sum_b dq y_0^T      dW_k,h = sum_b q_h scale (gamma t_h)^T      dW_v,h = sum_b dout_h (gamma z_h + beta)^T

    A gradient's pointer None: not needed.
    """
    which = tl.program_id(1)
    if which == 0:
        if grad_q_ptr is not None:
            _outer_products(
                grad_query_ptr, sums_ptr, cls_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, grad_q_ptr,
                batch, cls_stride, tokens, 1.0, True, True, D, HEAD, HEAD_BLOCK, DTYPE, PRECISION, BLOCK_B, BLOCK_E,
            )  # fmt: skip
    elif which == 1:
        if grad_k_ptr is not None:
            _outer_products(
                query_ptr, sums_ptr, cls_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, grad_k_ptr,
                batch, cls_stride, tokens, scale, False, False, D, HEAD, HEAD_BLOCK, DTYPE, PRECISION, BLOCK_B, BLOCK_E,
            )  # fmt: skip
    else:
        if grad_v_ptr is not None:
            _outer_products(
                grad_out_ptr, context_ptr, cls_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, grad_v_ptr,
                batch, cls_stride, tokens, 1.0, False, True, D, HEAD, HEAD_BLOCK, DTYPE, PRECISION, BLOCK_B, BLOCK_E,
            )  # fmt: skip


@triton.jit
def _sum_rows(parts_ptr, rows, e, inside, out_ptr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr):
    """The sum of all rows of (rows, D), in these columns."""
    total = tl.zeros((BLOCK_E,), tl.float32)
    for r0 in tl.range(0, rows, BLOCK_R, num_stages=3):
        r = tl.cast(r0, tl.int64) + tl.arange(0, BLOCK_R)
        part = load_tile(parts_ptr + r[:, None] * D + e[None, :], r < rows, inside, True, D % BLOCK_E != 0)
        total += tl.sum(part.to(tl.float32), 0)
    tl.store(out_ptr + e, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _value_bias(
    grad_out_ptr,
    probs_ptr,
    batch,
    tokens,
    e,
    inside,
    out_ptr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The sum of the batch's dout. The probabilities sum to one, unless they are not numbers, which this must not be
    either, then."""
    total = tl.zeros((BLOCK_E,), tl.float32)
    for b0 in tl.range(0, batch, BLOCK_R, num_stages=3):
        b = tl.cast(b0, tl.int64) + tl.arange(0, BLOCK_R)
        there = (b < batch)[:, None] & inside[None, :]
        grad = tl.load(grad_out_ptr + b[:, None] * D + e[None, :], mask=there, other=0.0).to(tl.float32)
        of_head = (b[:, None] * (D // HEAD) + (e // HEAD)[None, :]) * tokens
        total += tl.sum(grad + tl.load(probs_ptr + of_head, mask=there, other=0.0) * 0.0, 0)
    tl.store(out_ptr + e, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _cls_gradient(
    cls_ptr,
    mean_ptr,
    rstd_ptr,
    norm_weight_ptr,
    grad_normalized_ptr,
    grad_input_ptr,
    out_ptr,
    batch,
    cls_stride,
    tokens,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Through the LayerNorm of 4 images' CLS tokens: as one of the tokens, and as the query's input."""
    rows = tl.program_id(0).to(tl.int64) * 4 + tl.arange(0, 4)
    valid = rows < batch
    xs = ()
    gs = ()
    along_one = tl.zeros((4,), tl.float32)
    along_x = tl.zeros((4,), tl.float32)
    for k in tl.static_range(0, D, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        x = normalized_cls(cls_ptr, mean_ptr, rstd_ptr, rows, valid, c, cls_stride, tokens, D, BLOCK_K)
        at = rows[:, None] * D + c[None, :]
        g = load_tile(grad_input_ptr + at, valid, c < D, True, D % BLOCK_K != 0)
        g = g * load_vector(norm_weight_ptr, c, c < D, 1.0)[None, :]
        g += load_tile(grad_normalized_ptr + at, valid, c < D, True, D % BLOCK_K != 0)
        along_one += tl.sum(g, 1)
        along_x += tl.sum(g * x, 1)
        xs = xs + (x,)
        gs = gs + (g,)
    rstd = tl.load(rstd_ptr + rows * tokens, mask=valid, other=0.0)
    for k in tl.static_range(0, D, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        g = (gs[k // BLOCK_K] - (along_one / D)[:, None]) - xs[k // BLOCK_K] * (along_x / D)[:, None]
        tl.store(
            out_ptr + rows[:, None] * D + c[None, :],
            (g * rstd[:, None]).to(out_ptr.dtype.element_ty),
            mask=valid[:, None] & (c < D)[None, :],
        )


@triton.jit
def finish_gradients(
    weight_parts_ptr,
    bias_parts_ptr,
    grad_query_ptr,
    grad_out_ptr,
    probs_ptr,
    cls_ptr,
    mean_ptr,
    rstd_ptr,
    norm_weight_ptr,
    grad_normalized_ptr,
    grad_input_ptr,
    grad_norm_weight_ptr,
    grad_norm_bias_ptr,
    grad_q_bias_ptr,
    grad_v_bias_ptr,
    grad_cls_ptr,
    weight_rows,
    bias_rows,
    batch,
    cls_stride,
    tokens,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What is left, by program_id(1): four sums over rows, in BLOCK_E columns, and for 4 images the gradient of cls.

    A gradient's pointer None: not needed.
    """
    which = tl.program_id(1)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < D
    if which == 0:
        if grad_norm_weight_ptr is not None:
            _sum_rows(weight_parts_ptr, weight_rows, e, inside, grad_norm_weight_ptr, D, BLOCK_R, BLOCK_E)
    elif which == 1:
        if grad_norm_bias_ptr is not None:
            _sum_rows(bias_parts_ptr, bias_rows, e, inside, grad_norm_bias_ptr, D, BLOCK_R, BLOCK_E)
    elif which == 2:
        if grad_q_bias_ptr is not None:
            _sum_rows(grad_query_ptr, batch, e, inside, grad_q_bias_ptr, D, BLOCK_R, BLOCK_E)
    elif which == 3:
        if grad_v_bias_ptr is not None:
            _value_bias(grad_out_ptr, probs_ptr, batch, tokens, e, inside, grad_v_bias_ptr, D, HEAD, BLOCK_R, BLOCK_E)
    else:
        if grad_cls_ptr is not None:
            _cls_gradient(
                cls_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, grad_normalized_ptr, grad_input_ptr, grad_cls_ptr, batch,
                cls_stride, tokens, D, BLOCK_K,
            )  # fmt: skip
