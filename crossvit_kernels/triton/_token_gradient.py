"""The tokens' part of cls_cross_attention's gradient: one more pass over them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._cls_rows import load_tile, load_vector, power_of_two
from ._launch import Configuration, architecture, cdiv, configuration, dot_precision, launch
from ._math import product
from ._rows import block_of
from ._token_pass import split_tiles


@triton.jit
def _cls_gradient(
    cls_ptr,
    mean,
    rstd,
    probs_ptr,
    delta,
    pairs_ptr,
    grad_normalized_ptr,
    tokens,
    here,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HEADS_FIRST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The CLS token's shares of the sums, in chunks, and of the sum of ds (zero unless `here`), as columns of the sums
    are; its own x^'s gradient, into memory."""
    columns = tl.arange(0, BLOCK_K)
    heads = tl.arange(0, HEADS_BLOCK)
    is_head = heads < HEADS
    MASK_K: tl.constexpr = D % BLOCK_K != 0
    CHUNKS: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    prob = tl.load(probs_ptr + heads * tokens, mask=is_head, other=0.0)
    dp = tl.zeros((HEADS_BLOCK,), tl.float32)
    xs: tl.tuple = ()
    for i in tl.static_range(CHUNKS):
        c = i * BLOCK_K + columns
        x = (load_vector(cls_ptr, c, c < D, 0.0) - mean) * rstd
        if MASK_K:
            x = tl.where(c < D, x, 0.0)
        xs = xs + (x,)
        at = pairs_ptr + (2 * heads)[:, None] * D + c[None, :]
        dz = load_tile(at + D, is_head, c < D, HEADS != HEADS_BLOCK, MASK_K)
        dp += tl.sum(dz.to(tl.float32) * x[None, :], 1)
    ds = prob * (dp - delta)
    sums: tl.tuple = ()
    start = tl.reshape(tl.join(ds, tl.zeros_like(ds)), (2 * HEADS_BLOCK,)) if HEADS_BLOCK == 8 else ds
    for i in tl.static_range(CHUNKS):
        share = start[:, None] * xs[i][None, :] if HEADS_FIRST else xs[i][:, None] * start[None, :]
        sums = sums + (tl.where(here, share, 0.0),)
        if grad_normalized_ptr is not None:
            c = i * BLOCK_K + columns
            at = pairs_ptr + (2 * heads)[:, None] * D + c[None, :]
            u = load_tile(at, is_head, c < D, HEADS != HEADS_BLOCK, MASK_K).to(tl.float32)
            dz = load_tile(at + D, is_head, c < D, HEADS != HEADS_BLOCK, MASK_K).to(tl.float32)
            g = tl.sum(u * ds[:, None] + dz * prob[:, None], 0)
            tl.store(grad_normalized_ptr + c, g, mask=(c < D) & here)
    return sums, tl.where(here, start, 0.0)


@triton.jit
def _normalize(x, mean, rstd, inside, MASK_K: tl.constexpr):
    """x^ of a chunk of tokens, zero in columns that are not inside."""
    x = x.to(tl.float32)
    x = (x - mean[:, None]) * rstd[:, None]
    if MASK_K:
        x = tl.where(inside[None, :], x, 0.0)
    return x


@triton.jit
def _add_product(x, weights, acc, HEADS_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """acc + x^T weights; HEADS_FIRST: acc + weights^T x."""
    if HEADS_FIRST:
        acc = product(weights.T, x, acc, PRECISION)
    else:
        acc = product(x.T, weights, acc, PRECISION)
    return acc


@triton.jit
def _store_gradient(at, inside, x, both, weights, rstd, along_one, along_x, PRECISION: tl.constexpr):
    """A chunk of dx from dx^ = weights both, through the LayerNorm."""
    g = tl.dot(weights, both, input_precision=PRECISION)
    g = rstd[:, None] * ((g - along_one[:, None]) - x.to(tl.float32) * along_x[:, None])
    tl.store(at, g.to(at.dtype.element_ty), mask=inside)


@triton.jit
def token_gradient(
    cls_ptr,
    patches_ptr,
    pairs_ptr,
    means_ptr,
    delta_ptr,
    context_ptr,
    mean_ptr,
    rstd_ptr,
    probs_ptr,
    grad_patches_ptr,
    grad_normalized_ptr,
    sums_ptr,
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
    """One image's tokens, or `tiles` tiles of them: with dz = gamma W_v^T dout and delta = dz . z,

    ds_hn = p_hn (dz_h . x^_n - delta_h)        sums: t_h = sum_n ds_hn x^_n
    dx^_n = sum_h ds_hn u_h + p_hn dz_h         through the LayerNorm into grad_patches, for the CLS token as it is

    `pairs` holds, rounded, gamma u_h in row 2h and dz_h in row 2h + 1, so that one product serves both; `means` their
    means over a row. RELOAD: a tile's tokens and the pairs are not held from one product to the next, but read again,
    in chunks, from the caches. HEADS_FIRST: the sums lie as (heads, columns), which mma.sync takes without repeating
    them in every warp; else as (columns, heads), 64 rows or more for wgmma and tcgen05. grad_patches_ptr,
    grad_normalized_ptr None: not needed. By mathematics sum_n ds_hn = 0: of IEEE float32 what rounding leaves of it,
    e_h, is taken out, t_h - e_h z_h, with z in `context`.
    """
    image = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    columns = tl.arange(0, BLOCK_K)
    heads = tl.arange(0, HEADS_BLOCK)
    pair = tl.arange(0, 2 * HEADS_BLOCK)
    is_head = heads < HEADS
    is_pair = pair < 2 * HEADS
    MASK_K: tl.constexpr = D % BLOCK_K != 0
    MASK_PAIRS: tl.constexpr = HEADS != HEADS_BLOCK
    CHUNKS: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    dtype: tl.constexpr = pairs_ptr.dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float32 and PRECISION == "ieee"
    of_tokens = image * (patches + 1)
    probs = probs_ptr + image * HEADS * (patches + 1)
    pairs = pairs_ptr + image * 2 * HEADS * D
    delta = tl.load(delta_ptr + image * HEADS + heads, mask=is_head, other=0.0)
    means = tl.load(means_ptr + image * 2 * HEADS + pair, mask=pair < 2 * HEADS, other=0.0)
    if grad_normalized_ptr is not None:
        grad_normalized_ptr += image * D
    sums, start = _cls_gradient(
        cls_ptr + image * cls_stride,
        tl.load(mean_ptr + of_tokens),
        tl.load(rstd_ptr + of_tokens),
        probs,
        delta,
        pairs,
        grad_normalized_ptr,
        patches + 1,
        split == 0,
        D,
        HEADS,
        HEADS_BLOCK,
        HEADS_FIRST,
        BLOCK_K,
    )
    if EXACT:
        leftover = tl.zeros((BLOCK_N, start.shape[0]), tl.float32)

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
        p = tl.load(
            probs + heads[None, :] * (patches + 1) + 1 + n[:, None], mask=valid[:, None] & is_head[None, :], other=0.0
        )
        normalized: tl.tuple = ()
        paired: tl.tuple = ()
        products = tl.zeros((BLOCK_N, 2 * HEADS_BLOCK), tl.float32)
        if RELOAD:
            for i in tl.range(CHUNKS):
                c = i * BLOCK_K + columns
                x = _normalize(load_tile(starts + c[None, :], valid, c < D, True, MASK_K), mean, rstd, c < D, MASK_K)
                both = load_tile(pairs + pair[:, None] * D + c[None, :], is_pair, c < D, MASK_PAIRS, MASK_K)
                products = product(x.to(dtype), both.T, products, PRECISION)
        else:
            # Zero, but in sight of the compiler no constant: the pairs are to be loaded anew for every tile, since all
            # their layouts together would fill the registers.
            zero = tl.minimum(tile, 0) * D
            raw: tl.tuple = ()
            for i in tl.static_range(CHUNKS):
                c = i * BLOCK_K + columns
                raw = raw + (load_tile(starts + c[None, :], valid, c < D, True, MASK_K),)
            for i in tl.static_range(CHUNKS):
                c = i * BLOCK_K + columns
                normalized = normalized + (_normalize(raw[i], mean, rstd, c < D, MASK_K).to(dtype),)
                both = pairs + zero + pair[:, None] * D + c[None, :]
                paired = paired + (load_tile(both, is_pair, c < D, MASK_PAIRS, MASK_K),)
                products = product(normalized[i], paired[i].T, products, PRECISION)
        _, dp = tl.split(tl.reshape(products, (BLOCK_N, HEADS_BLOCK, 2)))
        ds = p * (dp - delta[None, :])
        weights = tl.reshape(tl.join(ds, p), (BLOCK_N, 2 * HEADS_BLOCK))
        # Not straight from a reshape into a product: for TF32 the compiler would look for a layout in three dimensions.
        weights = tl.where(valid[:, None], weights, 0.0).to(dtype)
        # Matrix instructions take no fewer than 16 columns; the ones of p are for nothing, then.
        columns_of_sums = weights if HEADS_BLOCK == 8 else ds.to(dtype)
        if EXACT:
            leftover += columns_of_sums
        if not RELOAD:
            added = ()
            for i in tl.static_range(CHUNKS):
                added = added + (_add_product(normalized[i], columns_of_sums, sums[i], HEADS_FIRST, PRECISION),)
            sums = added
        if grad_patches_ptr is not None:
            # The sums of dx^ and dx^ x^ over a row come from the small matrices, before any column of dx^ is there.
            rounded = weights.to(tl.float32)
            along_one = tl.sum(rounded * means[None, :], 1)
            along_x = tl.sum(rounded * products, 1) / D
            out = grad_patches_ptr + (image * patches + n)[:, None] * D
            if RELOAD:
                for i in tl.range(CHUNKS):
                    c = i * BLOCK_K + columns
                    x = load_tile(starts + c[None, :], valid, c < D, True, MASK_K)
                    x = _normalize(x, mean, rstd, c < D, MASK_K).to(dtype)
                    both = load_tile(pairs + pair[:, None] * D + c[None, :], is_pair, c < D, MASK_PAIRS, MASK_K)
                    inside = valid[:, None] & (c < D)[None, :]
                    _store_gradient(out + c[None, :], inside, x, both, weights, rstd, along_one, along_x, PRECISION)
            else:
                for i in tl.static_range(CHUNKS):
                    c = i * BLOCK_K + columns
                    inside = valid[:, None] & (c < D)[None, :]
                    _store_gradient(
                        out + c[None, :],
                        inside,
                        normalized[i],
                        paired[i],
                        weights,
                        rstd,
                        along_one,
                        along_x,
                        PRECISION,
                    )
        if RELOAD:
            # Last: the compiler would put off these products until after a loop that followed, and keep all tokens.
            added = ()
            for i in tl.static_range(CHUNKS):
                c = i * BLOCK_K + columns
                x = _normalize(load_tile(starts + c[None, :], valid, c < D, True, MASK_K), mean, rstd, c < D, MASK_K)
                added = added + (_add_product(x.to(dtype), columns_of_sums, sums[i], HEADS_FIRST, PRECISION),)
            sums = added

    if HEADS_BLOCK == 8:
        kept = (pair % 2 == 0) & (pair < 2 * HEADS)
        head = pair // 2
    else:
        kept = is_head
        head = heads
    at = sums_ptr + ((image * splits + split) * HEADS + head)[:, None] * D
    if EXACT:
        rest = (tl.sum(leftover, 0) + start)[:, None]
    for i in tl.static_range(CHUNKS):
        c = i * BLOCK_K + columns
        total = sums[i] if HEADS_FIRST else sums[i].T
        if EXACT:
            z = context_ptr + (image * HEADS + head)[:, None] * D + c[None, :]
            total -= rest * load_tile(z, kept, c < D, True, MASK_K)
        tl.store(at + c[None, :], total, mask=kept[:, None] & (c < D)[None, :])


_EARLY = ("sm_80", "sm_86", "sm_87", "sm_89")
Plan = tuple[Configuration, int, int]


def plan_tokens(batch: int, patches: int, width: int, heads: int, dtype: torch.dtype) -> Plan:
    """The pass's configuration, splits of an image's tokens, and tiles in each."""
    chosen = configuration("token_gradient", width, dtype, gradient_default(width, heads, dtype))
    return chosen, *split_tiles(batch, cdiv(patches, chosen["BLOCK_N"]))


def differentiate_tokens(
    cls: Tensor,
    patches: Tensor,
    pairs: Tensor,
    means: Tensor,
    delta: Tensor,
    context: Tensor,
    mean: Tensor,
    rstd: Tensor,
    probs: Tensor,
    grad_patches: Tensor | None,
    grad_normalized: Tensor | None,
    plan: Plan,
) -> Tensor:
    """t_h = sum_n ds_hn x^_n of every split, (B, splits, H, D); the gradients into the tensors given for them.

    `grad_normalized` (B, D) gets the gradient of the CLS token's x^, as far as it is one of the tokens.
    """
    batch, heads, tokens = probs.shape
    width, dtype = patches.shape[2], pairs.dtype
    chosen, splits, tiles = plan
    heads_block = max(8, power_of_two(heads))
    again = reload(width, heads_block, dtype)
    sums = probs.new_empty((batch, splits, heads, width))
    launch(
        token_gradient,
        (batch, splits),
        chosen,
        cls_ptr=cls,
        patches_ptr=patches,
        pairs_ptr=pairs,
        means_ptr=means,
        delta_ptr=delta,
        context_ptr=context,
        mean_ptr=mean,
        rstd_ptr=rstd,
        probs_ptr=probs,
        grad_patches_ptr=grad_patches,
        grad_normalized_ptr=grad_normalized,
        sums_ptr=sums,
        patches=tokens - 1,
        cls_stride=cls.stride(0),
        patches_batch=patches.stride(0),
        patches_token=patches.stride(1),
        splits=splits,
        tiles=tiles,
        D=width,
        HEADS=heads,
        HEADS_BLOCK=heads_block,
        HEADS_FIRST=again or architecture() in _EARLY,
        RELOAD=again,
        PRECISION=dot_precision(dtype),
    )
    return sums


def reload(width: int, heads_block: int, dtype: torch.dtype) -> bool:
    """Whether a tile of tokens and the pairs are too much to be held from one product to the next."""
    if dtype.itemsize == 4 and (width > 448 or dot_precision(dtype) == "ieee"):
        return True  # of what IEEE products take, a thread holds whole rows and columns
    return 2 * heads_block * width * dtype.itemsize > 100_000


def gradient_default(width: int, heads: int, dtype: torch.dtype) -> dict[str, int]:
    """Of token_gradient."""
    block, early = block_of(width, 128, 64 if width > 128 else 32), architecture() in _EARLY
    if dtype.itemsize == 4:
        if dot_precision(dtype) == "tf32":
            return {"BLOCK_N": 16, "BLOCK_K": block_of(width, 64), "num_warps": 8, "num_stages": 2}
        block, warps = (block_of(width, 64), 4) if width <= 256 else (32, 8)
        return {"BLOCK_N": 16, "BLOCK_K": block, "num_warps": warps, "num_stages": 1}
    if width <= 256:
        return {"BLOCK_N": 16 if early and width > 192 else 32, "BLOCK_K": block, "num_warps": 4, "num_stages": 2}
    if width <= 448:
        # Wider blocks leave no register for tokens of 32 bits, which come under autocast.
        tokens = 16 if early or heads > 8 else 32
        return {"BLOCK_N": tokens, "BLOCK_K": block_of(width, 64), "num_warps": 8, "num_stages": 2}
    return {"BLOCK_N": 16, "BLOCK_K": block, "num_warps": 8, "num_stages": 1 if early or width > 768 else 2}
