"""Linear on many rows by GPUs that copy tiles by themselves (sm_90 on): as many programs as fit walk over the tiles of
the result, and the copy engine fetches the next tile's operands while one is finished and stored."""

import triton
import triton.language as tl

from .arithmetic import gelu16
from .tiles import load_inside, row_starts, scaled


@triton.jit
def linear_tiles(
    x_tiles, weight_tiles, out_tiles, pre_tiles, bias_ptr, residual, scale, rows, features, width,
    GELU: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """residual + scale * act(x weight^T + bias); `pre` gets what the activation meets.

    A tile beyond the edge reads zeros and is not stored. Two programs may share a multiprocessor: while one finishes a
    tile the other multiplies.
    """
    column_tiles = tl.cdiv(features, BLOCK_N)
    tiles = tl.cdiv(rows, BLOCK_M) * column_tiles
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        first_row = tile // column_tiles * BLOCK_M
        first_feature = tile % column_tiles * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, width, BLOCK_K):
            x = x_tiles.load([first_row, k])
            weight = weight_tiles.load([first_feature, k])
            acc = tl.dot(x, weight.T, acc)
        feature = first_feature + tl.arange(0, BLOCK_N)
        counts = feature < features
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + feature, mask=counts, other=0.0).to(tl.float32)[None, :]
        if pre_tiles is not None:
            pre_tiles.store([first_row, first_feature], acc.to(DTYPE))
        if GELU:
            acc = gelu16(acc)
        if residual is not None:
            row = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
            exists = row < rows
            acc = scaled(acc, scale, row, exists, feature, counts)
            acc += load_inside(row_starts(residual, row), exists, feature, counts).to(tl.float32)
        out_tiles.store([first_row, first_feature], acc.to(DTYPE))
