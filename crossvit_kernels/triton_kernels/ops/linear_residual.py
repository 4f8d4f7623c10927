"""linear_residual: a tiled matrix product whose last step adds bias, scale and residual."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels import linear_tiles
from ..kernels.arithmetic import gelu, product
from ..kernels.linear_gradients import input_gradient, parameter_gradients
from ..kernels.rows import FEW_ROWS, Rows, block_of, row_offsets, rows_of
from ..kernels.scale import SAMPLE, Scale, scale_of, scaled
from ..launch import Configuration, cdiv, configuration, dot_precision, launch, multiprocessors


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
        acc = product(x.to(weight_ptr.dtype.element_ty), weight.T, acc, PRECISION)
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


@triton.jit
def linear_scale_gradient(
    grad_ptr,
    grad_tokens,
    grad_batch,
    grad_row,
    x_ptr,
    x_tokens,
    x_batch,
    x_row,
    weight_ptr,
    bias_ptr,
    partial_ptr,
    rows,
    width,
    features,
    GELU: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums of grad * Linear(x) over a tile: of rows, to (rows, column tiles), or columns, to (row tiles, features)."""
    column_tiles = tl.cdiv(features, BLOCK_N)
    row_tile, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    row = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    exists, counts = row < rows, feature < features
    acc = linear_tile(
        x_ptr, x_tokens, x_batch, x_row, weight_ptr, bias_ptr, row, exists, feature, counts, width,
        GELU, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    wanted = exists[:, None] & counts[None, :]
    grad_at = grad_ptr + row_offsets(row, grad_tokens, grad_batch, grad_row)
    acc *= tl.load(grad_at[:, None] + feature[None, :], mask=wanted, other=0.0).to(tl.float32)
    acc = tl.where(wanted, acc, 0.0)  # a row that does not exist may have met an infinite bias
    if PER_SAMPLE:
        tl.store(partial_ptr + row * column_tiles + column_tile, tl.sum(acc, 1), mask=exists)
    else:
        tl.store(partial_ptr + row_tile.to(tl.int64) * features + feature, tl.sum(acc, 0), mask=counts)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    scale: Tensor | None,
    per_sample: bool,
    save: bool,
) -> Tensor:
    """residual + scale * Linear(x)."""
    out = weight.new_empty(residual.shape, dtype=torch.promote_types(residual.dtype, weight.dtype))
    launch_forward(rows_of(x), weight, bias, rows_of(residual), scale_of(scale, per_sample, residual), out)
    return out


def launch_forward(x: Rows, weight: Tensor, bias: Tensor | None, residual: Rows, scale: Scale, out: Tensor) -> None:
    """Fills `out`."""
    weight = weight.contiguous()
    features, width = weight.shape
    bias = None if bias is None else bias.contiguous()
    if linear_tiles.fits(x, weight, out):
        linear_tiles.linear(x, weight, bias, out, residual=residual, scale=scale)
        return
    config = _configuration(x.count, features, width, weight.dtype)
    launch(
        linear_residual_forward,
        (cdiv(x.count, config["BLOCK_M"]) * cdiv(features, config["BLOCK_N"]),),
        config,
        **x.arguments("x"),
        weight_ptr=weight,
        bias_ptr=bias,
        **residual.arguments("residual"),
        **scale.arguments(),
        out_ptr=out,
        rows=x.count,
        width=width,
        features=features,
        PRECISION=dot_precision(weight.dtype),
    )


def backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    per_sample: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients that are needed, of x, weight, bias and scale."""
    grad, rows, factor = rows_of(grad_out), rows_of(x), scale_of(scale, per_sample, grad_out)
    result = []
    if needs[0]:
        result.append(input_gradient(grad, factor, weight, weight.new_empty(x.shape)))
    result += parameter_gradients(grad, factor, rows, weight, needs[1], needs[2])
    if needs[3]:
        assert scale is not None
        result.append(scale_gradient(grad, rows, weight, bias, scale, factor))
    return result


def scale_gradient(
    grad: Rows, x: Rows, weight: Tensor, bias: Tensor | None, scale: Tensor, factor: Scale, gelu_in: bool = False
) -> Tensor:
    """The gradient of `scale` in residual + scale * Linear(x), or of gelu(x): the Linear is made again."""
    weight = weight.contiguous()
    features, width = weight.shape
    config = _configuration(x.count, features, width, weight.dtype)
    row_tiles, column_tiles = cdiv(x.count, config["BLOCK_M"]), cdiv(features, config["BLOCK_N"])
    per_sample = factor.kind == SAMPLE
    shape = (x.count, column_tiles) if per_sample else (row_tiles, features)
    partial = weight.new_empty(shape, dtype=torch.float32)
    launch(
        linear_scale_gradient,
        (row_tiles * column_tiles,),
        config,
        **grad.arguments("grad"),
        **x.arguments("x"),
        weight_ptr=weight,
        bias_ptr=None if bias is None else bias.contiguous(),
        partial_ptr=partial,
        rows=x.count,
        width=width,
        features=features,
        GELU=gelu_in,
        PER_SAMPLE=per_sample,
        PRECISION=dot_precision(weight.dtype),
    )
    total = partial.view(scale.numel(), -1).sum(1) if per_sample else partial.sum(0)
    return total.to(scale.dtype).view(scale.shape)


def _configuration(rows: int, features: int, width: int, dtype: torch.dtype) -> Configuration:
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
