"""Kernels with one row per image: cls_query before the pass over the tokens, cls_value behind it.

The batch is walked in tiles of 16 rows, the least that a matrix instruction takes, while the weights stream past.
"""

import triton
import triton.language as tl

from .arithmetic import product
from .tiles import affine, load_tile, load_vector


@triton.jit
def row_statistics(starts, valid, eps, D: tl.constexpr, BLOCK_K: tl.constexpr):
    """(x[0], mean of x - x[0], 1 / deviation) of the rows that begin at `starts`, in float32."""
    columns = tl.arange(0, BLOCK_K)
    first = tl.load(starts, mask=valid, other=0.0).to(tl.float32)
    chunks = ()
    total = tl.zeros_like(first)
    for k in tl.static_range(0, D, BLOCK_K):
        c = k + columns
        x = load_tile(starts[:, None] + c[None, :], valid, c < D, True, D % BLOCK_K != 0)
        x = x.to(tl.float32) - first[:, None]
        if D % BLOCK_K != 0:
            x = tl.where((c < D)[None, :], x, 0.0)
        chunks = chunks + (x,)
        total += tl.sum(x, 1)
    shift = total / D
    square = tl.zeros_like(first)
    for k in tl.static_range(0, D, BLOCK_K):
        x = chunks[k // BLOCK_K] - shift[:, None]
        if D % BLOCK_K != 0:
            x = tl.where((k + columns < D)[None, :], x, 0.0)
        square += tl.sum(x * x, 1)
    return first, shift, tl.rsqrt(square / D + eps)


@triton.jit
def store_key_query(
    queries,
    k_weight_ptr,
    key_query_ptr,
    rows,
    valid,
    head,
    scale,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Stores W_k^T query * scale of a head, whose query lies in registers in pieces of HEAD_BLOCK columns."""
    heads = D // HEAD
    for k in tl.range(0, D, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        key_query = tl.zeros((16, BLOCK_K), tl.float32)
        for j0 in tl.static_range(0, HEAD, HEAD_BLOCK):
            j = j0 + tl.arange(0, HEAD_BLOCK)
            key_weights = k_weight_ptr + (head * HEAD + j)[:, None] * D + c[None, :]
            key_weight = load_tile(key_weights, j < HEAD, c < D, HEAD % HEAD_BLOCK != 0, D % BLOCK_K != 0)
            key_query = product(queries[j0 // HEAD_BLOCK], key_weight, key_query, PRECISION)
        tl.store(
            key_query_ptr + ((rows * heads + head) * D)[:, None] + c[None, :],
            key_query * scale,
            mask=valid[:, None] & (c < D)[None, :],
        )


@triton.jit
def cls_query(
    cls_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    q_weight_ptr,
    q_bias_ptr,
    k_weight_ptr,
    query_ptr,
    key_query_ptr,
    batch,
    cls_stride,
    scale,
    eps,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """For 16 images and one head: the query from the normalised CLS token, and W_k^T query / sqrt(d).

    query_ptr None: the query itself is not kept.
    """
    head = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)
    valid = rows < batch
    columns = tl.arange(0, BLOCK_K)
    starts = cls_ptr + rows * cls_stride
    first, shift, rstd = row_statistics(starts, valid, eps, D, BLOCK_K)
    dtype: tl.constexpr = q_weight_ptr.dtype.element_ty
    MASK_HEAD: tl.constexpr = HEAD % HEAD_BLOCK != 0
    MASK_K: tl.constexpr = D % BLOCK_K != 0

    queries = ()
    for j0 in tl.static_range(0, HEAD, HEAD_BLOCK):
        j = j0 + tl.arange(0, HEAD_BLOCK)
        weights = q_weight_ptr + (head * HEAD + j)[:, None] * D
        query = tl.zeros((16, HEAD_BLOCK), tl.float32)
        for k in tl.range(0, D, BLOCK_K):
            c = k + columns
            x = load_tile(starts[:, None] + c[None, :], valid, c < D, True, MASK_K).to(tl.float32)
            x = ((x - first[:, None]) - shift[:, None]) * rstd[:, None]
            if MASK_K:
                x = tl.where((c < D)[None, :], x, 0.0)
            y = affine(x, norm_weight_ptr, norm_bias_ptr, c, c < D)
            weight = load_tile(weights + c[None, :], j < HEAD, c < D, MASK_HEAD, MASK_K)
            query = product(y.to(dtype), weight.T, query, PRECISION)
        query += load_vector(q_bias_ptr, head * HEAD + j, j < HEAD, 0.0)[None, :]
        if MASK_HEAD:
            query = tl.where((j < HEAD)[None, :], query, 0.0)
        if query_ptr is not None:
            tl.store(
                query_ptr + rows[:, None] * D + (head * HEAD + j)[None, :],
                query,
                mask=valid[:, None] & (j < HEAD)[None, :],
            )
        queries = queries + (query.to(dtype),)

    store_key_query(
        queries, k_weight_ptr, key_query_ptr, rows, valid, head, scale, D, HEAD, HEAD_BLOCK, PRECISION, BLOCK_K
    )


@triton.jit
def split_weights(softmax_ptr, images, valid, head, splits, HEADS: tl.constexpr, SPLITS_BLOCK: tl.constexpr):
    """For images and a head: the running softmaxes' common maximum, their common sum, and each split's share of it."""
    s = tl.arange(0, SPLITS_BLOCK)
    at = ((images[:, None] * splits + s[None, :]) * 2) * HEADS + head
    there = valid[:, None] & (s < splits)[None, :]
    highest = tl.load(softmax_ptr + at, mask=there, other=float("-inf"))
    totals = tl.load(softmax_ptr + at + HEADS, mask=there, other=0.0)
    top = tl.max(highest, 1)
    # A NaN hides from the maximum, not from the sum.
    shares = tl.exp(highest - tl.where(top == float("-inf"), 0.0, top)[:, None])
    shares = tl.where(there, shares, 0.0)
    total = tl.sum(shares * totals, 1)
    return top, total, shares / total[:, None]


@triton.jit
def join_splits(
    split_context_ptr,
    context_ptr,
    images,
    valid,
    head,
    shares,
    splits,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The contexts of some images and one head from those of their splits, in the splits' order."""
    s = tl.arange(0, SPLITS_BLOCK)
    rows = ((images[:, None] * splits + s[None, :]) * HEADS + head) * D
    there = valid[:, None] & (s < splits)[None, :]
    contexts = ()  # all loads before the first store, so that they overlap
    for k in tl.static_range(0, D, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        inside = there[:, :, None] & (c < D)[None, None, :]
        z = tl.load(split_context_ptr + rows[:, :, None] + c[None, None, :], mask=inside, other=0.0)
        contexts = contexts + (tl.sum(z * shares[:, :, None], 1),)
    at = context_ptr + ((images * HEADS + head) * D)[:, None]
    for k in tl.static_range(0, D, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        tl.store(at + c[None, :], contexts[k // BLOCK_K], mask=valid[:, None] & (c < D)[None, :])


@triton.jit
def cls_value(
    context_ptr,
    split_context_ptr,
    softmax_ptr,
    probs_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    v_weight_ptr,
    v_bias_ptr,
    out_ptr,
    batch,
    tokens,
    splits,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """For ROWS images and one head: joins what SPLITS_BLOCK > 1 splits summed, finishes the probabilities where SAVE,
    and W_v (gamma context + beta) + bias."""
    head = tl.program_id(1)
    HEADS: tl.constexpr = D // HEAD
    columns = tl.arange(0, BLOCK_K)
    images = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = images < batch
    if SAVE or SPLITS_BLOCK > 1:
        highest, total, shares = split_weights(softmax_ptr, images, there, head, splits, HEADS, SPLITS_BLOCK)
        if SPLITS_BLOCK > 1:
            join_splits(
                split_context_ptr, context_ptr, images, there, head, shares, splits, D, HEADS, SPLITS_BLOCK, BLOCK_K
            )
        if SAVE:
            for n0 in tl.range(0, tokens, 256):
                n = n0 + tl.arange(0, 256)
                at = probs_ptr + ((images * HEADS + head) * tokens)[:, None] + n[None, :]
                inside = there[:, None] & (n < tokens)[None, :]
                score = tl.load(at, mask=inside, other=0.0)
                tl.store(at, tl.exp(score - highest[:, None]) / total[:, None], mask=inside)
        if SPLITS_BLOCK > 1:
            tl.debug_barrier()  # other threads of this program wrote the contexts

    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, 16)
    valid = (rows < batch) & (tl.arange(0, 16) < ROWS)
    dtype: tl.constexpr = v_weight_ptr.dtype.element_ty
    MASK_HEAD: tl.constexpr = HEAD % HEAD_BLOCK != 0
    MASK_K: tl.constexpr = D % BLOCK_K != 0
    for j0 in tl.static_range(0, HEAD, HEAD_BLOCK):
        j = j0 + tl.arange(0, HEAD_BLOCK)
        weights = v_weight_ptr + (head * HEAD + j)[:, None] * D
        out = tl.zeros((16, HEAD_BLOCK), tl.float32)
        for k in tl.range(0, D, BLOCK_K):
            c = k + columns
            z = context_ptr + ((rows * HEADS + head) * D)[:, None] + c[None, :]
            y = affine(load_tile(z, valid, c < D, True, MASK_K), norm_weight_ptr, norm_bias_ptr, c, c < D)
            weight = load_tile(weights + c[None, :], j < HEAD, c < D, MASK_HEAD, MASK_K)
            out = product(y.to(dtype), weight.T, out, PRECISION)
        out += load_vector(v_bias_ptr, head * HEAD + j, j < HEAD, 0.0)[None, :]
        tl.store(
            out_ptr + rows[:, None] * D + (head * HEAD + j)[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=valid[:, None] & (j < HEAD)[None, :],
        )
