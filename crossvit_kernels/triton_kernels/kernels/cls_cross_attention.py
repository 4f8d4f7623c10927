"""The forward of cls_cross_attention: cls_query, the pass over the tokens, which cls_fusion shares, and cls_value.

Keys and values are never made (see docs/design/cls_cross_attention.md): every token is read once. cls_query and
cls_value have one row per image; they walk over the batch in tiles of 16 rows, the least that a matrix instruction
takes, while the weights stream past.
"""

import triton
import triton.language as tl

from ..tiling import head_block, heads_block
from .arithmetic import product
from .layer_norm import affine, normalize, row_statistics
from .tiles import load_columns, load_head, load_rows, load_tile, load_vector, store_inside, within


@triton.jit
def store_key_query(queries, k_weight_ptr, key_query_ptr, rows, valid, head, scale, D: tl.constexpr,
                    HEAD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Stores W_k^T query * scale of a head, whose query lies in registers in pieces of its columns."""
    HEAD_BLOCK: tl.constexpr = head_block(HEAD)
    to = key_query_ptr + (rows * (D // HEAD) + head) * D
    for k in tl.range(0, D, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        key_query = tl.zeros((16, BLOCK_K), tl.float32)
        for i in tl.static_range(len(queries)):
            j = i * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
            key_query = product(queries[i], load_head(k_weight_ptr, head, j, c, D, HEAD), key_query, PRECISION)
        store_inside(to, valid, c, c < D, key_query * scale)


@triton.jit
def cls_query(
    cls, norm, q, k_weight_ptr, query_ptr, key_query_ptr, batch, scale, eps,
    D: tl.constexpr, HEAD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """For 16 images and one head: the query from the normalized CLS token, and W_k^T query / sqrt(d).

    query_ptr None: the query itself is not kept.
    """
    head = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)
    valid = rows < batch
    starts = cls.base + rows * cls.batch
    dtype: tl.constexpr = q.weight.dtype.element_ty
    HEAD_BLOCK: tl.constexpr = head_block(HEAD)
    chunks = load_rows(starts, valid, D, BLOCK_K)
    origin, shift, rstd = row_statistics(chunks, starts, valid, eps, D, BLOCK_K)
    queries = ()
    for j0 in tl.static_range(0, HEAD, HEAD_BLOCK):
        j = j0 + tl.arange(0, HEAD_BLOCK)
        query = tl.zeros((16, HEAD_BLOCK), tl.float32)
        for k in tl.range(0, D, BLOCK_K):
            c = k + tl.arange(0, BLOCK_K)
            x = normalize(load_columns(starts, valid, c, D), origin, shift, rstd, c, D)
            y = affine(x, norm, c, D)
            query = product(y.to(dtype), load_head(q.weight, head, j, c, D, HEAD).T, query, PRECISION)
        query += load_vector(q.bias, head * HEAD + j, j < HEAD)[None, :]
        query = within(query, j, HEAD)
        if query_ptr is not None:
            store_inside(query_ptr + rows * D, valid, head * HEAD + j, j < HEAD, query)
        queries = queries + (query.to(dtype),)
    store_key_query(queries, k_weight_ptr, key_query_ptr, rows, valid, head, scale, D, HEAD, PRECISION, BLOCK_K)


@triton.jit
def start(cls_ptr, key_query_ptr, norm_weight_ptr, eps, here, D: tl.constexpr, HEADS: tl.constexpr,
              DTYPE: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """gamma u^T in chunks, the normalized CLS token (zero unless `here`) for every head, its scores and statistics."""
    HEADS_BLOCK: tl.constexpr = heads_block(HEADS)
    heads = tl.arange(0, HEADS_BLOCK)
    one = tl.arange(0, 1)
    chunks = load_rows(cls_ptr + one, one == 0, D, BLOCK_K)
    origin, shift, rstd = row_statistics(chunks, cls_ptr + one, one == 0, eps, D, BLOCK_K)
    u_chunks = ()
    contexts = ()
    scores = tl.zeros((HEADS_BLOCK,), tl.float32)
    for k in tl.static_range(0, D, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        x = normalize(chunks[k // BLOCK_K], origin, shift, rstd, c, D)
        u_at = key_query_ptr + heads[:, None] * D + c[None, :]
        u = load_tile(u_at, heads < HEADS, c < D, HEADS != HEADS_BLOCK, D % BLOCK_K != 0)
        u = u * load_vector(norm_weight_ptr, c, c < D)[None, :]
        scores += tl.sum(u * x, 1)
        u_chunks = u_chunks + (u.to(DTYPE).T,)
        contexts = contexts + (tl.broadcast_to(tl.where(here, x, 0.0).T, (BLOCK_K, HEADS_BLOCK)),)
    return u_chunks, contexts, scores, origin + shift, rstd


@triton.jit
def normalized_scores(chunks, origin, shift, rstd, u_chunks, D: tl.constexpr, DTYPE: tl.constexpr,
                      PRECISION: tl.constexpr):  # fmt: skip
    """A tile of tokens, normalized, in chunks, and its scores with every head."""
    normalized = ()
    scores = tl.zeros((chunks[0].shape[0], u_chunks[0].shape[1]), tl.float32)
    for i in tl.static_range(len(chunks)):
        c = i * chunks[0].shape[1] + tl.arange(0, chunks[0].shape[1])
        x = normalize(chunks[i], origin, shift, rstd, c, D).to(DTYPE)
        normalized = normalized + (x,)
        scores = product(x, u_chunks[i], scores, PRECISION)
    return normalized, scores


@triton.jit
def running_softmax(scores, highest, total):
    """A tile's weights against each head's new maximum, what earlier weights shrink by, the new maximum and sum."""
    now = tl.maximum(highest, tl.max(scores, 0))
    finite = tl.where(now == float("-inf"), 0.0, now)
    shrink = tl.exp(highest - finite)
    weights = tl.exp(scores - finite[None, :])
    return weights, shrink, now, total * shrink + tl.sum(weights, 0)


@triton.jit
def token_pass(
    cls, patches, norm, key_query_ptr, scores_ptr, split_context_ptr, softmax_ptr, splits, tiles, eps,
    D: tl.constexpr, HEADS: tl.constexpr, SPLIT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One image's tokens, or `tiles` tiles of them where SPLIT: statistics, scores, running softmax and contexts.

    Every head meets a tile while it is on chip. `split_context` gets the weighted means (B, H, D); where SPLIT the
    weighted contexts (B, splits, H, D) against the split's own maximum. `softmax` gets that maximum and the sum of the
    weights (B, splits, 2, H). The norm's statistics and the scores, which the next launch finishes, may all be None.
    """
    image = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    here = split == 0
    heads = tl.arange(0, heads_block(HEADS))
    is_head = heads < HEADS
    # The CLS token starts the first split's running softmax.
    u_chunks, contexts, cls_scores, cls_mean, cls_rstd = start(
        cls.base + image * cls.batch, key_query_ptr + image * HEADS * D, norm.weight, eps, here,
        D, HEADS, DTYPE, BLOCK_K,
    )  # fmt: skip
    highest = tl.where(here, cls_scores, float("-inf"))
    total = tl.where(here, tl.exp(cls_scores - cls_scores), 0.0)
    tokens = patches.tokens + 1
    of_tokens = image * tokens
    of_scores = scores_ptr
    if norm.mean is not None:
        one = tl.arange(0, 1)
        tl.store(norm.mean + of_tokens + one, cls_mean, mask=(one == 0) & here)
        tl.store(norm.rstd + of_tokens + one, cls_rstd, mask=(one == 0) & here)
        of_scores = scores_ptr + (image * HEADS + heads) * tokens
        tl.store(of_scores, cls_scores, mask=is_head & here)

    starts = patches.base + image * patches.batch
    for tile in tl.range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(patches.tokens, BLOCK_N))):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = n < patches.tokens
        chunks = load_rows(starts + n.to(tl.int64) * patches.row, valid, D, BLOCK_K)
        origin, shift, rstd = row_statistics(chunks, None, None, eps, D, BLOCK_K)
        if norm.mean is not None:
            tl.store(norm.mean + of_tokens + 1 + n, origin + shift, mask=valid)
            tl.store(norm.rstd + of_tokens + 1 + n, rstd, mask=valid)
        rstd = tl.where(valid, rstd, 0.0)  # with eps 0 the tail's is infinite
        normalized, scores = normalized_scores(chunks, origin, shift, rstd, u_chunks, D, DTYPE, PRECISION)
        if norm.mean is not None:
            tl.store(of_scores[None, :] + 1 + n[:, None], scores, mask=valid[:, None] & is_head[None, :])
        scores = tl.where(valid[:, None], scores, float("-inf"))
        weights, shrink, highest, total = running_softmax(scores, highest, total)
        weights = weights.to(DTYPE)
        added = ()
        for i in tl.static_range(len(contexts)):
            added = added + (product(normalized[i].T, weights, contexts[i] * shrink[None, :], PRECISION),)
        contexts = added

    at = image * splits + split
    tl.store(softmax_ptr + (at * 2) * HEADS + heads, highest, mask=is_head)
    tl.store(softmax_ptr + (at * 2 + 1) * HEADS + heads, total, mask=is_head)
    for i in tl.static_range(len(contexts)):
        c = i * BLOCK_K + tl.arange(0, BLOCK_K)
        z = contexts[i] if SPLIT else contexts[i] / total[None, :]
        store_inside(split_context_ptr + (at * HEADS + heads) * D, is_head, c, c < D, z.T)


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
def join_splits(split_context_ptr, context_ptr, images, valid, head, shares, splits, D: tl.constexpr,
                HEADS: tl.constexpr, SPLITS_BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
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
    for k in tl.static_range(0, D, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        store_inside(context_ptr + (images * HEADS + head) * D, valid, c, c < D, contexts[k // BLOCK_K])


@triton.jit
def finish_probs(probs_ptr, highest, total, valid, tokens):
    """Makes probabilities of the scores in each row of `probs`, by its maximum and sum."""
    for n0 in tl.range(0, tokens, 256):
        n = n0 + tl.arange(0, 256)
        inside = valid[:, None] & (n < tokens)[None, :]
        scores = tl.load(probs_ptr[:, None] + n[None, :], mask=inside, other=0.0)
        tl.store(probs_ptr[:, None] + n[None, :], tl.exp(scores - highest[:, None]) / total[:, None], mask=inside)


@triton.jit
def cls_value(
    context_ptr, split_context_ptr, softmax_ptr, tokens, norm, v, probs_ptr, out_ptr, batch, splits,
    D: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, SPLITS_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """For ROWS images and one head: joins what SPLITS_BLOCK > 1 splits summed, finishes the probabilities, which may be
    None, and W_v (gamma context + beta) + bias."""
    head = tl.program_id(1)
    HEADS: tl.constexpr = D // HEAD
    HEAD_BLOCK: tl.constexpr = head_block(HEAD)
    images = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = images < batch
    if probs_ptr is not None or SPLITS_BLOCK > 1:
        highest, total, shares = split_weights(softmax_ptr, images, there, head, splits, HEADS, SPLITS_BLOCK)
        if SPLITS_BLOCK > 1:
            join_splits(
                split_context_ptr, context_ptr, images, there, head, shares, splits, D, HEADS, SPLITS_BLOCK, BLOCK_K
            )
        if probs_ptr is not None:
            finish_probs(probs_ptr + (images * HEADS + head) * tokens, highest, total, there, tokens)
        if SPLITS_BLOCK > 1:
            tl.debug_barrier()  # other threads of this program wrote the contexts

    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, 16)
    valid = (rows < batch) & (tl.arange(0, 16) < ROWS)
    dtype: tl.constexpr = v.weight.dtype.element_ty
    starts = context_ptr + (rows * HEADS + head) * D
    for j0 in tl.static_range(0, HEAD, HEAD_BLOCK):
        j = j0 + tl.arange(0, HEAD_BLOCK)
        out = tl.zeros((16, HEAD_BLOCK), tl.float32)
        for k in tl.range(0, D, BLOCK_K):
            c = k + tl.arange(0, BLOCK_K)
            y = affine(load_columns(starts, valid, c, D), norm, c, D)
            out = product(y.to(dtype), load_head(v.weight, head, j, c, D, HEAD).T, out, PRECISION)
        out += load_vector(v.bias, head * HEAD + j, j < HEAD)[None, :]
        store_inside(out_ptr + rows * D, valid, head * HEAD + j, j < HEAD, out)
