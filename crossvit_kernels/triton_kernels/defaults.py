"""How kernels are launched where no configuration was measured."""

import functools

import torch

from .launch import Configuration, architecture, cdiv, configuration, dot_precision, multiprocessors
from .views import FEW_ROWS


@functools.cache
def block_of(width: int, largest: int = 128, smallest: int = 32) -> int:
    """The power of two that covers `width` with the least rest; of several the largest."""
    blocks = [smallest]
    while blocks[-1] < largest:
        blocks.append(2 * blocks[-1])
    return min(blocks, key=lambda block: (cdiv(width, block) * block, -block))


def power_of_two(n: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (n - 1).bit_length()


def head_block(head: int) -> int:
    """In how many columns at once a head's own d are walked."""
    return min(128, max(16, power_of_two(head)))


def cls_default(width: int, head: int, dtype: torch.dtype) -> dict[str, int]:
    """Of kernels that stream weights past 16 images."""
    if head > 128:  # one head's weights in several pieces at once, too many to have more on their way
        return {"BLOCK_K": block_of(width, 64), "num_warps": 8, "num_stages": 1}
    block = block_of(width, 128 if dtype.itemsize == 2 else 64, 64)
    # With a column of a vector per thread, 16 bits wide, its load would not be asynchronous.
    # Of float32 numbers a thread's share of a product takes twice the registers; a mask takes some too.
    more = dtype.itemsize == 4 and (width % block != 0 or (width <= 448 and dot_precision(dtype) == "ieee"))
    return {"BLOCK_K": block, "num_warps": 8 if block == 128 or more else 4, "num_stages": 4}


def pass_default(width: int, dtype: torch.dtype) -> dict[str, int]:
    """Of token_pass: a tile stays in registers, next to a context of every head."""
    stages = 2 if width <= 768 else 1
    if dtype.itemsize == 4:
        exact = dot_precision(dtype) == "ieee"
        block = 32 if exact and width <= 448 else block_of(width, 64)
        return {"BLOCK_N": 16, "BLOCK_K": block, "num_warps": 8, "num_stages": stages}
    block = block_of(width, 128, 64 if width > 128 else 32)
    tokens = 32 if width <= 768 else 16
    return {"BLOCK_N": tokens, "BLOCK_K": block, "num_warps": 4 if width <= 448 else 8, "num_stages": stages}


EARLY = ("sm_80", "sm_86", "sm_87", "sm_89")


def reload(width: int, heads_block: int, dtype: torch.dtype) -> bool:
    """Whether a tile of tokens and `stacked` are too much to be held from one product to the next."""
    if dtype.itemsize == 4 and (width > 448 or dot_precision(dtype) == "ieee"):
        return True  # of what IEEE products take, a thread holds whole rows and columns
    return 2 * heads_block * width * dtype.itemsize > 100_000


def gradient_default(width: int, heads: int, dtype: torch.dtype) -> dict[str, int]:
    """Of token_gradient."""
    block, early = block_of(width, 128, 64 if width > 128 else 32), architecture() in EARLY
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


def query_default(own: int, width: int, head: int, dtype: torch.dtype) -> dict[str, int]:
    """Of fusion_query; BLOCK_C columns of the CLS token's own width at once."""
    default = {"BLOCK_C": block_of(own, 128 if dtype.itemsize == 2 else 64, 32), **cls_default(width, head, dtype)}
    # The row lies in registers, twice: in float32 and as an operand.
    if dtype.itemsize == 2:
        return default
    if width > 512 and dot_precision(dtype) == "ieee":
        return {"BLOCK_C": 32, "BLOCK_K": 32, "num_warps": 16, "num_stages": 1}
    return default | {"num_warps": 8, "num_stages": 2}


def value_default(width: int, head: int, dtype: torch.dtype) -> dict[str, int]:
    """Of fusion_value."""
    return {"BLOCK_E": 64, **cls_default(width, head, dtype)}


def revert_default(width: int, dtype: torch.dtype) -> dict[str, int]:
    """Of fusion_revert: few columns a program, so that many share the weight."""
    block = block_of(width, 128, 32) if dtype.itemsize == 2 else 32
    return {
        "BLOCK_E": 16,
        "BLOCK_K": block,
        "num_warps": 16 if dtype.itemsize == 4 else 4 if width <= 256 else 8,
        "num_stages": 1,
    }


def input_gradient_configuration(
    rows: int, width: int, features: int, dtype: torch.dtype, gelu_in: bool
) -> Configuration:
    """As large a tile as leaves no multiprocessor idle."""
    float32 = dtype.itemsize == 4
    if rows <= FEW_ROWS:
        block_k = block_of(features, 32, 16) if float32 else block_of(features)
        default = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 4}
        return configuration("linear_input_gradient_few", width, dtype, default)
    if float32 or cdiv(rows, 128) * cdiv(width, 128) < multiprocessors():
        block_k = block_of(features, 32, 16) if float32 else block_of(features, 64)
        num_warps = 8 if dot_precision(dtype) == "ieee" and float32 else 4
        default = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": block_k, "num_warps": num_warps, "num_stages": 3}
        return configuration("linear_input_gradient_small", width, dtype, default)
    if gelu_in:  # whose last step takes registers
        default = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": block_of(features, 64), "num_warps": 8, "num_stages": 3}
        return configuration("linear_input_gradient_gelu", width, dtype, default)
    default = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": block_of(features, 64), "num_warps": 8, "num_stages": 3}
    return configuration("linear_input_gradient", width, dtype, default)


def weight_gradient_configuration(features: int, width: int, dtype: torch.dtype) -> Configuration:
    if dtype.itemsize == 4:
        block_k, num_warps = (16, 8) if dot_precision(dtype) == "ieee" else (32, 4)
        default = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": block_k, "num_warps": num_warps, "num_stages": 3}
    else:
        block_m, block_n = block_of(features, 128, 64), block_of(width, 128 if width >= 128 else 64, 64)
        num_warps = 8 if block_m * block_n > 64 * 64 else 4
        default = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 64, "num_warps": num_warps, "num_stages": 3}
    return configuration("linear_weight_gradient", width, dtype, default)


def layer_norm_backward_configuration(width: int, dtype: torch.dtype) -> Configuration:
    """Rows for at most 24 elements a thread: the row, its gradient and the two sums are held at once."""
    num_warps = 4 if width <= 768 else 8
    block_k = block_of(width, 128)
    held = num_warps * 32 * 24 // (cdiv(width, block_k) * block_k)
    block_m = min(16, 1 << max(held.bit_length() - 1, 0))
    default = {"BLOCK_M": block_m, "BLOCK_K": block_k, "num_warps": num_warps, "num_stages": 1}
    return configuration("layer_norm_backward", width, dtype, default)


def layer_norm_linear_configuration(rows: int, width: int, dtype: torch.dtype) -> Configuration:
    few = rows <= FEW_ROWS
    if dtype.itemsize == 4:
        block_k = block_of(width, 32, 16)
        if few:
            default = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 3}
        else:
            # Without matrix units a thread holds operands and a tile's sum beside its part of the whole.
            ieee = dot_precision(dtype) == "ieee"
            default = {"BLOCK_M": 64, "BLOCK_N": 32 if ieee else 64, "BLOCK_K": block_k}
            default |= {"num_warps": 8 if ieee else 4, "num_stages": 3}
    elif few:
        default = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": block_of(width), "num_warps": 4, "num_stages": 2}
    elif width > WIDEST_HELD:
        default = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": block_of(width, 64), "num_warps": 8, "num_stages": 3}
    elif width > 512:
        default = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": block_of(width), "num_warps": 8, "num_stages": 2}
    else:
        default = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": block_of(width), "num_warps": 8, "num_stages": 2}
    return configuration("layer_norm_linear_few" if few else "layer_norm_linear_forward", width, dtype, default)


def linear_residual_configuration(rows: int, features: int, width: int, dtype: torch.dtype) -> Configuration:
    """As large a tile as leaves no multiprocessor idle."""
    float32 = dtype.itemsize == 4
    if rows <= FEW_ROWS:
        block_k = block_of(width, 32, 16) if float32 else block_of(width)
        default = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 4}
        return configuration("linear_residual_few", width, dtype, default)
    if float32 or cdiv(rows, 128) * cdiv(features, 128) < multiprocessors():
        block_k = block_of(width, 32, 16) if float32 else block_of(width, 64)
        num_warps = 8 if float32 and dot_precision(dtype) == "ieee" else 4
        default = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": block_k, "num_warps": num_warps, "num_stages": 3}
        return configuration("linear_residual_small", width, dtype, default)
    default = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": block_of(width, 64), "num_warps": 8, "num_stages": 3}
    return configuration("linear_residual_forward", width, dtype, default)


def patch_embed_configuration(features: int, dtype: torch.dtype, resize: bool) -> Configuration:
    """BLOCK_D is the most columns that a program takes."""
    name = "patch_embed_forward_resized" if resize else "patch_embed_forward"
    if dtype.itemsize == 4:
        default = {"BLOCK_N": block_of(features, 64), "BLOCK_D": 128 if resize else 192, "BLOCK_K": 16, "num_stages": 3}
    else:
        default = {"BLOCK_N": block_of(features), "BLOCK_D": 384, "BLOCK_K": 32, "num_stages": 4}
    # A thread of 16 warps has registers left for the taps of a resize beside its part of 384 columns; tcgen05, whose
    # sums are not in registers, takes 8 at most.
    many = resize and dtype.itemsize == 2 and features > 256 and architecture() in ("sm_80", "sm_90")
    num_warps = 16 if many else 8
    return configuration(name, features, dtype, {"BLOCK_M": 64, **default, "num_warps": num_warps})


def patch_weight_gradient_configuration(features: int, dtype: torch.dtype, resize: bool) -> Configuration:
    name = "patch_embed_weight_gradient_resized" if resize else "patch_embed_weight_gradient"
    block_n = block_of(features, 128 if resize and dtype.itemsize == 2 else 64)
    default = {"BLOCK_M": 32, "BLOCK_N": block_n, "BLOCK_D": 192, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}
    if dtype.itemsize == 4:
        narrow = {"BLOCK_D": 64, "num_warps": 4} if dot_precision(dtype) == "tf32" else {"BLOCK_D": 32, "num_warps": 8}
        default |= {"BLOCK_M": 16, "BLOCK_K": 64, **narrow}
    if resize:
        default |= {"BLOCK_K": 32, "BLOCK_D": 384 if dtype.itemsize == 2 else 192}
    return configuration(name, features, dtype, default)


ROWS = 16  # of the batch in one program


MOST_SPLITS = 32


def split_tiles(batch: int, tiles: int) -> tuple[int, int]:
    """(splits of an image's tokens, tiles in each): more than one where images alone leave multiprocessors idle."""
    processors = multiprocessors()
    if batch >= 0.8 * processors:
        return 1, tiles
    each = cdiv(tiles, min(cdiv(processors, batch), tiles, MOST_SPLITS))
    return cdiv(tiles, each), each


def heads_block(heads: int) -> int:
    """The heads as a matrix instruction takes them."""
    return max(16, power_of_two(heads))


def images_per_program(batch: int, heads: int, splits: int) -> int:
    """Of a head: a tile's; with few images, whose tokens were split, fewer, and all of the splits that it joins."""
    return ROWS if splits == 1 else min(ROWS, power_of_two(cdiv(batch * heads, 2 * multiprocessors())))


# Up to this width a 16-bit row tile stays on the multiprocessor beside two stages of the weight.
WIDEST_HELD = 768


@functools.cache
def column_splits(row_tiles: int, column_tiles: int, processors: int) -> int:
    """Over how many programs the column tiles of a row tile go: normalising costs about as much as two of them."""
    return min(
        range(1, column_tiles + 1),
        key=lambda splits: cdiv(row_tiles * splits, processors) * (cdiv(column_tiles, splits) + 2),
    )


@functools.cache
def rows_per_piece(rows: int, tiles: int, block: int, processors: int) -> int:
    """How many rows a program sums, a multiple of `block`: as few pieces as fill the machine about twice."""
    pieces = max(1, min(2 * processors // tiles, rows // (4 * block)))
    return cdiv(cdiv(rows, pieces), block) * block


@functools.cache
def tiles_per_program(row_tiles: int, column_tiles: int, most: int, processors: int) -> int:
    """How many tiles of columns a program takes: gathering its rows costs about as much as two of them."""
    return min(
        range(min(most, column_tiles), 0, -1),
        key=lambda tiles: cdiv(row_tiles * cdiv(column_tiles, tiles), processors) * (tiles + 2),
    )
