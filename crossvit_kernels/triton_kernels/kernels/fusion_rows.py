"""cls_fusion's steps before and after the pass over the tokens, for 16 images a program; see cls_fusion.py.

A step that needs a whole row of what the step before makes in pieces either makes it itself (the projection, whose
weight is small), or adds up the parts that every head left.
"""

import triton
import triton.language as tl

from .arithmetic import gelu, product
from .cls_cross_attention import row_statistics, store_key_query
from .tiles import affine, load_tile, load_vector


@triton.jit
def chunk_statistics(chunks, first, eps, D: tl.constexpr, BLOCK_K: tl.constexpr):
    """(mean of x - first, 1 / deviation) of rows that lie in registers as chunks of BLOCK_K columns, in float32."""
    columns = tl.arange(0, BLOCK_K)
    total = tl.zeros_like(first)
    for i in tl.static_range(len(chunks)):
        x = tl.where((i * BLOCK_K + columns < D)[None, :], chunks[i] - first[:, None], 0.0)
        total += tl.sum(x, 1)
    shift = total / D
    square = tl.zeros_like(first)
    for i in tl.static_range(len(chunks)):
        x = tl.where((i * BLOCK_K + columns < D)[None, :], (chunks[i] - first[:, None]) - shift[:, None], 0.0)
        square += tl.sum(x * x, 1)
    return shift, tl.rsqrt(square / D + eps)


@triton.jit
def first_column(chunk):
    """Column 0 of a tile in registers."""
    return tl.sum(tl.where((tl.arange(0, chunk.shape[1]) == 0)[None, :], chunk, 0.0), 1)


@triton.jit
def fusion_query(
    cls_ptr,
    proj_norm_weight_ptr,
    proj_norm_bias_ptr,
    proj_weight_ptr,
    proj_bias_ptr,
    projected_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    q_weight_ptr,
    q_bias_ptr,
    k_weight_ptr,
    key_query_ptr,
    batch,
    cls_stride,
    scale,
    eps,
    OWN: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """For 16 images and one head: the projection Linear(gelu(LayerNorm(cls))), in float32, the query from it, and
    W_k^T query / sqrt(d). The first head's program keeps the projection."""
    head = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)
    valid = rows < batch
    columns = tl.arange(0, BLOCK_K)
    starts = cls_ptr + rows * cls_stride
    dtype: tl.constexpr = q_weight_ptr.dtype.element_ty
    CHUNKS: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    MASK_C: tl.constexpr = OWN % BLOCK_C != 0
    MASK_K: tl.constexpr = D % BLOCK_K != 0
    MASK_HEAD: tl.constexpr = HEAD % HEAD_BLOCK != 0

    first, shift, rstd = row_statistics(starts, valid, eps, OWN, BLOCK_C)
    chunks: tl.tuple = ()
    for i in tl.static_range(CHUNKS):
        e = i * BLOCK_K + columns
        projected = tl.zeros((16, BLOCK_K), tl.float32)
        for k in tl.range(0, OWN, BLOCK_C):
            c = k + tl.arange(0, BLOCK_C)
            x = load_tile(starts[:, None] + c[None, :], valid, c < OWN, True, MASK_C).to(tl.float32)
            x = ((x - first[:, None]) - shift[:, None]) * rstd[:, None]
            if MASK_C:
                x = tl.where((c < OWN)[None, :], x, 0.0)
            y = gelu(affine(x, proj_norm_weight_ptr, proj_norm_bias_ptr, c, c < OWN))
            weight = load_tile(proj_weight_ptr + e[:, None] * OWN + c[None, :], e < D, c < OWN, MASK_K, MASK_C)
            projected = product(y.to(dtype), weight.T, projected, PRECISION)
        projected += load_vector(proj_bias_ptr, e, e < D, 0.0)[None, :]
        at = projected_ptr + rows[:, None] * D + e[None, :]
        tl.store(at, projected, mask=valid[:, None] & (e < D)[None, :] & (head == 0))
        chunks = chunks + (projected,)

    first = first_column(chunks[0])
    shift, rstd = chunk_statistics(chunks, first, eps, D, BLOCK_K)
    normalized = ()
    for i in tl.static_range(CHUNKS):
        c = i * BLOCK_K + columns
        x = ((chunks[i] - first[:, None]) - shift[:, None]) * rstd[:, None]
        if MASK_K:
            x = tl.where((c < D)[None, :], x, 0.0)
        normalized = normalized + (affine(x, norm_weight_ptr, norm_bias_ptr, c, c < D).to(dtype),)
    queries = ()
    for j0 in tl.static_range(0, HEAD, HEAD_BLOCK):
        j = j0 + tl.arange(0, HEAD_BLOCK)
        weights = q_weight_ptr + (head * HEAD + j)[:, None] * D
        query = tl.zeros((16, HEAD_BLOCK), tl.float32)
        for i in tl.static_range(CHUNKS):
            c = i * BLOCK_K + columns
            weight = load_tile(weights + c[None, :], j < HEAD, c < D, MASK_HEAD, MASK_K)
            query = product(normalized[i], weight.T, query, PRECISION)
        query += load_vector(q_bias_ptr, head * HEAD + j, j < HEAD, 0.0)[None, :]
        if MASK_HEAD:
            query = tl.where((j < HEAD)[None, :], query, 0.0)
        queries = queries + (query.to(dtype),)
    store_key_query(
        queries, k_weight_ptr, key_query_ptr, rows, valid, head, scale, D, HEAD, HEAD_BLOCK, PRECISION, BLOCK_K
    )


@triton.jit
def fusion_value(
    context_ptr,
    softmax_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    v_weight_ptr,
    v_bias_ptr,
    out_weight_ptr,
    shares_ptr,
    batch,
    splits,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """For 16 images, or one whose tokens were split over programs, and one head: W_v (gamma context + beta) + bias, and
    its share of the output projection, in float32."""
    head = tl.program_id(1)
    HEADS: tl.constexpr = D // HEAD
    SPLIT: tl.constexpr = SPLITS_BLOCK > 1
    if SPLIT:
        rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 16)
        valid = tl.arange(0, 16) == 0
        s = tl.arange(0, SPLITS_BLOCK)
        of_split = tl.program_id(0).to(tl.int64) * splits + s
        at = softmax_ptr + of_split * 2 * HEADS + head
        highest = tl.load(at, mask=s < splits, other=float("-inf"))
        totals = tl.load(at + HEADS, mask=s < splits, other=0.0)
        top = tl.max(highest, 0)
        shares = tl.exp(highest - tl.where(top == float("-inf"), 0.0, top))
        shares = tl.where(s < splits, shares, 0.0)
        total = tl.sum(shares * totals, 0)
    else:
        rows = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)
        valid = rows < batch
    dtype: tl.constexpr = v_weight_ptr.dtype.element_ty
    MASK_HEAD: tl.constexpr = HEAD % HEAD_BLOCK != 0
    MASK_K: tl.constexpr = D % BLOCK_K != 0
    values = ()
    for j0 in tl.static_range(0, HEAD, HEAD_BLOCK):
        j = j0 + tl.arange(0, HEAD_BLOCK)
        weights = v_weight_ptr + (head * HEAD + j)[:, None] * D
        value = tl.zeros((16, HEAD_BLOCK), tl.float32)
        for k in tl.range(0, D, BLOCK_K):
            c = k + tl.arange(0, BLOCK_K)
            if SPLIT:
                z = context_ptr + ((of_split * HEADS + head) * D)[:, None] + c[None, :]
                z = load_tile(z, s < splits, c < D, True, MASK_K)
                z = tl.sum(z * shares[:, None], 0) / total
                z = tl.broadcast_to(z[None, :], (16, BLOCK_K))
            else:
                z = context_ptr + ((rows * HEADS + head) * D)[:, None] + c[None, :]
                z = load_tile(z, valid, c < D, True, MASK_K)
            y = affine(z, norm_weight_ptr, norm_bias_ptr, c, c < D)
            weight = load_tile(weights + c[None, :], j < HEAD, c < D, MASK_HEAD, MASK_K)
            value = product(y.to(dtype), weight.T, value, PRECISION)
        value += load_vector(v_bias_ptr, head * HEAD + j, j < HEAD, 0.0)[None, :]
        values = values + (value.to(dtype),)

    for e0 in tl.range(0, D, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        share = tl.zeros((16, BLOCK_E), tl.float32)
        for j0 in tl.static_range(0, HEAD, HEAD_BLOCK):
            j = j0 + tl.arange(0, HEAD_BLOCK)
            out_weights = out_weight_ptr + e[:, None] * D + (head * HEAD + j)[None, :]
            weight = load_tile(out_weights, e < D, j < HEAD, D % BLOCK_E != 0, MASK_HEAD)
            share = product(values[j0 // HEAD_BLOCK], weight.T, share, PRECISION)
        to = shares_ptr + ((rows * HEADS + head) * D)[:, None] + e[None, :]
        tl.store(to, share, mask=valid[:, None] & (e < D)[None, :])


@triton.jit
def fusion_revert(
    shares_ptr,
    projected_ptr,
    out_bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    batch,
    eps,
    OWN: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """For 16 images: the heads' shares, bias and the projected CLS added up, and BLOCK_E columns of
    Linear(gelu(LayerNorm(...))) of the sum."""
    rows = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)
    valid = rows < batch
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    columns = tl.arange(0, BLOCK_K)
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    CHUNKS: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    MASK_K: tl.constexpr = D % BLOCK_K != 0
    chunks: tl.tuple = ()
    for i in tl.static_range(CHUNKS):
        c = i * BLOCK_K + columns
        fused = tl.zeros((16, BLOCK_K), tl.float32)
        for head in tl.static_range(HEADS):
            at = shares_ptr + ((rows * HEADS + head) * D)[:, None] + c[None, :]
            fused += load_tile(at, valid, c < D, True, MASK_K)
        fused += load_vector(out_bias_ptr, c, c < D, 0.0)[None, :]
        chunks = chunks + (
            fused + load_tile(projected_ptr + rows[:, None] * D + c[None, :], valid, c < D, True, MASK_K),
        )
    first = first_column(chunks[0])
    shift, rstd = chunk_statistics(chunks, first, eps, D, BLOCK_K)
    # All of it before the products: erf branches, and behind a branch the compiler would put off products of float32
    # numbers to the very end, with all their operands in registers until then.
    activated: tl.tuple = ()
    for i in tl.static_range(CHUNKS):
        c = i * BLOCK_K + columns
        x = ((chunks[i] - first[:, None]) - shift[:, None]) * rstd[:, None]
        if MASK_K:
            x = tl.where((c < D)[None, :], x, 0.0)
        activated = activated + (gelu(affine(x, norm_weight_ptr, norm_bias_ptr, c, c < D)).to(dtype),)
    out = tl.zeros((16, BLOCK_E), tl.float32)
    for i in tl.static_range(CHUNKS):
        c = i * BLOCK_K + columns
        weight = load_tile(weight_ptr + e[:, None] * D + c[None, :], e < OWN, c < D, OWN % BLOCK_E != 0, MASK_K)
        out = product(activated[i], weight.T, out, PRECISION)
    out += load_vector(bias_ptr, e, e < OWN, 0.0)[None, :]
    at = out_ptr + rows[:, None] * OWN + e[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (e < OWN)[None, :])
