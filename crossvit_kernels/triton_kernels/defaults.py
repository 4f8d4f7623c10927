"""How each kernel is launched where nothing was measured: a function per kernel, each result a frozen record with its
reason. All of them fit every architecture from sm_80 on.

`precision` is what `dot_precision` says of the dtype; it decides for float32 only. IEEE products of float32 numbers are
made without matrix units, from operands of which every thread holds whole rows and columns.
"""

import functools

import torch

from .configs import Config
from .tiling import FEW_ROWS, WIDEST_HELD, block_of, cdiv

EARLY = ("sm_80", "sm_86", "sm_87", "sm_89")  # architectures whose matrix instructions keep all sums in registers


@functools.cache
def cls_rows(width: int, head: int, dtype: torch.dtype, precision: str) -> Config:
    """The default of kernels that stream weights past 16 images."""
    if head > 128:
        return Config(
            {"BLOCK_K": block_of(width, 64)}, 8, 1, "the pieces of one head's weights are too many to prefetch"
        )
    # With a column of a vector per thread, 16 bits wide, its load would not be asynchronous.
    block = block_of(width, 128 if dtype.itemsize == 2 else 64, 64)
    more = dtype.itemsize == 4 and (width % block != 0 or (width <= 448 and precision == "ieee"))
    if block == 128 or more:
        return Config(
            {"BLOCK_K": block}, 8, 4, "a thread's share of a float32 product and of a mask takes more registers"
        )
    return Config({"BLOCK_K": block}, 4, 4, "the weights are on their way while earlier ones are multiplied")


@functools.cache
def token_pass(width: int, dtype: torch.dtype, precision: str) -> Config:
    """The default of token_pass."""
    reason = "a tile stays in registers, next to a context of every head"
    stages = 2 if width <= 768 else 1
    if dtype.itemsize == 4:
        block = 32 if precision == "ieee" and width <= 448 else block_of(width, 64)
        return Config({"BLOCK_N": 16, "BLOCK_K": block}, 8, stages, reason)
    block = block_of(width, 128, 64 if width > 128 else 32)
    tokens = 32 if width <= 768 else 16
    return Config({"BLOCK_N": tokens, "BLOCK_K": block}, 4 if width <= 448 else 8, stages, reason)


@functools.cache
def token_gradient(width: int, heads: int, dtype: torch.dtype, precision: str, architecture: str) -> Config:
    """The default of token_gradient."""
    block, early = block_of(width, 128, 64 if width > 128 else 32), architecture in EARLY
    if dtype.itemsize == 4:
        reason = "16 tokens of 32 bits are what the registers hold"
        if precision == "tf32":
            return Config({"BLOCK_N": 16, "BLOCK_K": block_of(width, 64)}, 8, 2, reason)
        block, warps = (block_of(width, 64), 4) if width <= 256 else (32, 8)
        return Config({"BLOCK_N": 16, "BLOCK_K": block}, warps, 1, reason)
    if width <= 256:
        tokens = 16 if early and width > 192 else 32
        return Config({"BLOCK_N": tokens, "BLOCK_K": block}, 4, 2, "narrow tokens leave registers for 32 of them")
    if width <= 448:
        tokens = 16 if early or heads > 8 else 32
        reason = "wider blocks leave no register for tokens of 32 bits, which come under autocast"
        return Config({"BLOCK_N": tokens, "BLOCK_K": block_of(width, 64)}, 8, 2, reason)
    stages = 1 if early or width > 768 else 2
    return Config({"BLOCK_N": 16, "BLOCK_K": block}, 8, stages, "wide tokens leave registers for 16 of them")


QUERY_INPUT_GRADIENT = Config({"BLOCK_K": 64, "BLOCK_E": 64}, 4, 4, "the weight is walked in square tiles")


@functools.cache
def projection_gradients(dtype: torch.dtype) -> Config:
    """The default of projection_gradients."""
    if dtype.itemsize == 2:
        return Config({"BLOCK_B": 32, "BLOCK_E": 64}, 4, 3, "two steps of a matrix instruction's images at once")
    return Config({"BLOCK_B": 16, "BLOCK_E": 64}, 8, 3, "operands of float32 take twice the registers")


@functools.cache
def finish_gradients(width: int) -> Config:
    """The default of finish_gradients."""
    return Config(
        {"BLOCK_R": 32, "BLOCK_E": 32, "BLOCK_K": block_of(width)}, 4, 3, "few columns, so that programs are many"
    )


@functools.cache
def fusion_query(own: int, width: int, head: int, dtype: torch.dtype, precision: str) -> Config:
    """The default of fusion_query; BLOCK_C columns of the CLS token's own width at once."""
    rows = cls_rows(width, head, dtype, precision)
    columns = block_of(own, 128 if dtype.itemsize == 2 else 64, 32)
    reason = "the row lies in registers twice: in float32 and as an operand"
    if dtype.itemsize == 2:
        return Config({"BLOCK_C": columns, **rows.blocks}, rows.num_warps, rows.num_stages, reason)
    if width > 512 and precision == "ieee":
        return Config({"BLOCK_C": 32, "BLOCK_K": 32}, 16, 1, reason)
    return Config({"BLOCK_C": columns, **rows.blocks}, 8, 2, reason)


@functools.cache
def fusion_value(width: int, head: int, dtype: torch.dtype, precision: str) -> Config:
    """The default of fusion_value."""
    rows = cls_rows(width, head, dtype, precision)
    return Config({"BLOCK_E": 64, **rows.blocks}, rows.num_warps, rows.num_stages, rows.reason)


@functools.cache
def fusion_revert(width: int, dtype: torch.dtype) -> Config:
    """The default of fusion_revert."""
    block = block_of(width, 128, 32) if dtype.itemsize == 2 else 32
    warps = 16 if dtype.itemsize == 4 else 4 if width <= 256 else 8
    return Config({"BLOCK_E": 16, "BLOCK_K": block}, warps, 1, "few columns a program, so that many share the weight")


@functools.cache
def layer_norm_rows(width: int) -> Config:
    """The default of layer_norm_rows."""
    return Config({"BLOCK_M": 8, "BLOCK_K": block_of(width)}, 4, 1, "two rows a warp, held in registers")


@functools.cache
def layer_norm_backward(width: int) -> Config:
    """The default of layer_norm_backward."""
    num_warps = 4 if width <= 768 else 8
    block_k = block_of(width, 128)
    held = num_warps * 32 * 24 // (cdiv(width, block_k) * block_k)
    block_m = min(16, 1 << max(held.bit_length() - 1, 0))
    reason = "rows for at most 24 elements a thread: the row, its gradient and the two sums are held at once"
    return Config({"BLOCK_M": block_m, "BLOCK_K": block_k}, num_warps, 1, reason)


GELU_BACKWARD = Config({"BLOCK": 1024}, 4, 1, "eight elements a thread")


@functools.cache
def layer_norm_linear(rows: int, width: int, dtype: torch.dtype, precision: str) -> tuple[str, Config]:
    """The name under which layer_norm_linear_forward is tuned for so many rows, and its default."""
    name = "layer_norm_linear_few" if rows <= FEW_ROWS else "layer_norm_linear_forward"
    if dtype.itemsize == 4:
        block_k = block_of(width, 32, 16)
        if rows <= FEW_ROWS:
            return name, Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": block_k}, 4, 3, "many programs")
        if precision == "ieee":
            reason = "a thread holds operands and a tile's sum beside its part of the whole"
            return name, Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": block_k}, 8, 3, reason)
        return name, Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": block_k}, 4, 3, "the row tile is read again")
    if rows <= FEW_ROWS:
        return name, Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": block_of(width)}, 4, 2, "many programs")
    if width > WIDEST_HELD:
        reason = "the row tile is read again for every column tile"
        return name, Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": block_of(width, 64)}, 8, 3, reason)
    if width > 512:
        return name, Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": block_of(width)}, 8, 2, "the row tile is held")
    return name, Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": block_of(width)}, 8, 2, "the row tile is held")


LINEAR_TILES = Config(
    {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "RESIDENT": 2}, 4, 3, "two programs share a multiprocessor's memory"
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
        suffix, config = "gelu", Config(blocks, 8, 3, "gelu's derivative takes registers in the last step")
    return f"linear_input_gradient{suffix and '_'}{suffix}", config


def _product(
    rows: int, columns: int, depth: int, dtype: torch.dtype, precision: str, processors: int
) -> tuple[str, Config]:
    """A tiled product (rows, depth) x (depth, columns): the suffix of its name, and as large a tile as leaves no
    multiprocessor idle."""
    float32 = dtype.itemsize == 4
    if rows <= FEW_ROWS:
        block_k = block_of(depth, 32, 16) if float32 else block_of(depth)
        return "few", Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": block_k}, 4, 4, "few rows: many programs")
    if float32 or cdiv(rows, 128) * cdiv(columns, 128) < processors:
        block_k = block_of(depth, 32, 16) if float32 else block_of(depth, 64)
        num_warps = 8 if precision == "ieee" and float32 else 4
        blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": block_k}
        return "small", Config(blocks, num_warps, 3, "larger tiles would leave multiprocessors idle, or spill")
    return "", Config(
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": block_of(depth, 64)}, 8, 3, "every operand is read least"
    )


@functools.cache
def linear_weight_gradient(features: int, width: int, dtype: torch.dtype, precision: str) -> Config:
    """The default of linear_weight_gradient."""
    if dtype.itemsize == 4:
        block_k, num_warps = (16, 8) if precision == "ieee" else (32, 4)
        return Config(
            {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": block_k}, num_warps, 3, "float32 operands take registers"
        )
    block_m, block_n = block_of(features, 128, 64), block_of(width, 128 if width >= 128 else 64, 64)
    num_warps = 8 if block_m * block_n > 64 * 64 else 4
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 64}
    return Config(blocks, num_warps, 3, "tiles that the matrix covers with the least rest")


@functools.cache
def sum_of_partials(count: int) -> Config:
    """The default of sum_of_partials."""
    block_m = min(1 << (count - 1).bit_length(), 64)
    return Config({"BLOCK_M": block_m, "BLOCK_N": 2048 // block_m}, 4, 2, "16 elements a thread")


@functools.cache
def patch_embed(features: int, dtype: torch.dtype, resize: bool, architecture: str) -> Config:
    """The default of patch_embed_forward; BLOCK_D is the most columns that a program takes."""
    if dtype.itemsize == 4:
        blocks = {"BLOCK_M": 64, "BLOCK_N": block_of(features, 64), "BLOCK_D": 128 if resize else 192, "BLOCK_K": 16}
        return Config(blocks, 8, 3, "sums of float32 products take registers")
    blocks = {"BLOCK_M": 64, "BLOCK_N": block_of(features), "BLOCK_D": 384, "BLOCK_K": 32}
    if resize and features > 256 and architecture in ("sm_80", "sm_90"):
        # tcgen05, whose sums are not in registers, takes 8 warps at most.
        return Config(blocks, 16, 4, "registers for the taps of a resize beside a thread's part of 384 columns")
    return Config(blocks, 8, 4, "a program cuts out its patches once for all columns")


@functools.cache
def patch_embed_weight_gradient(features: int, dtype: torch.dtype, resize: bool, precision: str) -> Config:
    """The default of patch_embed_weight_gradient; BLOCK_D is the most columns that a program takes."""
    block_n = block_of(features, 128 if resize and dtype.itemsize == 2 else 64)
    if dtype.itemsize == 2:
        blocks = {"BLOCK_M": 32, "BLOCK_N": block_n, "BLOCK_D": 192, "BLOCK_K": 128}
        num_warps = 8
    else:
        columns, num_warps = (64, 4) if precision == "tf32" else (32, 8)
        blocks = {"BLOCK_M": 16, "BLOCK_N": block_n, "BLOCK_D": columns, "BLOCK_K": 64}
    if resize:  # few pixels at once, as each needs 16 taps, and many columns for each of them
        blocks |= {"BLOCK_K": 32, "BLOCK_D": 384 if dtype.itemsize == 2 else 192}
    return Config(blocks, num_warps, 3, "the sums of a tile of the weight stay in registers")


@functools.cache
def patch_embed_images_gradient(dtype: torch.dtype) -> Config:
    """The default of patch_embed_images_gradient."""
    blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16 if dtype.itemsize == 4 else 64}
    return Config(blocks, 4, 3, "square tiles of the images' pixels")


@functools.cache
def patch_embed_batch_sum(batch: int) -> Config:
    """The default of patch_embed_batch_sum."""
    block_m = min(16, 1 << (batch - 1).bit_length())
    return Config({"BLOCK_M": block_m, "BLOCK_N": 2048 // block_m}, 4, 2, "16 elements a thread")


RESIZE_AXIS_GRADIENT = Config({"BLOCK": 512}, 4, 2, "four elements a thread")
