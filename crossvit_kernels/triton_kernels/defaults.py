"""How each kernel is launched where nothing was measured: a function per kernel, of its name, each result a frozen
record with its reason. All of them fit every architecture from sm_80 on.

`precision` is what `dot_precision` says of the dtype; it decides for float32 only. IEEE products of float32 numbers are
made without matrix units, from operands of which every thread holds whole rows and columns.
"""

import functools

import torch

from .configs import Config
from .tiling import FEW_ROWS, WIDEST_HELD, block_of, cdiv

EARLY = ("sm_80", "sm_86", "sm_87", "sm_89")  # architectures whose matrix instructions keep all sums in registers


def _config(num_warps: int, num_stages: int, reason: str, **blocks: int) -> Config:
    return Config(blocks, num_warps, num_stages, reason)


@functools.cache
def cls_rows(width: int, head: int, dtype: torch.dtype, precision: str) -> Config:
    """The default of kernels that stream weights past 16 images."""
    if head > 128:
        return _config(8, 1, "the pieces of one head's weights are too many to prefetch", BLOCK_K=block_of(width, 64))
    # With a column of a vector per thread, 16 bits wide, its load would not be asynchronous.
    block = block_of(width, 128 if dtype.itemsize == 2 else 64, 64)
    more = dtype.itemsize == 4 and (width % block != 0 or (width <= 448 and precision == "ieee"))
    if block == 128 or more:
        return _config(8, 4, "a thread's share of a float32 product and of a mask takes more registers", BLOCK_K=block)
    return _config(4, 4, "the weights are on their way while earlier ones are multiplied", BLOCK_K=block)


@functools.cache
def token_pass(width: int, dtype: torch.dtype, precision: str) -> Config:
    reason = "a tile stays in registers, next to a context of every head"
    stages = 2 if width <= 768 else 1
    if dtype.itemsize == 4:
        block = 32 if precision == "ieee" and width <= 448 else block_of(width, 64)
        return _config(8, stages, reason, BLOCK_N=16, BLOCK_K=block)
    block = block_of(width, 128, 64 if width > 128 else 32)
    tokens = 32 if width <= 768 else 16
    return _config(4 if width <= 448 else 8, stages, reason, BLOCK_N=tokens, BLOCK_K=block)


@functools.cache
def token_gradient(width: int, heads: int, dtype: torch.dtype, precision: str, architecture: str) -> Config:
    block, early = block_of(width, 128, 64 if width > 128 else 32), architecture in EARLY
    if dtype.itemsize == 4:
        reason = "16 tokens of 32 bits are what the registers hold"
        if precision == "tf32":
            return _config(8, 2, reason, BLOCK_N=16, BLOCK_K=block_of(width, 64))
        block, warps = (block_of(width, 64), 4) if width <= 256 else (32, 8)
        return _config(warps, 1, reason, BLOCK_N=16, BLOCK_K=block)
    if width <= 256:
        tokens = 16 if early and width > 192 else 32
        return _config(4, 2, "narrow tokens leave registers for 32 of them", BLOCK_N=tokens, BLOCK_K=block)
    if width <= 448:
        tokens = 16 if early or heads > 8 else 32
        reason = "wider blocks leave no register for tokens of 32 bits, which come under autocast"
        return _config(8, 2, reason, BLOCK_N=tokens, BLOCK_K=block_of(width, 64))
    stages = 1 if early or width > 768 else 2
    return _config(8, stages, "wide tokens leave registers for 16 of them", BLOCK_N=16, BLOCK_K=block)


QUERY_INPUT_GRADIENT = _config(4, 4, "the weight is walked in square tiles", BLOCK_K=64, BLOCK_E=64)


@functools.cache
def projection_gradients(dtype: torch.dtype) -> Config:
    if dtype.itemsize == 2:
        return _config(4, 3, "two steps of a matrix instruction's images at once", BLOCK_B=32, BLOCK_E=64)
    return _config(8, 3, "operands of float32 take twice the registers", BLOCK_B=16, BLOCK_E=64)


@functools.cache
def finish_gradients(width: int) -> Config:
    return _config(4, 3, "few columns, so that programs are many", BLOCK_R=32, BLOCK_E=32, BLOCK_K=block_of(width))


@functools.cache
def fusion_query(own: int, width: int, head: int, dtype: torch.dtype, precision: str) -> Config:
    """BLOCK_C columns of the CLS token's own width at once."""
    rows = cls_rows(width, head, dtype, precision)
    columns = block_of(own, 128 if dtype.itemsize == 2 else 64, 32)
    reason = "the row lies in registers twice: in float32 and as an operand"
    if dtype.itemsize == 2:
        return _config(rows.num_warps, rows.num_stages, reason, BLOCK_C=columns, **rows.blocks)
    if width > 512 and precision == "ieee":
        return _config(16, 1, reason, BLOCK_C=32, BLOCK_K=32)
    return _config(8, 2, reason, BLOCK_C=columns, **rows.blocks)


@functools.cache
def fusion_value(width: int, head: int, dtype: torch.dtype, precision: str) -> Config:
    rows = cls_rows(width, head, dtype, precision)
    return _config(rows.num_warps, rows.num_stages, rows.reason, BLOCK_E=64, **rows.blocks)


@functools.cache
def fusion_revert(width: int, dtype: torch.dtype) -> Config:
    block = block_of(width, 128, 32) if dtype.itemsize == 2 else 32
    warps = 16 if dtype.itemsize == 4 else 4 if width <= 256 else 8
    return _config(warps, 1, "few columns a program, so that many share the weight", BLOCK_E=16, BLOCK_K=block)


@functools.cache
def layer_norm_rows(width: int) -> Config:
    return _config(4, 1, "two rows a warp, held in registers", BLOCK_M=8, BLOCK_K=block_of(width))


@functools.cache
def layer_norm_backward(width: int) -> Config:
    num_warps = 4 if width <= 768 else 8
    block_k = block_of(width, 128)
    held = num_warps * 32 * 24 // (cdiv(width, block_k) * block_k)
    block_m = min(16, 1 << max(held.bit_length() - 1, 0))
    reason = "rows for at most 24 elements a thread: the row, its gradient and the two sums are held at once"
    return _config(num_warps, 1, reason, BLOCK_M=block_m, BLOCK_K=block_k)


GELU_BACKWARD = _config(4, 1, "eight elements a thread", BLOCK=1024)


@functools.cache
def layer_norm_linear(rows: int, width: int, dtype: torch.dtype, precision: str) -> tuple[str, Config]:
    """The name under which layer_norm_linear_forward is tuned for so many rows, and its default."""
    name = "layer_norm_linear_few" if rows <= FEW_ROWS else "layer_norm_linear_forward"
    if dtype.itemsize == 4:
        block_k = block_of(width, 32, 16)
        if rows <= FEW_ROWS:
            return name, _config(4, 3, "many programs", BLOCK_M=16, BLOCK_N=32, BLOCK_K=block_k)
        if precision == "ieee":
            reason = "a thread holds operands and a tile's sum beside its part of the whole"
            return name, _config(8, 3, reason, BLOCK_M=64, BLOCK_N=32, BLOCK_K=block_k)
        return name, _config(4, 3, "the row tile is read again", BLOCK_M=64, BLOCK_N=64, BLOCK_K=block_k)
    if rows <= FEW_ROWS:
        return name, _config(4, 2, "many programs", BLOCK_M=16, BLOCK_N=32, BLOCK_K=block_of(width))
    if width > WIDEST_HELD:
        reason = "the row tile is read again for every column tile"
        return name, _config(8, 3, reason, BLOCK_M=128, BLOCK_N=64, BLOCK_K=block_of(width, 64))
    if width > 512:
        return name, _config(8, 2, "the row tile is held", BLOCK_M=64, BLOCK_N=32, BLOCK_K=block_of(width))
    return name, _config(8, 2, "the row tile is held", BLOCK_M=128, BLOCK_N=64, BLOCK_K=block_of(width))


LINEAR_TILES = _config(
    4, 3, "two programs share a multiprocessor's memory", BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, RESIDENT=2
)


@functools.cache
def linear_residual(
    rows: int, features: int, width: int, dtype: torch.dtype, precision: str, processors: int
) -> tuple[str, Config]:
    """The name under which linear_residual_forward is tuned for a product of this size, and its default."""
    suffix, config = _product(rows, features, width, dtype, precision, processors)
    return f"linear_residual_{suffix or 'forward'}", config


@functools.cache
def linear_input_gradient(
    rows: int, width: int, features: int, dtype: torch.dtype, precision: str, processors: int, gelu_in: bool
) -> tuple[str, Config]:
    """The name under which linear_input_gradient is tuned for a product of this size, and its default."""
    suffix, config = _product(rows, width, features, dtype, precision, processors)
    if suffix == "" and gelu_in:
        blocks = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": block_of(features, 64)}
        suffix, config = "gelu", _config(8, 3, "gelu's derivative takes registers in the last step", **blocks)
    return f"linear_input_gradient{suffix and '_'}{suffix}", config


def _product(
    rows: int, columns: int, depth: int, dtype: torch.dtype, precision: str, processors: int
) -> tuple[str, Config]:
    """A tiled product (rows, depth) x (depth, columns): the suffix of its name, and as large a tile as leaves no
    multiprocessor idle."""
    float32 = dtype.itemsize == 4
    if rows <= FEW_ROWS:
        block_k = block_of(depth, 32, 16) if float32 else block_of(depth)
        return "few", _config(4, 4, "few rows: many programs", BLOCK_M=16, BLOCK_N=32, BLOCK_K=block_k)
    if float32 or cdiv(rows, 128) * cdiv(columns, 128) < processors:
        block_k = block_of(depth, 32, 16) if float32 else block_of(depth, 64)
        num_warps = 8 if precision == "ieee" and float32 else 4
        blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": block_k}
        return "small", _config(num_warps, 3, "larger tiles would leave multiprocessors idle, or spill", **blocks)
    return "", _config(8, 3, "every operand is read least", BLOCK_M=128, BLOCK_N=128, BLOCK_K=block_of(depth, 64))


@functools.cache
def linear_weight_gradient(features: int, width: int, dtype: torch.dtype, precision: str) -> Config:
    if dtype.itemsize == 4:
        block_k, num_warps = (16, 8) if precision == "ieee" else (32, 4)
        return _config(num_warps, 3, "float32 operands take registers", BLOCK_M=64, BLOCK_N=64, BLOCK_K=block_k)
    block_m, block_n = block_of(features, 128, 64), block_of(width, 128 if width >= 128 else 64, 64)
    num_warps = 8 if block_m * block_n > 64 * 64 else 4
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 64}
    return _config(num_warps, 3, "tiles that the matrix covers with the least rest", **blocks)


@functools.cache
def sum_of_partials(count: int) -> Config:
    block_m = min(1 << (count - 1).bit_length(), 64)
    return _config(4, 2, "16 elements a thread", BLOCK_M=block_m, BLOCK_N=2048 // block_m)


@functools.cache
def patch_embed(features: int, dtype: torch.dtype, resize: bool, architecture: str) -> Config:
    """BLOCK_D is the most columns that a program takes."""
    if dtype.itemsize == 4:
        blocks = {"BLOCK_M": 64, "BLOCK_N": block_of(features, 64), "BLOCK_D": 128 if resize else 192, "BLOCK_K": 16}
        return _config(8, 3, "sums of float32 products take registers", **blocks)
    blocks = {"BLOCK_M": 64, "BLOCK_N": block_of(features), "BLOCK_D": 384, "BLOCK_K": 32}
    if resize and features > 256 and architecture in ("sm_80", "sm_90"):
        # tcgen05, whose sums are not in registers, takes 8 warps at most.
        return _config(16, 4, "registers for the taps of a resize beside a thread's part of 384 columns", **blocks)
    return _config(8, 4, "a program cuts out its patches once for all columns", **blocks)


@functools.cache
def patch_embed_weight_gradient(features: int, dtype: torch.dtype, resize: bool, precision: str) -> Config:
    """BLOCK_D is the most columns that a program takes."""
    block_n = block_of(features, 128 if resize and dtype.itemsize == 2 else 64)
    if dtype.itemsize == 2:
        blocks = {"BLOCK_M": 32, "BLOCK_N": block_n, "BLOCK_D": 192, "BLOCK_K": 128}
        num_warps = 8
    else:
        columns, num_warps = (64, 4) if precision == "tf32" else (32, 8)
        blocks = {"BLOCK_M": 16, "BLOCK_N": block_n, "BLOCK_D": columns, "BLOCK_K": 64}
    if resize:  # few pixels at once, as each needs 16 taps, and many columns for each of them
        blocks |= {"BLOCK_K": 32, "BLOCK_D": 384 if dtype.itemsize == 2 else 192}
    return _config(num_warps, 3, "the sums of a tile of the weight stay in registers", **blocks)


@functools.cache
def patch_embed_images_gradient(dtype: torch.dtype) -> Config:
    blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16 if dtype.itemsize == 4 else 64}
    return _config(4, 3, "square tiles of the images' pixels", **blocks)


@functools.cache
def patch_embed_batch_sum(batch: int) -> Config:
    block_m = min(16, 1 << (batch - 1).bit_length())
    return _config(4, 2, "16 elements a thread", BLOCK_M=block_m, BLOCK_N=2048 // block_m)


RESIZE_AXIS_GRADIENT = _config(4, 2, "four elements a thread", BLOCK=512)
