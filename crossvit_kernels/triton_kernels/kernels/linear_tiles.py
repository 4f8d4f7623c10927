"""Linear on many rows by GPUs that copy tiles by themselves (sm_90 on): as many programs as fit walk over the tiles of
the result, and the copy engine fetches the next tile's operands while one is finished and stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launch import DTYPES, architecture, cdiv, configuration, launch, multiprocessors
from .arithmetic import gelu16
from .rows import FEW_ROWS, Rows, optional_arguments, row_offsets
from .scale import UNSCALED, Scale, scaled

_ALIGNMENT = 16  # bytes, of what the copy engine addresses


@triton.jit
def linear_tiles(
    x_tiles,
    weight_tiles,
    out_tiles,
    pre_tiles,
    bias_ptr,
    residual_ptr,
    residual_tokens,
    residual_batch,
    residual_row,
    scale_ptr,
    rows_per_sample,
    rows,
    features,
    width,
    programs,
    GELU: tl.constexpr,
    SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """residual + scale * act(x weight^T + bias); `pre` gets what the activation meets.

    A tile beyond the edge reads zeros and is not stored. RESIDENT programs share a multiprocessor: while one finishes a
    tile the other multiplies.
    """
    column_tiles = tl.cdiv(features, BLOCK_N)
    tiles = tl.cdiv(rows, BLOCK_M) * column_tiles
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
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
        if residual_ptr is not None:
            row = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
            exists = row < rows
            acc = scaled(acc, scale_ptr, row, exists, rows_per_sample, feature, counts, SCALE)
            residual_at = residual_ptr + row_offsets(row, residual_tokens, residual_batch, residual_row)
            wanted = exists[:, None] & counts[None, :]
            acc += tl.load(residual_at[:, None] + feature[None, :], mask=wanted, other=0.0).to(tl.float32)
        out_tiles.store([first_row, first_feature], acc.to(DTYPE))


def takes(rows: int, weight: Tensor, out: Tensor) -> bool:
    """Whether `linear` takes so many dense rows of the weight's dtype: many, of 16 bits, on a GPU with a copy engine
    that can address them."""
    if rows <= FEW_ROWS or weight.dtype.itemsize != 2:
        return False
    if architecture() != "interpreter" and int(architecture().removeprefix("sm_")) < 90:
        return False
    features, width = weight.shape
    return _aligned(2 * width, features * out.dtype.itemsize, 2 * weight.storage_offset())


def fits(x: Rows, weight: Tensor, out: Tensor) -> bool:
    """Whether `linear` takes these rows, as they lie."""
    if x.tensor.dtype is not weight.dtype or x.distance is None or not takes(x.count, weight, out):
        return False
    return _aligned(2 * x.distance, 2 * x.tensor.storage_offset())


def _aligned(*sizes: int | torch.SymInt) -> bool:
    return not any(int(size) % _ALIGNMENT for size in sizes)


def linear(
    x: Rows,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    gelu: bool = False,
    pre: Tensor | None = None,
    residual: Rows | None = None,
    scale: Scale = UNSCALED,
) -> None:
    """Fills `out` (rows, features), and `pre` where it is given; see `linear_tiles`. Only where it `fits`."""
    features, width = weight.shape
    last_step = "residual" if residual is not None else "gelu" if gelu else "linear"
    if pre is not None:  # its tile takes shared memory too
        last_step += "_saved"
    if out.dtype.itemsize == 4:  # as under autocast: a tile of the result takes twice the shared memory
        last_step += "_float32"
    default = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "RESIDENT": 2, "num_warps": 4, "num_stages": 3}
    config = configuration(f"linear_tiles_{last_step}", width, weight.dtype, default)
    tile_m, tile_n, tile_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    programs = min(config["RESIDENT"] * multiprocessors(), cdiv(x.count, tile_m) * cdiv(features, tile_n))
    launch(
        linear_tiles,
        (programs,),
        config,
        x_tiles=TensorDescriptor(x.tensor, [x.count, width], [x.distance, 1], [tile_m, tile_k]),
        weight_tiles=TensorDescriptor.from_tensor(weight, [tile_n, tile_k]),
        out_tiles=_tiles(out, features, tile_m, tile_n),
        pre_tiles=None if pre is None else _tiles(pre, features, tile_m, tile_n),
        bias_ptr=bias,
        **optional_arguments(residual, "residual"),
        **scale.arguments(),
        rows=x.count,
        features=features,
        width=width,
        programs=programs,
        GELU=gelu,
        DTYPE=DTYPES[out.dtype],
    )


def _tiles(tensor: Tensor, features: int, tile_m: int, tile_n: int) -> TensorDescriptor:
    rows = tensor.numel() // features
    return TensorDescriptor(tensor, [rows, features], [features, 1], [tile_m, tile_n])
