"""The steps of cls_cross_attention's backward around its pass over the tokens: those with one row per image before and
behind it, and those that are sums over the images. A pointer is None where what would go there is not needed."""

import triton
import triton.language as tl

from ..tiling import head_block
from .arithmetic import product
from .cls_cross_attention import join_splits
from .layer_norm import normalized_cls
from .tiles import load_columns, load_head, load_tile, load_vector, store_inside


@triton.jit
def value_gradient(
    grad_out_ptr, norm_weight_ptr, v_weight_ptr, key_query_ptr, context_ptr,
    stacked_ptr, stacked_means_ptr, delta_ptr, parts, batch,
    D: tl.constexpr, HEAD: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """For 16 images and one head: the gradient of the value's input, and from it what `token_gradient` takes.

        grad_value = W_v^T grad_out        grad_context = gamma grad_value        delta = grad_context . context

    `stacked` gets u = gamma key_query and grad_context, rounded, one row after the other, `stacked_means` the means of
    these rows. `parts` gets the sums over these images of grad_value context and of grad_value.
    """
    head = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)
    valid = rows < batch
    HEADS: tl.constexpr = D // HEAD
    HEAD_BLOCK: tl.constexpr = head_block(HEAD)
    dtype: tl.constexpr = v_weight_ptr.dtype.element_ty
    grads = ()
    for j0 in tl.static_range(0, HEAD, HEAD_BLOCK):
        j = j0 + tl.arange(0, HEAD_BLOCK)
        grads = grads + (load_columns(grad_out_ptr + rows * D + head * HEAD, valid, j, HEAD).to(dtype),)
    delta = tl.zeros((16,), tl.float32)
    mean_u = tl.zeros((16,), tl.float32)
    mean_grad_context = tl.zeros((16,), tl.float32)
    part = (tl.program_id(0) * HEADS + head).to(tl.int64) * D
    of_head = rows * HEADS + head
    stacked_at = stacked_ptr + (of_head * 2 * D)[:, None]
    # The stages are said here for context and u, which no product takes.
    for k in tl.range(0, D, BLOCK_K, num_stages=STAGES):
        c = k + tl.arange(0, BLOCK_K)
        inside = valid[:, None] & (c < D)[None, :]
        grad_value = tl.zeros((16, BLOCK_K), tl.float32)
        for i in tl.static_range(len(grads)):
            j = i * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
            grad_value = product(grads[i], load_head(v_weight_ptr, head, j, c, D, HEAD), grad_value, PRECISION)
        gamma = load_vector(norm_weight_ptr, c, c < D)[None, :]
        context = load_columns(context_ptr + of_head * D, valid, c, D)
        u = (load_columns(key_query_ptr + of_head * D, valid, c, D) * gamma).to(dtype)
        grad_context = (grad_value * gamma).to(dtype)
        tl.store(stacked_at + c[None, :], u, mask=inside)
        tl.store(stacked_at + D + c[None, :], grad_context, mask=inside)
        mean_u += tl.sum(u.to(tl.float32), 1)
        mean_grad_context += tl.sum(grad_context.to(tl.float32), 1)
        delta += tl.sum(grad_context.to(tl.float32) * context, 1)
        store_part(parts.weight, part, c, grad_value * context, inside, D)
        store_part(parts.bias, part, c, grad_value, inside, D)
    tl.store(delta_ptr + of_head, delta, mask=valid)
    tl.store(stacked_means_ptr + of_head * 2, mean_u / D, mask=valid)
    tl.store(stacked_means_ptr + of_head * 2 + 1, mean_grad_context / D, mask=valid)


@triton.jit
def store_part(parts_ptr, part, c, grads, inside, D: tl.constexpr):
    """Stores sums over the rows of `grads`, as far as they are inside, to columns c of the row of parts at `part`."""
    if parts_ptr is not None:
        tl.store(parts_ptr + part + c, tl.sum(tl.where(inside, grads, 0.0), 0), mask=c < D)


@triton.jit
def query_gradient(
    split_grad_u_ptr, grad_u_ptr, norm_weight_ptr, k_weight_ptr, key_query_ptr, grad_query_ptr, parts,
    batch, splits, scale,
    D: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, SPLITS_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """For ROWS images and one head: grad_u, joined from SPLITS_BLOCK > 1 splits, and the query's gradient.

        grad_query = W_k (gamma grad_u) scale

    `parts` gets the sums over these images of grad_u key_query, for gamma alone.
    """
    head = tl.program_id(1)
    HEADS: tl.constexpr = D // HEAD
    HEAD_BLOCK: tl.constexpr = head_block(HEAD)
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
    of_head = (rows * HEADS + head) * D
    part = (tl.program_id(0) * HEADS + head).to(tl.int64) * D
    for j0 in tl.static_range(0, HEAD, HEAD_BLOCK):
        j = j0 + tl.arange(0, HEAD_BLOCK)
        grad = tl.zeros((16, HEAD_BLOCK), tl.float32)
        for k in tl.range(0, D, BLOCK_K, num_stages=3):
            c = k + tl.arange(0, BLOCK_K)
            grad_u = load_columns(grad_u_ptr + of_head, valid, c, D)
            if parts.weight is not None and j0 == 0:
                key_query = load_columns(key_query_ptr + of_head, valid, c, D)
                tl.store(parts.weight + part + c, tl.sum(key_query * grad_u, 0), mask=c < D)
            grad_u = grad_u * load_vector(norm_weight_ptr, c, c < D)[None, :]
            grad = product(grad_u.to(dtype), load_head(k_weight_ptr, head, j, c, D, HEAD).T, grad, PRECISION)
        store_inside(grad_query_ptr + rows * D, valid, head * HEAD + j, j < HEAD, grad * scale)


@triton.jit
def query_input_gradient(
    grad_query_ptr, q_weight_ptr, cls, norm, tokens, grad_query_input_ptr, parts, batch,
    D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """For 16 images and BLOCK_E columns: the gradient of the query projection's input.

        grad_query_input = W_q^T grad_query

    `parts` gets the sums over these images of grad_query_input times the normalized CLS token and of grad_query_input.
    """
    rows = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)
    valid = rows < batch
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    dtype: tl.constexpr = q_weight_ptr.dtype.element_ty
    grad = tl.zeros((16, BLOCK_E), tl.float32)
    for k in tl.range(0, D, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        grad_query = load_columns(grad_query_ptr + rows * D, valid, c, D)
        weight_at = q_weight_ptr + c[:, None] * D + e[None, :]
        weight = load_tile(weight_at, c < D, e < D, D % BLOCK_K != 0, D % BLOCK_E != 0)
        grad = product(grad_query.to(dtype), weight, grad, PRECISION)
    inside = valid[:, None] & (e < D)[None, :]
    tl.store(grad_query_input_ptr + rows[:, None] * D + e[None, :], grad, mask=inside)
    part = tl.program_id(0).to(tl.int64) * D
    if parts.weight is not None:
        x, _ = normalized_cls(cls, norm, tokens, rows, valid, e, D)
        store_part(parts.weight, part, e, grad * x, inside, D)
    store_part(parts.bias, part, e, grad, inside, D)


@triton.jit
def outer_products(left_ptr, right_ptr, cls, norm, tokens, beta_ptr, out_ptr, batch, scale, D: tl.constexpr,
                   HEAD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr,
                   BLOCK_E: tl.constexpr):  # fmt: skip
    """Some rows of one head and BLOCK_E columns of the sum over the images b of

        (scale left_b) (gamma right_b + beta)^T

    with the gamma of `norm`; beta may be None, and `right` is the normalized CLS token if its pointer is None."""
    HEAD_BLOCK: tl.constexpr = head_block(HEAD)
    column_blocks: tl.constexpr = (D + BLOCK_E - 1) // BLOCK_E
    row_blocks: tl.constexpr = (HEAD + HEAD_BLOCK - 1) // HEAD_BLOCK
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    block = tl.program_id(0) // column_blocks
    head = block // row_blocks
    j = block % row_blocks * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    e = tl.program_id(0) % column_blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    gamma = load_vector(norm.weight, e, e < D)[None, :]
    beta = load_vector(beta_ptr, e, e < D)[None, :]
    grad = tl.zeros((HEAD_BLOCK, BLOCK_E), tl.float32)
    for b0 in tl.range(0, batch, BLOCK_B):
        b = tl.cast(b0, tl.int64) + tl.arange(0, BLOCK_B)
        valid = b < batch
        left = load_columns(left_ptr + b * D + head * HEAD, valid, j, HEAD).to(tl.float32) * scale
        if right_ptr is None:
            right, _ = normalized_cls(cls, norm, tokens, b, valid, e, D)
        else:
            right = load_columns(right_ptr + (b * (D // HEAD) + head) * D, valid, e, D)
        right = tl.where(valid[:, None], right * gamma + beta, 0.0)
        grad = product(left.to(dtype).T, right.to(dtype), grad, PRECISION)
    store_inside(out_ptr + (head * HEAD + j) * D, j < HEAD, e, e < D, grad)


@triton.jit
def projection_gradients(
    grad_out_ptr, context_ptr, query_ptr, grad_u_ptr, grad_query_ptr, cls, norm, tokens, grad_weights, batch, scale,
    D: tl.constexpr, HEAD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The gradient of W_q, W_k or W_v, by program_id(1), from all images, in some rows of a head and BLOCK_E columns:

        grad W_q = sum_b grad_query (gamma normalized_0 + beta)^T
        grad W_k = sum_b scale query (gamma grad_u)^T
        grad W_v = sum_b grad_out (gamma context + beta)^T

    Those that are not needed are left out.
    """
    which = tl.program_id(1)
    if which == 0:
        if grad_weights.q is not None:
            outer_products(
                grad_query_ptr, None, cls, norm, tokens, norm.bias, grad_weights.q,
                batch, 1.0, D, HEAD, PRECISION, BLOCK_B, BLOCK_E,
            )  # fmt: skip
    elif which == 1:
        if grad_weights.k is not None:
            outer_products(
                query_ptr, grad_u_ptr, cls, norm, tokens, None, grad_weights.k,
                batch, scale, D, HEAD, PRECISION, BLOCK_B, BLOCK_E,
            )  # fmt: skip
    else:
        if grad_weights.v is not None:
            outer_products(
                grad_out_ptr, context_ptr, cls, norm, tokens, norm.bias, grad_weights.v,
                batch, 1.0, D, HEAD, PRECISION, BLOCK_B, BLOCK_E,
            )  # fmt: skip


@triton.jit
def sum_rows(rows_ptr, count, e, probs_ptr, probs_row, out_ptr, D: tl.constexpr, HEAD: tl.constexpr,
             BLOCK_R: tl.constexpr):  # fmt: skip
    """The sum of all rows of (count, D), in these columns, and NaN where one of a column's probabilities is, if these
    are given: those of an image's CLS token stand for all."""
    total = tl.zeros(e.shape, tl.float32)
    for r0 in tl.range(0, count, BLOCK_R, num_stages=3):
        r = tl.cast(r0, tl.int64) + tl.arange(0, BLOCK_R)
        row = load_columns(rows_ptr + r * D, r < count, e, D).to(tl.float32)
        if probs_ptr is not None:
            probs_at = probs_ptr + (r[:, None] * (D // HEAD) + (e // HEAD)[None, :]) * probs_row
            row += tl.load(probs_at, mask=(r < count)[:, None] & (e < D)[None, :], other=0.0) * 0.0
        total += tl.sum(row, 0)
    tl.store(out_ptr + e, total.to(out_ptr.dtype.element_ty), mask=e < D)


@triton.jit
def cls_gradient(cls, norm, tokens, grad_normalized_ptr, grad_query_input_ptr, out_ptr, batch, D: tl.constexpr,
                 BLOCK_K: tl.constexpr):  # fmt: skip
    """The gradient of 4 images' CLS tokens through their LayerNorm: as one of the tokens, and as the query's input."""
    rows = tl.program_id(0).to(tl.int64) * 4 + tl.arange(0, 4)
    valid = rows < batch
    xs = ()
    grads = ()
    mean_grad = tl.zeros((4,), tl.float32)
    mean_grad_x = tl.zeros((4,), tl.float32)
    for k in tl.static_range(0, D, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        x, rstd = normalized_cls(cls, norm, tokens, rows, valid, c, D)
        grad = load_columns(grad_query_input_ptr + rows * D, valid, c, D)
        grad = grad * load_vector(norm.weight, c, c < D)[None, :]
        grad += load_columns(grad_normalized_ptr + rows * D, valid, c, D)
        mean_grad += tl.sum(grad, 1)
        mean_grad_x += tl.sum(grad * x, 1)
        xs = xs + (x,)
        grads = grads + (grad,)
    for i in tl.static_range(len(xs)):
        c = i * BLOCK_K + tl.arange(0, BLOCK_K)
        grad = (grads[i] - (mean_grad / D)[:, None]) - xs[i] * (mean_grad_x / D)[:, None]
        store_inside(out_ptr + rows * D, valid, c, c < D, grad * rstd[:, None])


@triton.jit
def finish_gradients(
    parts, grad_query_ptr, grad_out_ptr, probs_ptr, cls, norm, tokens,
    grad_normalized_ptr, grad_query_input_ptr, grads, weight_rows, bias_rows, batch,
    D: tl.constexpr, HEAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradients that are left, by program_id(1): four sums over rows, in BLOCK_E columns, and for 4 images that of
    cls."""
    which = tl.program_id(1)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    if which == 0:
        if grads.norm_weight is not None:
            sum_rows(parts.weight, weight_rows, e, None, 0, grads.norm_weight, D, HEAD, BLOCK_R)
    elif which == 1:
        if grads.norm_bias is not None:
            sum_rows(parts.bias, bias_rows, e, None, 0, grads.norm_bias, D, HEAD, BLOCK_R)
    elif which == 2:
        if grads.q_bias is not None:
            sum_rows(grad_query_ptr, batch, e, None, 0, grads.q_bias, D, HEAD, BLOCK_R)
    elif which == 3:
        if grads.v_bias is not None:
            # The sum of the batch's grad_out, as the probabilities sum to one; NaN where they are NaN.
            sum_rows(grad_out_ptr, batch, e, probs_ptr, tokens, grads.v_bias, D, HEAD, BLOCK_R)
    else:
        if grads.cls is not None:
            cls_gradient(cls, norm, tokens, grad_normalized_ptr, grad_query_input_ptr, grads.cls, batch, D, BLOCK_K)
