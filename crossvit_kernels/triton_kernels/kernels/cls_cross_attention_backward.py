"""What cls_cross_attention's gradient does with one row per image, before and after the pass over the tokens."""

import triton
import triton.language as tl

from .arithmetic import product
from .cls_cross_attention import join_splits
from .tiles import load_tile, load_vector


@triton.jit
def value_gradient(
    grad_out_ptr,
    norm_weight_ptr,
    v_weight_ptr,
    key_query_ptr,
    context_ptr,
    stacked_ptr,
    stacked_means_ptr,
    delta_ptr,
    norm_weight_parts_ptr,
    norm_bias_parts_ptr,
    batch,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """For 16 images and one head: the gradient of the value's input, and from it what `token_gradient` takes.

        grad_value = W_v^T grad_out        grad_context = gamma grad_value        delta = grad_context . context

    `stacked` gets u = gamma key_query and grad_context, rounded, one row after the other, `stacked_means` the means of
    these rows. `norm_weight_parts` and `norm_bias_parts` get the sums over these images of grad_value context and of
    grad_value, which are rows of the norm's gradients; a pointer is None where they are not needed.
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
    mean_grad_context = tl.zeros((16,), tl.float32)
    part = (tl.program_id(0) * HEADS + head).to(tl.int64) * D
    of_head = ((rows * HEADS + head) * D)[:, None]
    of_stacked = ((rows * HEADS + head) * 2 * D)[:, None]
    for k in tl.range(
        0, D, BLOCK_K, num_stages=STAGES
    ):  # stages are said here for context and u, which no product takes
        c = k + tl.arange(0, BLOCK_K)
        inside = valid[:, None] & (c < D)[None, :]
        grad_value = tl.zeros((16, BLOCK_K), tl.float32)
        for j0 in tl.static_range(0, HEAD, HEAD_BLOCK):
            j = j0 + tl.arange(0, HEAD_BLOCK)
            weights = v_weight_ptr + (head * HEAD + j)[:, None] * D + c[None, :]
            weight = load_tile(weights, j < HEAD, c < D, MASK_HEAD, MASK_K)
            grad_value = product(grads[j0 // HEAD_BLOCK], weight, grad_value, PRECISION)
        gamma = load_vector(norm_weight_ptr, c, c < D, 1.0)[None, :]
        context = load_tile(context_ptr + of_head + c[None, :], valid, c < D, True, MASK_K)
        u = load_tile(key_query_ptr + of_head + c[None, :], valid, c < D, True, MASK_K)
        u = (u * gamma).to(dtype)
        grad_context = (grad_value * gamma).to(dtype)
        tl.store(stacked_ptr + of_stacked + c[None, :], u, mask=inside)
        tl.store(stacked_ptr + of_stacked + D + c[None, :], grad_context, mask=inside)
        mean_u += tl.sum(u.to(tl.float32), 1)
        mean_grad_context += tl.sum(grad_context.to(tl.float32), 1)
        delta += tl.sum(grad_context.to(tl.float32) * context, 1)
        if norm_weight_parts_ptr is not None:
            tl.store(
                norm_weight_parts_ptr + part + c, tl.sum(tl.where(inside, grad_value * context, 0.0), 0), mask=c < D
            )
        if norm_bias_parts_ptr is not None:
            tl.store(norm_bias_parts_ptr + part + c, tl.sum(tl.where(inside, grad_value, 0.0), 0), mask=c < D)
    tl.store(delta_ptr + rows * HEADS + head, delta, mask=valid)
    tl.store(stacked_means_ptr + (rows * HEADS + head) * 2, mean_u / D, mask=valid)
    tl.store(stacked_means_ptr + (rows * HEADS + head) * 2 + 1, mean_grad_context / D, mask=valid)


@triton.jit
def query_gradient(
    split_grad_u_ptr,
    grad_u_ptr,
    norm_weight_ptr,
    k_weight_ptr,
    key_query_ptr,
    grad_query_ptr,
    norm_weight_parts_ptr,
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
    """For ROWS images and one head: grad_u, joined from SPLITS_BLOCK > 1 splits, and the query's gradient.

        grad_query = W_k (gamma grad_u) scale

    `norm_weight_parts` gets the sums over these images of grad_u key_query; its pointer is None where they
    are not needed.
    """
    head = tl.program_id(1)
    HEADS: tl.constexpr = D // HEAD
    if SPLITS_BLOCK > 1:
        images = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        shares = tl.full((ROWS, SPLITS_BLOCK), 1.0, tl.float32)
        join_splits(
            split_grad_u_ptr, grad_u_ptr, images, images < batch, head, shares, splits, D, HEADS, SPLITS_BLOCK, BLOCK_K
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
            grad_u = load_tile(grad_u_ptr + of_head + c[None, :], valid, c < D, True, MASK_K)
            if norm_weight_parts_ptr is not None and j0 == 0:
                key_query = load_tile(key_query_ptr + of_head + c[None, :], valid, c < D, True, MASK_K)
                tl.store(norm_weight_parts_ptr + part + c, tl.sum(key_query * grad_u, 0), mask=c < D)
            grad_u = grad_u * load_vector(norm_weight_ptr, c, c < D, 1.0)[None, :]
            weight = load_tile(weights + c[None, :], j < HEAD, c < D, MASK_HEAD, MASK_K)
            grad = product(grad_u.to(dtype), weight.T, grad, PRECISION)
        tl.store(
            grad_query_ptr + rows[:, None] * D + (head * HEAD + j)[None, :],
            grad * scale,
            mask=valid[:, None] & (j < HEAD)[None, :],
        )


@triton.jit
def normalized_cls(
    cls_ptr, mean_ptr, rstd_ptr, rows, valid, c, cls_stride, tokens, D: tl.constexpr, BLOCK: tl.constexpr
):
    """The normalized CLS tokens of these images, in some columns."""
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
    grad_query_input_ptr,
    norm_weight_parts_ptr,
    norm_bias_parts_ptr,
    batch,
    cls_stride,
    tokens,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """For 16 images and BLOCK_E columns: the gradient of the query projection's input.

        grad_query_input = W_q^T grad_query

    `norm_weight_parts` and `norm_bias_parts` get the sums over these images of grad_query_input times the normalized
    CLS token and of grad_query_input; a pointer is None where they are not needed.
    """
    rows = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)
    valid = rows < batch
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    dtype: tl.constexpr = q_weight_ptr.dtype.element_ty
    grad = tl.zeros((16, BLOCK_E), tl.float32)
    for k in tl.range(0, D, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        grad_query = load_tile(grad_query_ptr + rows[:, None] * D + c[None, :], valid, c < D, True, D % BLOCK_K != 0)
        weights = q_weight_ptr + c[:, None] * D + e[None, :]
        weight = load_tile(weights, c < D, e < D, D % BLOCK_K != 0, D % BLOCK_E != 0)
        grad = product(grad_query.to(dtype), weight, grad, PRECISION)
    inside = valid[:, None] & (e < D)[None, :]
    tl.store(grad_query_input_ptr + rows[:, None] * D + e[None, :], grad, mask=inside)
    part = tl.program_id(0).to(tl.int64) * D + e
    if norm_weight_parts_ptr is not None:
        x = normalized_cls(cls_ptr, mean_ptr, rstd_ptr, rows, valid, e, cls_stride, tokens, D, BLOCK_E)
        tl.store(norm_weight_parts_ptr + part, tl.sum(tl.where(inside, grad * x, 0.0), 0), mask=e < D)
    if norm_bias_parts_ptr is not None:
        tl.store(norm_bias_parts_ptr + part, tl.sum(tl.where(inside, grad, 0.0), 0), mask=e < D)
