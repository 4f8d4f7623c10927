"""The tokens' part of cls_cross_attention's gradient: one more pass over them."""

import triton
import triton.language as tl

from ..tiling import heads_block, ragged
from .arithmetic import product
from .layer_norm import normalize
from .tiles import load_columns, load_rows, load_tile, load_vector, store_inside


@triton.jit
def stacked_chunk(stacked, c, D: tl.constexpr, HEADS: tl.constexpr):
    """The columns c of `stacked`, (pointer, rows), see `token_gradient`; zero beyond the heads and the width."""
    stacked_ptr, row = stacked
    at = stacked_ptr + row[:, None] * D + c[None, :]
    return load_tile(at, row < 2 * HEADS, c < D, row.shape[0] != 2 * HEADS, ragged(D, c.shape[0]))


@triton.jit
def cls_share(cls_ptr, mean, rstd, probs_ptr, delta, stacked_ptr, grad_normalized_ptr, tokens, here, D: tl.constexpr,
              HEADS: tl.constexpr, HEADS_FIRST: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """The CLS token's share of grad_u, in chunks, and its grad_scores, as the columns of grad_u lie; both are zero
    unless `here`. The gradient of the normalized CLS token goes to memory."""
    HEADS_BLOCK: tl.constexpr = heads_block(HEADS, 8)
    heads = tl.arange(0, HEADS_BLOCK)
    probs = tl.load(probs_ptr + heads * tokens, mask=heads < HEADS, other=0.0)
    grad_probs = tl.zeros((HEADS_BLOCK,), tl.float32)
    xs: tl.tuple = ()
    for k in tl.static_range(0, D, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        x = (load_vector(cls_ptr, c, c < D) - mean) * rstd
        if D % BLOCK_K != 0:
            x = tl.where(c < D, x, 0.0)
        xs = xs + (x,)
        grad_context = head_rows(stacked_ptr + D, heads, c, D, HEADS)
        grad_probs += tl.sum(grad_context * x[None, :], 1)
    grad_scores = probs * (grad_probs - delta)
    cls_grad_scores = grad_scores
    if HEADS_BLOCK == 8:
        cls_grad_scores = tl.reshape(tl.join(grad_scores, tl.zeros_like(grad_scores)), (2 * HEADS_BLOCK,))
    grad_u: tl.tuple = ()
    for i in tl.static_range(len(xs)):
        share = cls_grad_scores[:, None] * xs[i][None, :] if HEADS_FIRST else xs[i][:, None] * cls_grad_scores[None, :]
        grad_u = grad_u + (tl.where(here, share, 0.0),)
        if grad_normalized_ptr is not None:
            c = i * BLOCK_K + tl.arange(0, BLOCK_K)
            u = head_rows(stacked_ptr, heads, c, D, HEADS)
            grad_context = head_rows(stacked_ptr + D, heads, c, D, HEADS)
            grad = tl.sum(u * grad_scores[:, None] + grad_context * probs[:, None], 0)
            tl.store(grad_normalized_ptr + c, grad, mask=(c < D) & here)
    return grad_u, tl.where(here, cls_grad_scores, 0.0)


@triton.jit
def head_rows(stacked_ptr, heads, c, D: tl.constexpr, HEADS: tl.constexpr):
    """The columns c of every second row of `stacked`, float32."""
    at = stacked_ptr + (2 * heads)[:, None] * D + c[None, :]
    return load_tile(at, heads < HEADS, c < D, heads.shape[0] != HEADS, ragged(D, c.shape[0])).to(tl.float32)


@triton.jit
def normalized_chunk(tokens, c, D: tl.constexpr, DTYPE: tl.constexpr):
    """The columns c of a tile of tokens, (starts, valid, mean, rstd), normalized; zero beyond the width."""
    starts, valid, mean, rstd = tokens
    return normalize(load_columns(starts, valid, c, D), mean, None, rstd, c, D).to(DTYPE)


@triton.jit
def held_products(tokens, stacked, products, D: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
                  BLOCK_K: tl.constexpr):  # fmt: skip
    """products + normalized stacked^T, and the chunks of both operands, which later products take again."""
    starts, valid, mean, rstd = tokens
    chunks = load_rows(starts, valid, D, BLOCK_K)
    normalized: tl.tuple = ()
    stacks: tl.tuple = ()
    for i in tl.static_range(len(chunks)):
        c = i * BLOCK_K + tl.arange(0, BLOCK_K)
        x = normalize(chunks[i], mean, None, rstd, c, D)
        normalized = normalized + (x.to(stacked[0].dtype.element_ty),)
        stacks = stacks + (stacked_chunk(stacked, c, D, HEADS),)
        products = product(normalized[i], stacks[i].T, products, PRECISION)
    return products, normalized, stacks


@triton.jit
def reloaded_products(tokens, stacked, products, D: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
                      BLOCK_K: tl.constexpr):  # fmt: skip
    """products + normalized stacked^T, of which no operand is kept."""
    for k in tl.range(0, D, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        x = normalized_chunk(tokens, c, D, stacked[0].dtype.element_ty)
        products = product(x, stacked_chunk(stacked, c, D, HEADS).T, products, PRECISION)
    return products


@triton.jit
def tile_weights(products, probs, delta, valid, DTYPE: tl.constexpr):
    """From a tile's products with `stacked`: grad_scores; these and probs by turns, the weights of the rows of
    `stacked` in grad_normalized; and the weights of the tokens in grad_u, as its columns lie."""
    _, grad_probs = tl.split(tl.reshape(products, (probs.shape[0], probs.shape[1], 2)))
    grad_scores = probs * (grad_probs - delta[None, :])
    stacked_weights = tl.reshape(tl.join(grad_scores, probs), products.shape)
    # Not straight from a reshape into a product: for TF32 the compiler would look for a layout in three dimensions.
    stacked_weights = tl.where(valid[:, None], stacked_weights, 0.0).to(DTYPE)
    # Matrix instructions take no fewer than 16 columns; those of probs are for nothing, then.
    return stacked_weights, stacked_weights if probs.shape[1] == 8 else grad_scores.to(DTYPE)


@triton.jit
def add_to_grad_u(grad_u, normalized, tokens, weights, D: tl.constexpr, HEADS_FIRST: tl.constexpr,
                  PRECISION: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """grad_u + normalized^T weights, in chunks; with HEADS_FIRST grad_u + weights^T normalized. `normalized` is None
    where a tile is not held."""
    added: tl.tuple = ()
    for i in tl.static_range(len(grad_u)):
        if normalized is None:
            x = normalized_chunk(tokens, i * BLOCK_K + tl.arange(0, BLOCK_K), D, weights.dtype)
        else:
            x = normalized[i]
        if HEADS_FIRST:
            added = added + (product(weights.T, x, grad_u[i], PRECISION),)
        else:
            added = added + (product(x.T, weights, grad_u[i], PRECISION),)
    return added


@triton.jit
def store_grad_patches(out, tokens, normalized, stacked, stacks, stacked_weights, stacked_means, products,
                       D: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
                       BLOCK_K: tl.constexpr):  # fmt: skip
    """Stores the gradient of a tile of tokens, from grad_normalized = stacked_weights stacked, through the LayerNorm.

    Its means over a row, and those of grad_normalized normalized, come from the small matrices, before any column of
    grad_normalized is there. `normalized` and `stacks` are None where a tile is not held.
    """
    _, valid, _, rstd = tokens
    rounded = stacked_weights.to(tl.float32)
    mean_grad = tl.sum(rounded * stacked_means[None, :], 1)
    mean_grad_x = tl.sum(rounded * products, 1) / D
    for i in (tl.range if normalized is None else tl.static_range)((D + BLOCK_K - 1) // BLOCK_K):
        c = i * BLOCK_K + tl.arange(0, BLOCK_K)
        if normalized is None:
            x = normalized_chunk(tokens, c, D, stacked_weights.dtype)
            stack = stacked_chunk(stacked, c, D, HEADS)
        else:
            x = normalized[i]
            stack = stacks[i]
        grad = tl.dot(stacked_weights, stack, input_precision=PRECISION)
        grad = rstd[:, None] * ((grad - mean_grad[:, None]) - x.to(tl.float32) * mean_grad_x[:, None])
        store_inside(out, valid, c, c < D, grad)


@triton.jit
def store_grad_u(to, context, kept, grad_u, rest, D: tl.constexpr, HEADS_FIRST: tl.constexpr, EXACT: tl.constexpr,
                 BLOCK_K: tl.constexpr):  # fmt: skip
    """Stores the rows of grad_u that are `kept`; where EXACT, less rest context."""
    for i in tl.static_range(len(grad_u)):
        c = i * BLOCK_K + tl.arange(0, BLOCK_K)
        total = grad_u[i] if HEADS_FIRST else grad_u[i].T
        if EXACT:
            total -= rest[:, None] * load_columns(context, kept, c, D)
        store_inside(to, kept, c, c < D, total)


@triton.jit
def token_gradient(
    cls, patches, norm, stacked_ptr, stacked_means_ptr, delta_ptr, context_ptr, probs_ptr,
    grad_patches_ptr, grad_normalized_ptr, split_grad_u_ptr, splits, tiles,
    D: tl.constexpr, HEADS: tl.constexpr, HEADS_FIRST: tl.constexpr, RELOAD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradients of one image's tokens, or of `tiles` tiles of them:

        grad_scores = probs (grad_context . normalized - delta)
        grad_u = sum over the tokens of grad_scores normalized, less rest context
        grad_normalized = sum over the heads of probs grad_context + grad_scores u

    grad_normalized goes through the LayerNorm into grad_patches; the CLS token's is stored as it is. `stacked` holds
    u_h in row 2h and grad_context_h in row 2h + 1, rounded, so that one product serves both; `stacked_means` holds the
    means of its rows. With RELOAD a tile's tokens and `stacked` are not held from one product to the next, but read
    again, in chunks, from the caches. With HEADS_FIRST grad_u lies as (heads, columns), which mma.sync takes without
    repeating them in every warp; else as (columns, heads), 64 rows or more for wgmma and tcgen05. The pointer of a
    gradient that is not needed is None. `rest` is the sum of grad_scores over the tokens, which is zero but for
    rounding; it is taken out where the products are of IEEE float32.
    """
    image = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    HEADS_BLOCK: tl.constexpr = heads_block(HEADS, 8)
    heads = tl.arange(0, HEADS_BLOCK)
    stacked_row = tl.arange(0, 2 * HEADS_BLOCK)
    is_head = heads < HEADS
    is_stacked = stacked_row < 2 * HEADS
    dtype: tl.constexpr = stacked_ptr.dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float32 and PRECISION == "ieee"
    tokens = patches.tokens + 1
    of_tokens = image * tokens
    probs_ptr += image * HEADS * tokens
    stacked_ptr += image * 2 * HEADS * D
    delta = tl.load(delta_ptr + image * HEADS + heads, mask=is_head, other=0.0)
    stacked_means = tl.load(stacked_means_ptr + image * 2 * HEADS + stacked_row, mask=is_stacked, other=0.0)
    if grad_normalized_ptr is not None:
        grad_normalized_ptr += image * D
    grad_u, rest = cls_share(
        cls.base + image * cls.batch, tl.load(norm.mean + of_tokens), tl.load(norm.rstd + of_tokens), probs_ptr,
        delta, stacked_ptr, grad_normalized_ptr, tokens, split == 0, D, HEADS, HEADS_FIRST, BLOCK_K,
    )  # fmt: skip
    if EXACT:
        rests = tl.zeros((BLOCK_N, rest.shape[0]), tl.float32)

    for tile in tl.range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(patches.tokens, BLOCK_N))):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = n < patches.tokens
        mean = tl.load(norm.mean + of_tokens + 1 + n, mask=valid, other=0.0)
        rstd = tl.load(norm.rstd + of_tokens + 1 + n, mask=valid, other=0.0)
        # A sum of one element: past a reduction the compiler does not carry the operands' layouts up to the loads of
        # the tokens, which could not be asynchronous then.
        mean = tl.sum(mean[:, None], 1)
        tile_tokens = (patches.base + image * patches.batch + n.to(tl.int64) * patches.row, valid, mean, rstd)
        probs_at = probs_ptr + heads[None, :] * tokens + 1 + n[:, None]
        probs = tl.load(probs_at, mask=valid[:, None] & is_head[None, :], other=0.0)
        products = tl.zeros((BLOCK_N, 2 * HEADS_BLOCK), tl.float32)
        stacked = (stacked_ptr, stacked_row)
        normalized = None
        stacks = None
        if RELOAD:
            products = reloaded_products(tile_tokens, stacked, products, D, HEADS, PRECISION, BLOCK_K)
        else:
            # Zero is added, but in sight of the compiler no constant: `stacked` is to be loaded anew for every tile,
            # since all its layouts together would fill the registers.
            stacked = (stacked_ptr + tl.minimum(tile, 0) * D, stacked_row)
            products, normalized, stacks = held_products(tile_tokens, stacked, products, D, HEADS, PRECISION, BLOCK_K)
        stacked_weights, weights = tile_weights(products, probs, delta, valid, dtype)
        if EXACT:
            rests += weights
        if not RELOAD:
            grad_u = add_to_grad_u(grad_u, normalized, tile_tokens, weights, D, HEADS_FIRST, PRECISION, BLOCK_K)
        if grad_patches_ptr is not None:
            store_grad_patches(
                grad_patches_ptr + (image * patches.tokens + n) * D, tile_tokens, normalized, stacked, stacks,
                stacked_weights, stacked_means, products, D, HEADS, PRECISION, BLOCK_K,
            )  # fmt: skip
        if RELOAD:
            # Last: the compiler would put off these products until after a loop that followed, and keep all tokens.
            grad_u = add_to_grad_u(grad_u, normalized, tile_tokens, weights, D, HEADS_FIRST, PRECISION, BLOCK_K)

    if HEADS_BLOCK == 8:
        kept = (stacked_row % 2 == 0) & is_stacked
        head = stacked_row // 2
    else:
        kept = is_head
        head = heads
    if EXACT:
        rest += tl.sum(rests, 0)
    to = split_grad_u_ptr + ((image * splits + split) * HEADS + head) * D
    context = context_ptr + (image * HEADS + head) * D
    store_grad_u(to, context, kept, grad_u, rest, D, HEADS_FIRST, EXACT, BLOCK_K)
