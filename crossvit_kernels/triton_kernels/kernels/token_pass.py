"""The pass over the tokens that cls_cross_attention and cls_fusion share.

Keys and values are never made (see ops/cls_cross_attention.py): every token is read once, for its statistics, its
scores and its share of the contexts z.
"""

import triton
import triton.language as tl

from .arithmetic import product
from .cls_cross_attention import row_statistics
from .tiles import load_tile, load_vector


@triton.jit
def start(
    cls_ptr,
    key_query_ptr,
    norm_weight_ptr,
    eps,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    here,
):
    """gamma u^T in chunks, the normalised CLS token (zero unless `here`) for every head, its scores and statistics."""
    columns = tl.arange(0, BLOCK_K)
    heads = tl.arange(0, HEADS_BLOCK)
    MASK_K: tl.constexpr = D % BLOCK_K != 0
    one = tl.arange(0, 1)
    first, shift, rstd = row_statistics(cls_ptr + one, one == 0, eps, D, BLOCK_K)
    u_chunks = ()
    contexts = ()
    score = tl.zeros((HEADS_BLOCK,), tl.float32)
    for k in tl.static_range(0, D, BLOCK_K):
        c = k + columns
        x = load_tile(cls_ptr + one[:, None] + c[None, :], one == 0, c < D, False, MASK_K)
        x = ((x.to(tl.float32) - first[:, None]) - shift[:, None]) * rstd[:, None]
        if MASK_K:
            x = tl.where((c < D)[None, :], x, 0.0)
        u = load_tile(
            key_query_ptr + heads[:, None] * D + c[None, :], heads < HEADS, c < D, HEADS != HEADS_BLOCK, MASK_K
        )
        u = u * load_vector(norm_weight_ptr, c, c < D, 1.0)[None, :]
        score += tl.sum(u * x, 1)
        u_chunks = u_chunks + (u.to(DTYPE).T,)
        contexts = contexts + (tl.broadcast_to(tl.where(here, x, 0.0).T, (BLOCK_K, HEADS_BLOCK)),)
    return u_chunks, contexts, score, first + shift, rstd


@triton.jit
def token_pass(
    cls_ptr,
    patches_ptr,
    norm_weight_ptr,
    key_query_ptr,
    mean_ptr,
    rstd_ptr,
    scores_ptr,
    context_ptr,
    softmax_ptr,
    patches,
    cls_stride,
    patches_batch,
    patches_token,
    splits,
    tiles,
    eps,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    SAVE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One image's tokens, or `tiles` tiles of them where SPLIT: statistics, scores, running softmax and contexts.

    Every head meets a tile while it is on chip. `context` gets the weighted means (B, H, D); where SPLIT the weighted
    contexts (B, splits, H, D) against the split's own maximum. `softmax` gets that maximum and the sum of the weights
    (B, splits, 2, H). SAVE: also mean, rstd and the scores themselves, for the next launch to finish.
    """
    image = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    columns = tl.arange(0, BLOCK_K)
    heads = tl.arange(0, HEADS_BLOCK)
    MASK_K: tl.constexpr = D % BLOCK_K != 0

    # The CLS token starts the first split's running softmax.
    u_chunks, contexts, score, cls_mean, cls_rstd = start(
        cls_ptr + image * cls_stride,
        key_query_ptr + image * HEADS * D,
        norm_weight_ptr,
        eps,
        D,
        HEADS,
        HEADS_BLOCK,
        DTYPE,
        BLOCK_K,
        split == 0,
    )
    highest = tl.where(split == 0, score, float("-inf"))
    total = tl.where(split == 0, tl.exp(score - score), 0.0)
    if SAVE:
        one = tl.arange(0, 1)
        tl.store(mean_ptr + image * (patches + 1) + one, cls_mean, mask=(one == 0) & (split == 0))
        tl.store(rstd_ptr + image * (patches + 1) + one, cls_rstd, mask=(one == 0) & (split == 0))
        tl.store(scores_ptr + (image * HEADS + heads) * (patches + 1), score, mask=(heads < HEADS) & (split == 0))

    tokens = patches_ptr + image * patches_batch
    for tile in tl.range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(patches, BLOCK_N))):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = n < patches
        starts = tokens + n.to(tl.int64)[:, None] * patches_token
        raw: tl.tuple = ()
        for k in tl.static_range(0, D, BLOCK_K):
            c = k + columns
            raw = raw + (load_tile(starts + c[None, :], valid, c < D, True, MASK_K),)
        first = tl.sum(tl.where((columns == 0)[None, :], raw[0].to(tl.float32), 0.0), 1)
        centred: tl.tuple = ()
        mean = tl.zeros((BLOCK_N,), tl.float32)
        for k in tl.static_range(0, D, BLOCK_K):
            x = raw[k // BLOCK_K].to(tl.float32) - first[:, None]
            if MASK_K:
                x = tl.where((k + columns < D)[None, :], x, 0.0)
            mean += tl.sum(x, 1)
            centred = centred + (x,)
        mean = mean / D
        square = tl.zeros((BLOCK_N,), tl.float32)
        for k in tl.static_range(0, D, BLOCK_K):
            x = centred[k // BLOCK_K] - mean[:, None]
            if MASK_K:
                x = tl.where((k + columns < D)[None, :], x, 0.0)
            square += tl.sum(x * x, 1)
        rstd = tl.rsqrt(square / D + eps)
        if SAVE:
            tl.store(mean_ptr + image * (patches + 1) + 1 + n, first + mean, mask=valid)
            tl.store(rstd_ptr + image * (patches + 1) + 1 + n, rstd, mask=valid)
        rstd = tl.where(valid, rstd, 0.0)  # with eps 0 the tail's is infinite

        normalized = ()
        scores = tl.zeros((BLOCK_N, HEADS_BLOCK), tl.float32)
        for k in tl.static_range(0, D, BLOCK_K):
            x = (centred[k // BLOCK_K] - mean[:, None]) * rstd[:, None]
            if MASK_K:
                x = tl.where((k + columns < D)[None, :], x, 0.0)
            x = x.to(DTYPE)
            normalized = normalized + (x,)
            scores = product(x, u_chunks[k // BLOCK_K], scores, PRECISION)
        if SAVE:
            tl.store(
                scores_ptr + (image * HEADS + heads)[None, :] * (patches + 1) + 1 + n[:, None],
                scores,
                mask=valid[:, None] & (heads < HEADS)[None, :],
            )
        scores = tl.where(valid[:, None], scores, float("-inf"))
        now = tl.maximum(highest, tl.max(scores, 0))
        finite = tl.where(now == float("-inf"), 0.0, now)
        shrink = tl.exp(highest - finite)
        weights = tl.exp(scores - finite[None, :])
        total = total * shrink + tl.sum(weights, 0)
        highest = now
        weights = weights.to(DTYPE)
        added = ()
        for k in tl.static_range(0, D, BLOCK_K):
            z = contexts[k // BLOCK_K] * shrink[None, :]
            z = product(normalized[k // BLOCK_K].T, weights, z, PRECISION)
            added = added + (z,)
        contexts = added

    at = image * splits + split
    tl.store(softmax_ptr + (at * 2) * HEADS + heads, highest, mask=heads < HEADS)
    tl.store(softmax_ptr + (at * 2 + 1) * HEADS + heads, total, mask=heads < HEADS)
    for k in tl.static_range(0, D, BLOCK_K):
        c = k + columns
        z = contexts[k // BLOCK_K]
        if not SPLIT:
            z = z / total[None, :]
        tl.store(
            context_ptr + (at * HEADS + heads)[:, None] * D + c[None, :],
            z.T,
            mask=(heads < HEADS)[:, None] & (c < D)[None, :],
        )
