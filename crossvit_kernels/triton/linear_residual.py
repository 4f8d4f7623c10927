"""linear_residual: a tiled matrix product whose last step adds bias, scale and residual."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Configuration, cdiv, configuration, dot_precision, launch, multiprocessors
from ._math import gelu
from ._rows import Rows, block_of, row_offsets, rows_of
from ._scale import Scale, scale_of, scaled

FEW_ROWS = 256


@triton.jit
def linear_tile(
    x_ptr,
    x_tokens,
    x_batch,
    x_row,
    weight_ptr,
    bias_ptr,
    row,
    exists,
    feature,
    counts,
    width,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(rows, features) of x weight^T + bias, or of gelu(x), float32."""
    chunk = tl.arange(0, BLOCK_K)
    x_at = x_ptr + row_offsets(row, x_tokens, x_batch, x_row)[:, None] + chunk[None, :]
    weight_at = weight_ptr + feature.to(tl.int64)[:, None] * width + chunk[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, width, BLOCK_K):
        inside = (k + chunk < width)[None, :]
        x = tl.load(x_at + k, mask=exists[:, None] & inside, other=0.0)
        weight = tl.load(weight_at + k, mask=counts[:, None] & inside, other=0.0)
        if GELU:
            x = gelu(x.to(tl.float32))
        acc = tl.dot(x.to(weight_ptr.dtype.element_ty), weight.T, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + feature, mask=counts, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def linear_residual_forward(
    x_ptr,
    x_tokens,
    x_batch,
    x_row,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    residual_tokens,
    residual_batch,
    residual_row,
    scale_ptr,
    rows_per_sample,
    out_ptr,
    rows,
    width,
    features,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_tiles = tl.cdiv(features, BLOCK_N)
    row = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    exists, counts = row < rows, feature < features
    acc = linear_tile(
        x_ptr, x_tokens, x_batch, x_row, weight_ptr, bias_ptr, row, exists, feature, counts, width,
        False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    acc = scaled(acc, scale_ptr, row, exists, rows_per_sample, feature, counts, SCALE)
    wanted = exists[:, None] & counts[None, :]
    residual_at = residual_ptr + row_offsets(row, residual_tokens, residual_batch, residual_row)
    residual = tl.load(residual_at[:, None] + feature[None, :], mask=wanted, other=0.0)
    acc += residual.to(tl.float32)
    tl.store(out_ptr + row[:, None] * features + feature[None, :], acc.to(out_ptr.dtype.element_ty), mask=wanted)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, scale: Tensor | None, save: bool
) -> Tensor:
    """residual + scale * Linear(x)."""
    out = weight.new_empty(residual.shape, dtype=torch.promote_types(residual.dtype, weight.dtype))
    launch_forward(rows_of(x), weight, bias, rows_of(residual), scale_of(scale, residual), out)
    return out


def launch_forward(x: Rows, weight: Tensor, bias: Tensor | None, residual: Rows, scale: Scale, out: Tensor) -> None:
    """Fills `out`."""
    weight = weight.contiguous()
    features, width = weight.shape
    config = _configuration(x.count, features, width, weight.dtype)
    launch(
        linear_residual_forward,
        (cdiv(x.count, config["BLOCK_M"]) * cdiv(features, config["BLOCK_N"]),),
        config,
        **x.arguments("x"),
        weight_ptr=weight,
        bias_ptr=None if bias is None else bias.contiguous(),
        **residual.arguments("residual"),
        **scale.arguments(),
        out_ptr=out,
        rows=x.count,
        width=width,
        features=features,
        PRECISION=dot_precision(weight.dtype),
    )


def _configuration(rows: int, features: int, width: int, dtype: torch.dtype) -> Configuration:
    """As large a tile as leaves no multiprocessor idle."""
    wide = dtype.itemsize == 4
    if rows <= FEW_ROWS:
        block_k = block_of(width, 32, 16) if wide else block_of(width)
        default = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 4}
        return configuration("linear_residual_few", width, dtype, default)
    if wide or cdiv(rows, 128) * cdiv(features, 128) < multiprocessors():
        block_k = block_of(width, 32, 16) if wide else block_of(width, 64)
        default = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 3}
        return configuration("linear_residual_small", width, dtype, default)
    default = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": block_of(width, 64), "num_warps": 8, "num_stages": 3}
    return configuration("linear_residual_forward", width, dtype, default)
