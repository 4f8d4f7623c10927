"""What cls_cross_attention and cls_fusion share: statistics of rows, the absorbed query, and the pass over the tokens.

Keys and values are never made (see ops/cls_cross_attention.py). With rows of the batch in tiles of 16, one launch makes
each head's absorbed query u, one reads every token once for its statistics, scores and share of the contexts z, and
what follows has one row per image again.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, configuration, dot_precision, launch, multiprocessors
from ._rows import block_of

MOST_SPLITS = 32
ROWS = 16  # of the batch in one program, the least that a matrix instruction takes
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def load_tile(
    pointers, rows_valid, columns_valid, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr
):  # a mask that is always true would keep loads from being wide and asynchronous
    """A tile, zero where a mask that is needed is false."""
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(pointers, mask=rows_valid[:, None] & columns_valid[None, :], other=0.0)
    if MASK_ROWS:
        return tl.load(pointers, mask=rows_valid[:, None], other=0.0)
    if MASK_COLUMNS:
        return tl.load(pointers, mask=columns_valid[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def load_vector(pointer, offsets, valid, DEFAULT: tl.constexpr):
    """Elements of an optional vector in float32, DEFAULT where there is none."""
    if pointer is None:
        return tl.full(offsets.shape, DEFAULT, tl.float32)
    return tl.load(pointer + offsets, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def affine(x, norm_weight_ptr, norm_bias_ptr, columns, valid):
    """gamma x + beta, zero in columns that are not valid, where x has to be zero."""
    gamma = load_vector(norm_weight_ptr, columns, valid, 1.0)
    return x * gamma[None, :] + load_vector(norm_bias_ptr, columns, valid, 0.0)[None, :]


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
            query = tl.dot(y.to(dtype), weight.T, query, input_precision=PRECISION)
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

    heads = D // HEAD
    for k in tl.range(0, D, BLOCK_K):
        c = k + columns
        absorbed = tl.zeros((16, BLOCK_K), tl.float32)
        for j0 in tl.static_range(0, HEAD, HEAD_BLOCK):
            j = j0 + tl.arange(0, HEAD_BLOCK)
            key_weights = k_weight_ptr + (head * HEAD + j)[:, None] * D + c[None, :]
            key_weight = load_tile(key_weights, j < HEAD, c < D, MASK_HEAD, MASK_K)
            absorbed = tl.dot(queries[j0 // HEAD_BLOCK], key_weight, absorbed, input_precision=PRECISION)
        tl.store(
            key_query_ptr + ((rows * heads + head) * D)[:, None] + c[None, :],
            absorbed * scale,
            mask=valid[:, None] & (c < D)[None, :],
        )


@triton.jit
def _start(
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
    absorbed = ()
    sums = ()
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
        absorbed = absorbed + (u.to(DTYPE).T,)
        sums = sums + (tl.broadcast_to(tl.where(here, x, 0.0).T, (BLOCK_K, HEADS_BLOCK)),)
    return absorbed, sums, score, first + shift, rstd


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
    sums (B, splits, H, D) against the split's own maximum. `softmax` gets that maximum and the sum of the weights
    (B, splits, 2, H). SAVE: also mean, rstd and the scores themselves, for the next launch to finish.
    """
    image = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    columns = tl.arange(0, BLOCK_K)
    heads = tl.arange(0, HEADS_BLOCK)
    MASK_K: tl.constexpr = D % BLOCK_K != 0

    # The CLS token starts the first split's running softmax.
    absorbed, sums, score, cls_mean, cls_rstd = _start(
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
        raw = ()
        for k in tl.static_range(0, D, BLOCK_K):
            c = k + columns
            raw = raw + (load_tile(starts + c[None, :], valid, c < D, True, MASK_K),)
        first = tl.sum(tl.where((columns == 0)[None, :], raw[0].to(tl.float32), 0.0), 1)
        centred = ()
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
            scores = tl.dot(x, absorbed[k // BLOCK_K], scores, input_precision=PRECISION)
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
            z = sums[k // BLOCK_K] * shrink[None, :]
            z = tl.dot(normalized[k // BLOCK_K].T, weights, z, input_precision=PRECISION)
            added = added + (z,)
        sums = added

    at = image * splits + split
    tl.store(softmax_ptr + (at * 2) * HEADS + heads, highest, mask=heads < HEADS)
    tl.store(softmax_ptr + (at * 2 + 1) * HEADS + heads, total, mask=heads < HEADS)
    for k in tl.static_range(0, D, BLOCK_K):
        c = k + columns
        z = sums[k // BLOCK_K]
        if not SPLIT:
            z = z / total[None, :]
        tl.store(
            context_ptr + (at * HEADS + heads)[:, None] * D + c[None, :],
            z.T,
            mask=(heads < HEADS)[:, None] & (c < D)[None, :],
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
def combine_splits(
    partial_ptr,
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
        z = tl.load(partial_ptr + rows[:, :, None] + c[None, None, :], mask=inside, other=0.0)
        contexts = contexts + (tl.sum(z * shares[:, :, None], 1),)
    at = context_ptr + ((images * HEADS + head) * D)[:, None]
    for k in tl.static_range(0, D, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        tl.store(at + c[None, :], contexts[k // BLOCK_K], mask=valid[:, None] & (c < D)[None, :])


@triton.jit
def cls_value(
    context_ptr,
    partial_ptr,
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
            combine_splits(
                partial_ptr, context_ptr, images, there, head, shares, splits, D, HEADS, SPLITS_BLOCK, BLOCK_K
            )
        if SAVE:
            for n0 in tl.range(0, tokens, 128):
                n = n0 + tl.arange(0, 128)
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
            out = tl.dot(y.to(dtype), weight.T, out, input_precision=PRECISION)
        out += load_vector(v_bias_ptr, head * HEAD + j, j < HEAD, 0.0)[None, :]
        tl.store(
            out_ptr + rows[:, None] * D + (head * HEAD + j)[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=valid[:, None] & (j < HEAD)[None, :],
        )


def absorb_query(
    cls: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    num_heads: int,
    eps: float,
    query: Tensor | None,
) -> Tensor:
    """Each head's W_k^T query / sqrt(d), (B, H, D); the query too, into `query` where that is given."""
    batch, width = cls.shape
    head = width // num_heads
    key_query = cls.new_empty((batch, num_heads, width), dtype=torch.float32)
    dtype = q_weight.dtype
    launch(
        cls_query,
        (cdiv(batch, ROWS), num_heads),
        configuration("cls_query", width, dtype, cls_default(width, dtype)),
        cls_ptr=cls,
        norm_weight_ptr=norm_weight,
        norm_bias_ptr=norm_bias,
        q_weight_ptr=q_weight,
        q_bias_ptr=q_bias,
        k_weight_ptr=k_weight,
        query_ptr=query,
        key_query_ptr=key_query,
        batch=batch,
        cls_stride=cls.stride(0),
        scale=head**-0.5,
        eps=eps,
        D=width,
        HEAD=head,
        HEAD_BLOCK=head_block(head),
        PRECISION=dot_precision(dtype),
    )
    return key_query


def pass_tokens(
    cls: Tensor,
    patches: Tensor,
    norm_weight: Tensor,
    key_query: Tensor,
    eps: float,
    dtype: torch.dtype,
    statistics: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The pass over the tokens: (contexts, contexts of the splits, softmax, splits); see `token_pass`.

    `statistics`: mean, rstd and scores, where they are kept. With one split both contexts are the same tensor, with
    more the first is yet to be filled.
    """
    (batch, heads, width), patch_count = key_query.shape, patches.shape[1]
    chosen = configuration("token_pass", width, dtype, pass_default(width, dtype))
    splits, tiles = split_tiles(batch, cdiv(patch_count, chosen["BLOCK_N"]))
    context = torch.empty_like(key_query)
    partial = context if splits == 1 else key_query.new_empty((batch, splits, heads, width))
    softmax = key_query.new_empty((batch, splits, 2, heads))
    mean, rstd, scores = statistics
    launch(
        token_pass,
        (batch, splits),
        chosen,
        cls_ptr=cls,
        patches_ptr=patches,
        norm_weight_ptr=norm_weight,
        key_query_ptr=key_query,
        mean_ptr=mean,
        rstd_ptr=rstd,
        scores_ptr=scores,
        context_ptr=partial,
        softmax_ptr=softmax,
        patches=patch_count,
        cls_stride=cls.stride(0),
        patches_batch=patches.stride(0),
        patches_token=patches.stride(1),
        splits=splits,
        tiles=tiles,
        eps=eps,
        D=width,
        HEADS=heads,
        HEADS_BLOCK=heads_block(heads),
        SPLIT=splits > 1,
        SAVE=mean is not None,
        DTYPE=DTYPES[dtype],
        PRECISION=dot_precision(dtype),
    )
    return context, partial, softmax, splits


def split_tiles(batch: int, tiles: int) -> tuple[int, int]:
    """(splits of an image's tokens, tiles in each): more than one where images alone leave multiprocessors idle."""
    processors = multiprocessors()
    if batch >= 0.8 * processors:
        return 1, tiles
    each = cdiv(tiles, min(cdiv(processors, batch), tiles, MOST_SPLITS))
    return cdiv(tiles, each), each


def power_of_two(n: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (n - 1).bit_length()


def head_block(head: int) -> int:
    """In how many columns at once a head's own d are walked."""
    return min(128, max(16, power_of_two(head)))


def heads_block(heads: int) -> int:
    """The heads as a matrix instruction takes them."""
    return max(16, power_of_two(heads))


def cls_default(width: int, dtype: torch.dtype) -> dict[str, int]:
    """Of kernels that stream weights past 16 images."""
    return {"BLOCK_K": block_of(width, 128 if dtype.itemsize == 2 else 64, 64), "num_warps": 4, "num_stages": 3}


def pass_default(width: int, dtype: torch.dtype) -> dict[str, int]:
    """Of the passes over the tokens: a tile stays in registers, next to a context of every head."""
    narrow = width <= 448
    stages = 2 if width <= 768 else 1
    if dtype.itemsize == 4:
        return {"BLOCK_N": 16, "BLOCK_K": block_of(width), "num_warps": 8, "num_stages": stages}
    return {"BLOCK_N": 32, "BLOCK_K": block_of(width), "num_warps": 4 if narrow else 8, "num_stages": stages}


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def dense(*tensors: Any) -> list[Any]:
    """Parameters, made contiguous where they are not."""
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]
