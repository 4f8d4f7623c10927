"""cls_fusion's steps before and after the pass over the tokens, for 16 images a program; see cls_fusion.py.

A step that needs a whole row of what the step before makes in pieces either makes it itself (the projection, whose
weight is small), or adds up the parts that every head left.
"""

import triton
import triton.language as tl

from ..tiling import head_block
from .arithmetic import gelu, product
from .cls_cross_attention import store_key_query
from .layer_norm import affine, normalize, row_statistics
from .tiles import load_columns, load_head, load_rows, load_tile, load_vector, store_inside, within


@triton.jit
def project_cls(cls, rows, valid, norm, linear, eps, OWN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
                BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Linear(gelu(LayerNorm(cls))) of 16 images, from OWN to D columns, in chunks, float32."""
    starts = cls.base + rows * cls.batch
    dtype: tl.constexpr = linear.weight.dtype.element_ty
    own = load_rows(starts, valid, OWN, BLOCK_C)
    origin, shift, rstd = row_statistics(own, starts, valid, eps, OWN, BLOCK_C)
    chunks: tl.tuple = ()
    for e0 in tl.static_range(0, D, BLOCK_K):
        e = e0 + tl.arange(0, BLOCK_K)
        projected = tl.zeros((16, BLOCK_K), tl.float32)
        for k in tl.range(0, OWN, BLOCK_C):
            c = k + tl.arange(0, BLOCK_C)
            x = normalize(load_columns(starts, valid, c, OWN), origin, shift, rstd, c, OWN)
            y = gelu(affine(x, norm, c, OWN))
            weight_at = linear.weight + e[:, None] * OWN + c[None, :]
            weight = load_tile(weight_at, e < D, c < OWN, D % BLOCK_K != 0, OWN % BLOCK_C != 0)
            projected = product(y.to(dtype), weight.T, projected, PRECISION)
        chunks = chunks + (projected + load_vector(linear.bias, e, e < D)[None, :],)
    return chunks


@triton.jit
def norm_chunks(chunks, norm, eps, D: tl.constexpr, GELU: tl.constexpr, DTYPE: tl.constexpr):
    """LayerNorm of rows that lie in registers as chunks of columns, and gelu behind it."""
    BLOCK_K: tl.constexpr = chunks[0].shape[1]
    origin, shift, rstd = row_statistics(chunks, None, None, eps, D, BLOCK_K)
    normed: tl.tuple = ()
    for i in tl.static_range(len(chunks)):
        c = i * BLOCK_K + tl.arange(0, BLOCK_K)
        y = affine(normalize(chunks[i], origin, shift, rstd, c, D), norm, c, D)
        if GELU:
            y = gelu(y)
        normed = normed + (y.to(DTYPE),)
    return normed


@triton.jit
def fusion_query(
    cls, proj_norm, proj, norm, q, k_weight_ptr, projected_ptr, key_query_ptr, batch, scale, eps,
    OWN: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """For 16 images and one head: the projection Linear(gelu(LayerNorm(cls))), in float32, the query from it, and
    W_k^T query / sqrt(d). The first head's program keeps the projection."""
    head = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)
    valid = rows < batch
    dtype: tl.constexpr = q.weight.dtype.element_ty
    HEAD_BLOCK: tl.constexpr = head_block(HEAD)
    chunks = project_cls(cls, rows, valid, proj_norm, proj, eps, OWN, D, PRECISION, BLOCK_C, BLOCK_K)
    for i in tl.static_range(len(chunks)):
        e = i * BLOCK_K + tl.arange(0, BLOCK_K)
        store_inside(projected_ptr + rows * D, valid & (head == 0), e, e < D, chunks[i])
    normed = norm_chunks(chunks, norm, eps, D, False, dtype)
    queries = ()
    for j0 in tl.static_range(0, HEAD, HEAD_BLOCK):
        j = j0 + tl.arange(0, HEAD_BLOCK)
        query = tl.zeros((16, HEAD_BLOCK), tl.float32)
        for i in tl.static_range(len(normed)):
            c = i * BLOCK_K + tl.arange(0, BLOCK_K)
            query = product(normed[i], load_head(q.weight, head, j, c, D, HEAD).T, query, PRECISION)
        query += load_vector(q.bias, head * HEAD + j, j < HEAD)[None, :]
        queries = queries + (within(query, j, HEAD).to(dtype),)
    store_key_query(queries, k_weight_ptr, key_query_ptr, rows, valid, head, scale, D, HEAD, PRECISION, BLOCK_K)


@triton.jit
def fusion_value(
    split_context_ptr, softmax_ptr, norm, v, out_weight_ptr, shares_ptr, batch, splits,
    D: tl.constexpr, HEAD: tl.constexpr, SPLITS_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """For 16 images, or one whose tokens were split over programs, and one head: W_v (gamma context + beta) + bias, and
    its share of the output projection, in float32."""
    head = tl.program_id(1)
    HEADS: tl.constexpr = D // HEAD
    HEAD_BLOCK: tl.constexpr = head_block(HEAD)
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
    dtype: tl.constexpr = v.weight.dtype.element_ty
    values: tl.tuple = ()
    for j0 in tl.static_range(0, HEAD, HEAD_BLOCK):
        j = j0 + tl.arange(0, HEAD_BLOCK)
        value = tl.zeros((16, HEAD_BLOCK), tl.float32)
        for k in tl.range(0, D, BLOCK_K):
            c = k + tl.arange(0, BLOCK_K)
            if SPLIT:
                z = load_columns(split_context_ptr + (of_split * HEADS + head) * D, s < splits, c, D)
                z = tl.sum(z * shares[:, None], 0) / total
                z = tl.broadcast_to(z[None, :], (16, BLOCK_K))
            else:
                z = load_columns(split_context_ptr + (rows * HEADS + head) * D, valid, c, D)
            y = affine(z, norm, c, D)
            value = product(y.to(dtype), load_head(v.weight, head, j, c, D, HEAD).T, value, PRECISION)
        value += load_vector(v.bias, head * HEAD + j, j < HEAD)[None, :]
        values = values + (value.to(dtype),)

    for e0 in tl.range(0, D, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        share = tl.zeros((16, BLOCK_E), tl.float32)
        for i in tl.static_range(len(values)):
            j = i * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
            out_weights = out_weight_ptr + e[:, None] * D + (head * HEAD + j)[None, :]
            weight = load_tile(out_weights, e < D, j < HEAD, D % BLOCK_E != 0, HEAD % HEAD_BLOCK != 0)
            share = product(values[i], weight.T, share, PRECISION)
        store_inside(shares_ptr + (rows * HEADS + head) * D, valid, e, e < D, share)


@triton.jit
def fusion_revert(
    shares_ptr, projected_ptr, out_bias_ptr, revert_norm, revert, out_ptr, batch, eps,
    OWN: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """For 16 images: the heads' shares, bias and the projected CLS added up, and BLOCK_E columns of
    Linear(gelu(LayerNorm(...))) of the sum."""
    rows = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)
    valid = rows < batch
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    chunks: tl.tuple = ()
    for k in tl.static_range(0, D, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        fused = tl.zeros((16, BLOCK_K), tl.float32)
        for head in tl.static_range(HEADS):
            fused += load_columns(shares_ptr + (rows * HEADS + head) * D, valid, c, D)
        fused += load_vector(out_bias_ptr, c, c < D)[None, :]
        chunks = chunks + (fused + load_columns(projected_ptr + rows * D, valid, c, D),)
    # All of it before the products: erf branches, and behind a branch the compiler would put off products of float32
    # numbers to the very end, with all their operands in registers until then.
    dtype: tl.constexpr = revert.weight.dtype.element_ty
    activated = norm_chunks(chunks, revert_norm, eps, D, True, dtype)
    acc = tl.zeros((16, BLOCK_E), tl.float32)
    for i in tl.static_range(len(activated)):
        c = i * BLOCK_K + tl.arange(0, BLOCK_K)
        weight_at = revert.weight + e[:, None] * D + c[None, :]
        weight = load_tile(weight_at, e < OWN, c < D, OWN % BLOCK_E != 0, D % BLOCK_K != 0)
        acc = product(activated[i], weight.T, acc, PRECISION)
    acc += load_vector(revert.bias, e, e < OWN)[None, :]
    store_inside(out_ptr + rows * OWN, valid, e, e < OWN, acc)
