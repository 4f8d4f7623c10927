"""How work is cut up: rows and columns into blocks, and blocks among programs."""

import functools

import torch
import triton

from .target import dot_precision, multiprocessors

ROWS = 16  # images in one program of a kernel with one row per image: the least that a matrix instruction takes
FEW_ROWS = 256  # up to here tiles of 16 rows are better
MOST_SPLITS = 32  # of an image's tokens
WIDEST_HELD = 768  # up to this width a 16-bit row tile stays on the multiprocessor beside two stages of the weight


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; Triton's own function takes microseconds."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (n - 1).bit_length()


@functools.cache
def block_of(width: int, largest: int = 128, smallest: int = 32) -> int:
    """The power of two that covers `width` with the least rest; of several the largest."""
    blocks = [smallest]
    while blocks[-1] < largest:
        blocks.append(2 * blocks[-1])
    return min(blocks, key=lambda block: (cdiv(width, block) * block, -block))


@triton.constexpr_function
def ragged(width: int, block: int) -> bool:
    """Whether blocks of columns reach beyond the width; asked in kernels."""
    return width % block != 0


@triton.constexpr_function
def head_block(head: int) -> int:
    """In how many columns at once a head's own d are walked; kernels ask too."""
    return min(128, max(16, triton.next_power_of_2(head)))


@triton.constexpr_function
def heads_block(heads: int, least: int = 16) -> int:
    """The heads as a matrix instruction takes them, `least` of them or more; kernels ask too."""
    return max(least, triton.next_power_of_2(heads))


def split_tiles(batch: int, tiles: int) -> tuple[int, int]:
    """(splits of an image's tokens, tiles in each): more than one where images alone leave multiprocessors idle."""
    processors = multiprocessors()
    if batch >= 0.8 * processors:
        return 1, tiles
    each = cdiv(tiles, min(cdiv(processors, batch), tiles, MOST_SPLITS))
    return cdiv(tiles, each), each


def images_per_program(batch: int, heads: int, splits: int) -> int:
    """How many images a program takes for one head: a whole tile, or, where their tokens were split, fewer, so that the
    program joins all splits of its images."""
    return ROWS if splits == 1 else min(ROWS, power_of_two(cdiv(batch * heads, 2 * multiprocessors())))


def reload(width: int, heads_block: int, dtype: torch.dtype) -> bool:
    """Whether a tile of tokens and `stacked` are too much to be held from one product to the next."""
    if dtype.itemsize == 4 and (width > 448 or dot_precision(dtype) == "ieee"):
        return True  # a thread holds whole rows and columns of the operands of IEEE products
    return 2 * heads_block * width * dtype.itemsize > 100_000


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
