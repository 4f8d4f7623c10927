"""The tokens' part of cls_cross_attention's gradient: one more pass over them."""

import triton
import triton.language as tl

from .arithmetic import product
from .tiles import load_tile, load_vector


@triton.jit
def cls_share(cls_ptr, mean, rstd, probs_ptr, delta, stacked_ptr, grad_normalized_ptr, tokens, here, D: tl.constexpr,
              HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, HEADS_FIRST: tl.constexpr,
              BLOCK_K: tl.constexpr):  # fmt: skip
    """The CLS token's share of grad_u, in chunks, and its grad_scores, as the columns of grad_u lie; both are zero
    unless `here`. The gradient of the normalized CLS token goes to memory."""
    columns = tl.arange(0, BLOCK_K)
    heads = tl.arange(0, HEADS_BLOCK)
    is_head = heads < HEADS
    MASK_K: tl.constexpr = D % BLOCK_K != 0
    CHUNKS: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    probs = tl.load(probs_ptr + heads * tokens, mask=is_head, other=0.0)
    grad_probs = tl.zeros((HEADS_BLOCK,), tl.float32)
    xs: tl.tuple = ()
    for i in tl.static_range(CHUNKS):
        c = i * BLOCK_K + columns
        x = (load_vector(cls_ptr, c, c < D, 0.0) - mean) * rstd
        if MASK_K:
            x = tl.where(c < D, x, 0.0)
        xs = xs + (x,)
        at = stacked_ptr + (2 * heads)[:, None] * D + c[None, :]
        grad_context = load_tile(at + D, is_head, c < D, HEADS != HEADS_BLOCK, MASK_K)
        grad_probs += tl.sum(grad_context.to(tl.float32) * x[None, :], 1)
    grad_scores = probs * (grad_probs - delta)
    grad_u: tl.tuple = ()
    cls_grad_scores = (
        tl.reshape(tl.join(grad_scores, tl.zeros_like(grad_scores)), (2 * HEADS_BLOCK,))
        if HEADS_BLOCK == 8
        else grad_scores
    )
    for i in tl.static_range(CHUNKS):
        share = cls_grad_scores[:, None] * xs[i][None, :] if HEADS_FIRST else xs[i][:, None] * cls_grad_scores[None, :]
        grad_u = grad_u + (tl.where(here, share, 0.0),)
        if grad_normalized_ptr is not None:
            c = i * BLOCK_K + columns
            at = stacked_ptr + (2 * heads)[:, None] * D + c[None, :]
            u = load_tile(at, is_head, c < D, HEADS != HEADS_BLOCK, MASK_K).to(tl.float32)
            grad_context = load_tile(at + D, is_head, c < D, HEADS != HEADS_BLOCK, MASK_K).to(tl.float32)
            grad = tl.sum(u * grad_scores[:, None] + grad_context * probs[:, None], 0)
            tl.store(grad_normalized_ptr + c, grad, mask=(c < D) & here)
    return grad_u, tl.where(here, cls_grad_scores, 0.0)


@triton.jit
def normalize(x, mean, rstd, inside, MASK_K: tl.constexpr):
    """A chunk of tokens, normalized; zero in columns that are not inside."""
    x = x.to(tl.float32)
    x = (x - mean[:, None]) * rstd[:, None]
    if MASK_K:
        x = tl.where(inside[None, :], x, 0.0)
    return x


@triton.jit
def normalized_chunk(starts, valid, mean, rstd, c, D: tl.constexpr, BLOCK_K: tl.constexpr):
    """The columns c of a tile of tokens, normalized; zero beyond the width."""
    x = load_tile(starts + c[None, :], valid, c < D, True, D % BLOCK_K != 0)
    return normalize(x, mean, rstd, c < D, D % BLOCK_K != 0)


@triton.jit
def stacked_chunk(
    stacked, stacked_row, c, D: tl.constexpr, HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The columns c of `stacked`, see `token_gradient`; zero beyond the heads and the width."""
    at = stacked + stacked_row[:, None] * D + c[None, :]
    return load_tile(at, stacked_row < 2 * HEADS, c < D, HEADS != HEADS_BLOCK, D % BLOCK_K != 0)


@triton.jit
def held_products(starts, valid, mean, rstd, stacked, stacked_row, columns, products, D: tl.constexpr,
                  HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
                  BLOCK_K: tl.constexpr):  # fmt: skip
    """products + normalized stacked^T, and the chunks of both operands, which later products take again."""
    CHUNKS: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    raw: tl.tuple = ()
    normalized: tl.tuple = ()
    stacks: tl.tuple = ()
    for i in tl.static_range(CHUNKS):
        c = i * BLOCK_K + columns
        raw = raw + (load_tile(starts + c[None, :], valid, c < D, True, D % BLOCK_K != 0),)
    for i in tl.static_range(CHUNKS):
        c = i * BLOCK_K + columns
        x = normalize(raw[i], mean, rstd, c < D, D % BLOCK_K != 0)
        normalized = normalized + (x.to(stacked.dtype.element_ty),)
        stacks = stacks + (stacked_chunk(stacked, stacked_row, c, D, HEADS, HEADS_BLOCK, BLOCK_K),)
        products = product(normalized[i], stacks[i].T, products, PRECISION)
    return products, normalized, stacks


@triton.jit
def reloaded_products(starts, valid, mean, rstd, stacked, stacked_row, columns, products, D: tl.constexpr,
                      HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
                      BLOCK_K: tl.constexpr):  # fmt: skip
    """products + normalized stacked^T, of which no operand is kept."""
    for i in tl.range((D + BLOCK_K - 1) // BLOCK_K):
        c = i * BLOCK_K + columns
        x = normalized_chunk(starts, valid, mean, rstd, c, D, BLOCK_K)
        stack = stacked_chunk(stacked, stacked_row, c, D, HEADS, HEADS_BLOCK, BLOCK_K)
        products = product(x.to(stacked.dtype.element_ty), stack.T, products, PRECISION)
    return products


@triton.jit
def add_product(x, weights, acc, HEADS_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """acc + x^T weights; with HEADS_FIRST acc + weights^T x."""
    if HEADS_FIRST:
        acc = product(weights.T, x, acc, PRECISION)
    else:
        acc = product(x.T, weights, acc, PRECISION)
    return acc


@triton.jit
def store_gradient(at, inside, x, stack, stacked_weights, rstd, mean_grad, mean_grad_x, PRECISION: tl.constexpr):
    """Stores a chunk of the tokens' gradient, from grad_normalized = stacked_weights stack, through the LayerNorm."""
    grad = tl.dot(stacked_weights, stack, input_precision=PRECISION)
    grad = rstd[:, None] * ((grad - mean_grad[:, None]) - x.to(tl.float32) * mean_grad_x[:, None])
    tl.store(at, grad.to(at.dtype.element_ty), mask=inside)


@triton.jit
def store_grad_u(grad_u_ptr, context_ptr, grad_u, rest, part, image, head, kept, columns,
                 D: tl.constexpr, HEADS: tl.constexpr, HEADS_FIRST: tl.constexpr, EXACT: tl.constexpr,
                 BLOCK_K: tl.constexpr):  # fmt: skip
    """Stores grad_u of the heads whose columns are `kept`; where EXACT, less rest context."""
    at = grad_u_ptr + (part * HEADS + head)[:, None] * D
    for i in tl.static_range(len(grad_u)):
        c = i * BLOCK_K + columns
        total = grad_u[i] if HEADS_FIRST else grad_u[i].T
        if EXACT:
            context = context_ptr + (image * HEADS + head)[:, None] * D + c[None, :]
            total -= rest * load_tile(context, kept, c < D, True, D % BLOCK_K != 0)
        tl.store(at + c[None, :], total, mask=kept[:, None] & (c < D)[None, :])


@triton.jit
def token_gradient(
    cls_ptr,
    patches_ptr,
    stacked_ptr,
    stacked_means_ptr,
    delta_ptr,
    context_ptr,
    mean_ptr,
    rstd_ptr,
    probs_ptr,
    grad_patches_ptr,
    grad_normalized_ptr,
    grad_u_ptr,
    patches,
    cls_stride,
    patches_batch,
    patches_token,
    splits,
    tiles,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HEADS_FIRST: tl.constexpr,
    RELOAD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
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
    columns = tl.arange(0, BLOCK_K)
    heads = tl.arange(0, HEADS_BLOCK)
    stacked_row = tl.arange(0, 2 * HEADS_BLOCK)
    is_head = heads < HEADS
    is_stacked = stacked_row < 2 * HEADS
    CHUNKS: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    dtype: tl.constexpr = stacked_ptr.dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float32 and PRECISION == "ieee"
    of_tokens = image * (patches + 1)
    probs_ptr += image * HEADS * (patches + 1)
    stacked = stacked_ptr + image * 2 * HEADS * D
    delta = tl.load(delta_ptr + image * HEADS + heads, mask=is_head, other=0.0)
    stacked_means = tl.load(stacked_means_ptr + image * 2 * HEADS + stacked_row, mask=is_stacked, other=0.0)
    if grad_normalized_ptr is not None:
        grad_normalized_ptr += image * D
    grad_u, cls_grad_scores = cls_share(
        cls_ptr + image * cls_stride, tl.load(mean_ptr + of_tokens), tl.load(rstd_ptr + of_tokens), probs_ptr, delta,
        stacked, grad_normalized_ptr, patches + 1, split == 0, D, HEADS, HEADS_BLOCK, HEADS_FIRST, BLOCK_K,
    )  # fmt: skip
    if EXACT:
        rests = tl.zeros((BLOCK_N, cls_grad_scores.shape[0]), tl.float32)

    tokens = patches_ptr + image * patches_batch
    for tile in tl.range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(patches, BLOCK_N))):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = n < patches
        starts = tokens + n.to(tl.int64)[:, None] * patches_token
        mean = tl.load(mean_ptr + of_tokens + 1 + n, mask=valid, other=0.0)
        rstd = tl.load(rstd_ptr + of_tokens + 1 + n, mask=valid, other=0.0)
        # A sum of one element: past a reduction the compiler does not carry the operands' layouts up to the loads of
        # the tokens, which could not be asynchronous then.
        mean = tl.sum(mean[:, None], 1)
        probs = tl.load(
            probs_ptr + heads[None, :] * (patches + 1) + 1 + n[:, None],
            mask=valid[:, None] & is_head[None, :],
            other=0.0,
        )
        products = tl.zeros((BLOCK_N, 2 * HEADS_BLOCK), tl.float32)
        if RELOAD:
            products = reloaded_products(
                starts, valid, mean, rstd, stacked, stacked_row, columns, products,
                D, HEADS, HEADS_BLOCK, PRECISION, BLOCK_K,
            )  # fmt: skip
        else:
            # Zero, but in sight of the compiler no constant: `stacked` is to be loaded anew for every tile, since all
            # its layouts together would fill the registers.
            zero = tl.minimum(tile, 0) * D
            products, normalized, stacks = held_products(
                starts, valid, mean, rstd, stacked + zero, stacked_row, columns, products,
                D, HEADS, HEADS_BLOCK, PRECISION, BLOCK_K,
            )  # fmt: skip
        _, grad_probs = tl.split(tl.reshape(products, (BLOCK_N, HEADS_BLOCK, 2)))
        grad_scores = probs * (grad_probs - delta[None, :])
        stacked_weights = tl.reshape(tl.join(grad_scores, probs), (BLOCK_N, 2 * HEADS_BLOCK))
        # Not straight from a reshape into a product: for TF32 the compiler would look for a layout in three dimensions.
        stacked_weights = tl.where(valid[:, None], stacked_weights, 0.0).to(dtype)
        # Matrix instructions take no fewer than 16 columns; those of probs are for nothing, then.
        grad_u_weights = stacked_weights if HEADS_BLOCK == 8 else grad_scores.to(dtype)
        if EXACT:
            rests += grad_u_weights
        if not RELOAD:
            added = ()
            for i in tl.static_range(CHUNKS):
                added = added + (add_product(normalized[i], grad_u_weights, grad_u[i], HEADS_FIRST, PRECISION),)
            grad_u = added
        if grad_patches_ptr is not None:
            # The means of grad_normalized and of grad_normalized normalized over a row come from the small matrices,
            # before any column of grad_normalized is there.
            rounded = stacked_weights.to(tl.float32)
            mean_grad = tl.sum(rounded * stacked_means[None, :], 1)
            mean_grad_x = tl.sum(rounded * products, 1) / D
            out = grad_patches_ptr + (image * patches + n)[:, None] * D
            if RELOAD:
                for i in tl.range(CHUNKS):
                    c = i * BLOCK_K + columns
                    x = normalized_chunk(starts, valid, mean, rstd, c, D, BLOCK_K).to(dtype)
                    stack = stacked_chunk(stacked, stacked_row, c, D, HEADS, HEADS_BLOCK, BLOCK_K)
                    inside = valid[:, None] & (c < D)[None, :]
                    store_gradient(
                        out + c[None, :], inside, x, stack, stacked_weights, rstd, mean_grad, mean_grad_x, PRECISION
                    )
            else:
                for i in tl.static_range(CHUNKS):
                    c = i * BLOCK_K + columns
                    inside = valid[:, None] & (c < D)[None, :]
                    x, stack = normalized[i], stacks[i]
                    store_gradient(
                        out + c[None, :], inside, x, stack, stacked_weights, rstd, mean_grad, mean_grad_x, PRECISION
                    )
        if RELOAD:
            # Last: the compiler would put off these products until after a loop that followed, and keep all tokens.
            added = ()
            for i in tl.static_range(CHUNKS):
                c = i * BLOCK_K + columns
                x = normalized_chunk(starts, valid, mean, rstd, c, D, BLOCK_K)
                added = added + (add_product(x.to(dtype), grad_u_weights, grad_u[i], HEADS_FIRST, PRECISION),)
            grad_u = added

    if HEADS_BLOCK == 8:
        kept = (stacked_row % 2 == 0) & is_stacked
        head = stacked_row // 2
    else:
        kept = is_head
        head = heads
    rest = cls_grad_scores
    if EXACT:
        rest = (tl.sum(rests, 0) + cls_grad_scores)[:, None]
    store_grad_u(
        grad_u_ptr, context_ptr, grad_u, rest, image * splits + split, image, head, kept, columns,
        D, HEADS, HEADS_FIRST, EXACT, BLOCK_K,
    )  # fmt: skip
