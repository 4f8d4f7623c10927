"""The gradients of cls_cross_attention that are sums over the images: of the projections' weights, and what is left."""

import triton
import triton.language as tl

from .arithmetic import product
from .cls_cross_attention_backward import normalized_cls
from .tiles import load_tile, load_vector


@triton.jit
def outer_products(
    left_ptr,
    right_ptr,
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
    """HEAD_BLOCK rows of one head and BLOCK_E columns of the sum over the images b of

        (scale left_b) (gamma right_b + beta)^T

    where beta is left out unless SHIFT, and `right` is the normalized CLS token where CLS."""
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
            right = normalized_cls(cls_ptr, mean_ptr, rstd_ptr, b, valid, e, cls_stride, tokens, D, BLOCK_E)
        else:
            right = right_ptr + ((b * (D // HEAD) + head) * D)[:, None] + e[None, :]
            right = load_tile(right, valid, e < D, True, D % BLOCK_E != 0)
        right = tl.where(valid[:, None], right * gamma + beta, 0.0)
        grad = product(left.to(DTYPE).T, right.to(DTYPE), grad, PRECISION)
    out = out_ptr + (head * HEAD + j)[:, None] * D + e[None, :]
    tl.store(out, grad.to(out_ptr.dtype.element_ty), mask=(j < HEAD)[:, None] & (e < D)[None, :])


@triton.jit
def projection_gradients(
    grad_out_ptr,
    context_ptr,
    query_ptr,
    grad_u_ptr,
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
    """The gradient of W_q, W_k or W_v, by program_id(1), from all images, in HEAD_BLOCK rows of a head and BLOCK_E
    columns:

        grad W_q = sum_b grad_query (gamma normalized_0 + beta)^T
        grad W_k = sum_b scale query (gamma grad_u)^T
        grad W_v = sum_b grad_out (gamma context + beta)^T

    The pointer of a gradient that is not needed is None.
    """
    which = tl.program_id(1)
    if which == 0:
        if grad_q_ptr is not None:
            outer_products(
                grad_query_ptr, grad_u_ptr, cls_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, grad_q_ptr,
                batch, cls_stride, tokens, 1.0, True, True, D, HEAD, HEAD_BLOCK, DTYPE, PRECISION, BLOCK_B, BLOCK_E,
            )  # fmt: skip
    elif which == 1:
        if grad_k_ptr is not None:
            outer_products(
                query_ptr, grad_u_ptr, cls_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, grad_k_ptr,
                batch, cls_stride, tokens, scale, False, False, D, HEAD, HEAD_BLOCK, DTYPE, PRECISION, BLOCK_B, BLOCK_E,
            )  # fmt: skip
    else:
        if grad_v_ptr is not None:
            outer_products(
                grad_out_ptr, context_ptr, cls_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, grad_v_ptr,
                batch, cls_stride, tokens, 1.0, False, True, D, HEAD, HEAD_BLOCK, DTYPE, PRECISION, BLOCK_B, BLOCK_E,
            )  # fmt: skip


@triton.jit
def sum_rows(parts_ptr, rows, e, inside, out_ptr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr):
    """The sum of all rows of (rows, D), in these columns."""
    total = tl.zeros((BLOCK_E,), tl.float32)
    for r0 in tl.range(0, rows, BLOCK_R, num_stages=3):
        r = tl.cast(r0, tl.int64) + tl.arange(0, BLOCK_R)
        part = load_tile(parts_ptr + r[:, None] * D + e[None, :], r < rows, inside, True, D % BLOCK_E != 0)
        total += tl.sum(part.to(tl.float32), 0)
    tl.store(out_ptr + e, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def value_bias_gradient(
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
    """The gradient of b_v, which is the sum of the batch's grad_out, as the probabilities sum to one; where they are
    NaN the gradient has to be NaN too."""
    total = tl.zeros((BLOCK_E,), tl.float32)
    for b0 in tl.range(0, batch, BLOCK_R, num_stages=3):
        b = tl.cast(b0, tl.int64) + tl.arange(0, BLOCK_R)
        there = (b < batch)[:, None] & inside[None, :]
        grad = tl.load(grad_out_ptr + b[:, None] * D + e[None, :], mask=there, other=0.0).to(tl.float32)
        of_head = (b[:, None] * (D // HEAD) + (e // HEAD)[None, :]) * tokens
        total += tl.sum(grad + tl.load(probs_ptr + of_head, mask=there, other=0.0) * 0.0, 0)
    tl.store(out_ptr + e, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def cls_gradient(
    cls_ptr,
    mean_ptr,
    rstd_ptr,
    norm_weight_ptr,
    grad_normalized_ptr,
    grad_query_input_ptr,
    out_ptr,
    batch,
    cls_stride,
    tokens,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of 4 images' CLS tokens through their LayerNorm: as one of the tokens, and as the query's input."""
    rows = tl.program_id(0).to(tl.int64) * 4 + tl.arange(0, 4)
    valid = rows < batch
    xs = ()
    grads = ()
    mean_grad = tl.zeros((4,), tl.float32)
    mean_grad_x = tl.zeros((4,), tl.float32)
    for k in tl.static_range(0, D, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        x = normalized_cls(cls_ptr, mean_ptr, rstd_ptr, rows, valid, c, cls_stride, tokens, D, BLOCK_K)
        at = rows[:, None] * D + c[None, :]
        grad = load_tile(grad_query_input_ptr + at, valid, c < D, True, D % BLOCK_K != 0)
        grad = grad * load_vector(norm_weight_ptr, c, c < D, 1.0)[None, :]
        grad += load_tile(grad_normalized_ptr + at, valid, c < D, True, D % BLOCK_K != 0)
        mean_grad += tl.sum(grad, 1)
        mean_grad_x += tl.sum(grad * x, 1)
        xs = xs + (x,)
        grads = grads + (grad,)
    rstd = tl.load(rstd_ptr + rows * tokens, mask=valid, other=0.0)
    for k in tl.static_range(0, D, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        grad = (grads[k // BLOCK_K] - (mean_grad / D)[:, None]) - xs[k // BLOCK_K] * (mean_grad_x / D)[:, None]
        tl.store(
            out_ptr + rows[:, None] * D + c[None, :],
            (grad * rstd[:, None]).to(out_ptr.dtype.element_ty),
            mask=valid[:, None] & (c < D)[None, :],
        )


@triton.jit
def finish_gradients(
    norm_weight_parts_ptr,
    norm_bias_parts_ptr,
    grad_query_ptr,
    grad_out_ptr,
    probs_ptr,
    cls_ptr,
    mean_ptr,
    rstd_ptr,
    norm_weight_ptr,
    grad_normalized_ptr,
    grad_query_input_ptr,
    grad_norm_weight_ptr,
    grad_norm_bias_ptr,
    grad_q_bias_ptr,
    grad_v_bias_ptr,
    grad_cls_ptr,
    norm_weight_rows,
    norm_bias_rows,
    batch,
    cls_stride,
    tokens,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradients that are left, by program_id(1): four sums over rows, in BLOCK_E columns, and for 4 images that of
    cls.

    The pointer of a gradient that is not needed is None.
    """
    which = tl.program_id(1)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < D
    if which == 0:
        if grad_norm_weight_ptr is not None:
            sum_rows(norm_weight_parts_ptr, norm_weight_rows, e, inside, grad_norm_weight_ptr, D, BLOCK_R, BLOCK_E)
    elif which == 1:
        if grad_norm_bias_ptr is not None:
            sum_rows(norm_bias_parts_ptr, norm_bias_rows, e, inside, grad_norm_bias_ptr, D, BLOCK_R, BLOCK_E)
    elif which == 2:
        if grad_q_bias_ptr is not None:
            sum_rows(grad_query_ptr, batch, e, inside, grad_q_bias_ptr, D, BLOCK_R, BLOCK_E)
    elif which == 3:
        if grad_v_bias_ptr is not None:
            value_bias_gradient(
                grad_out_ptr, probs_ptr, batch, tokens, e, inside, grad_v_bias_ptr, D, HEAD, BLOCK_R, BLOCK_E
            )
    else:
        if grad_cls_ptr is not None:
            cls_gradient(
                cls_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, grad_normalized_ptr, grad_query_input_ptr, grad_cls_ptr,
                batch, cls_stride, tokens, D, BLOCK_K,
            )  # fmt: skip
