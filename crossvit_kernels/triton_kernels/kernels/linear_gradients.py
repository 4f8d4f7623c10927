"""Gradients of a Linear y = x weight^T + bias: of x, and of weight and bias by sums over pieces of the rows."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import DTYPES, Configuration, cdiv, configuration, dot_precision, launch, multiprocessors
from .arithmetic import gelu, gelu_derivative, product
from .rows import FEW_ROWS, Rows, block_of, row_offsets
from .scale import Scale, scaled


@triton.jit
def linear_input_gradient(
    grad_ptr,
    grad_tokens,
    grad_batch,
    grad_row,
    scale_ptr,
    rows_per_sample,
    weight_ptr,
    out_ptr,
    pre_ptr,
    activated_ptr,
    rows,
    width,
    features,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(scale * grad) weight; where x was gelu(pre), times gelu'(pre), with gelu(pre) stored if it is wanted."""
    column_tiles = tl.cdiv(width, BLOCK_N)
    row = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    exists, counts = row < rows, column < width
    chunk = tl.arange(0, BLOCK_K)
    grad_at = grad_ptr + row_offsets(row, grad_tokens, grad_batch, grad_row)[:, None] + chunk[None, :]
    weight_at = weight_ptr + chunk.to(tl.int64)[:, None] * width + column[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, features, BLOCK_K):
        inside = k + chunk < features
        grad = tl.load(grad_at + k, mask=exists[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weight_at, mask=inside[:, None] & counts[None, :], other=0.0)
        if SCALE != 0:
            grad = scaled(grad.to(tl.float32), scale_ptr, row, exists, rows_per_sample, k + chunk, inside, SCALE)
        acc = product(grad.to(weight_ptr.dtype.element_ty), weight, acc, PRECISION)
        weight_at += BLOCK_K * width
    at = row[:, None] * width + column[None, :]
    wanted = exists[:, None] & counts[None, :]
    if pre_ptr is not None:
        pre = tl.load(pre_ptr + at, mask=wanted, other=0.0).to(tl.float32)
        acc *= gelu_derivative(pre)
        if activated_ptr is not None:
            tl.store(activated_ptr + at, gelu(pre).to(activated_ptr.dtype.element_ty), mask=wanted)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=wanted)


@triton.jit
def linear_weight_gradient(
    grad_ptr,
    grad_tokens,
    grad_batch,
    grad_row,
    scale_ptr,
    rows_per_sample,
    x_ptr,
    x_tokens,
    x_batch,
    x_row,
    mean_ptr,
    rstd_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    out_ptr,
    bias_ptr,
    piece_size,
    rows,
    rows_per_piece,
    width,
    features,
    SCALE: tl.constexpr,
    GELU: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(scale * grad)^T x over a piece of the rows, to out_ptr + piece * piece_size, with x normalised and activated on
    the way in where that is asked for; and, of programs behind the last column tile, the column sums of scale * grad.
    """
    row_tiles, column_tiles = tl.cdiv(features, BLOCK_M), tl.cdiv(width, BLOCK_N)
    column_tile = tl.program_id(0) // row_tiles
    piece = tl.program_id(1).to(tl.int64)
    feature = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    counts = feature < features
    begin = piece * rows_per_piece
    end = tl.minimum(begin + rows_per_piece, rows)
    if column_tile < column_tiles and out_ptr is not None:
        column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = column < width
        if mean_ptr is not None:
            norm_weight = tl.load(norm_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
            if norm_bias_ptr is not None:
                norm_bias = tl.load(norm_bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in tl.range(begin, end, BLOCK_K):
            row = start + tl.arange(0, BLOCK_K)
            exists = row < end
            grad_at = grad_ptr + row_offsets(row, grad_tokens, grad_batch, grad_row)
            grad = tl.load(grad_at[:, None] + feature[None, :], mask=exists[:, None] & counts[None, :], other=0.0)
            x_at = x_ptr + row_offsets(row, x_tokens, x_batch, x_row)
            x = tl.load(x_at[:, None] + column[None, :], mask=exists[:, None] & inside[None, :], other=0.0)
            if SCALE != 0:
                grad = scaled(grad.to(tl.float32), scale_ptr, row, exists, rows_per_sample, feature, counts, SCALE)
            if mean_ptr is not None:
                mean = tl.load(mean_ptr + row, mask=exists, other=0.0)
                rstd = tl.load(rstd_ptr + row, mask=exists, other=0.0)
                x = (x.to(tl.float32) - mean[:, None]) * rstd[:, None] * norm_weight[None, :]
                if norm_bias_ptr is not None:
                    x += norm_bias[None, :]
                x = tl.where(exists[:, None], x, 0.0)
            if GELU:
                x = gelu(x.to(tl.float32))
            acc = product(grad.to(COMPUTE).T, x.to(COMPUTE), acc, PRECISION)
        out_at = out_ptr + piece * piece_size + feature.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=counts[:, None] & inside[None, :])
    elif bias_ptr is not None:
        total = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
        for start in tl.range(begin, end, BLOCK_K):
            row = start + tl.arange(0, BLOCK_K)
            exists = row < end
            grad_at = grad_ptr + row_offsets(row, grad_tokens, grad_batch, grad_row)
            grad = tl.load(grad_at[:, None] + feature[None, :], mask=exists[:, None] & counts[None, :], other=0.0)
            total += scaled(grad.to(tl.float32), scale_ptr, row, exists, rows_per_sample, feature, counts, SCALE)
        bias_at = bias_ptr + piece * piece_size + feature
        tl.store(bias_at, tl.sum(total, 0).to(bias_ptr.dtype.element_ty), mask=counts)


@triton.jit
def sum_of_partials(
    partial_ptr, leading_ptr, trailing_ptr, count, leading_size, size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Column sums of partial (count, size), float32: those of the first `leading_size`
    columns to leading_ptr, those of the others to trailing_ptr."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < size
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, count, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        at = partial_ptr + row.to(tl.int64)[:, None] * size + column[None, :]
        total += tl.load(at, mask=(row < count)[:, None] & inside[None, :], other=0.0)
    result = tl.sum(total, 0)
    if leading_ptr is not None:
        tl.store(leading_ptr + column, result.to(leading_ptr.dtype.element_ty), mask=column < leading_size)
    if trailing_ptr is not None:
        at = trailing_ptr + (column - leading_size)
        tl.store(at, result.to(trailing_ptr.dtype.element_ty), mask=inside & (column >= leading_size))


def sum_partials(partial: Tensor, leading_size: int, leading: Tensor | None, trailing: Tensor | None) -> None:
    """The sum of the float32 partial (count, size) over its rows: what is before `leading_size` goes to
    `leading`, the rest to `trailing`."""
    count, size = partial.shape
    block_m = min(triton.next_power_of_2(count), 64)
    config = {"BLOCK_M": block_m, "BLOCK_N": 2048 // block_m, "num_warps": 4, "num_stages": 2}
    launch(
        sum_of_partials,
        (cdiv(size, config["BLOCK_N"]),),
        config,
        partial_ptr=partial,
        leading_ptr=leading,
        trailing_ptr=trailing,
        count=count,
        leading_size=leading_size,
        size=size,
    )


def input_gradient(
    grad: Rows,
    scale: Scale,
    weight: Tensor,
    out: Tensor,
    pre: Tensor | None = None,
    activated: Tensor | None = None,
) -> Tensor:
    """Fills and returns `out`, the gradient of the Linear's input x for scale * grad; where x was gelu(pre) that of
    pre, and `activated` becomes x."""
    weight = weight.contiguous()
    features, width = weight.shape
    config = _input_configuration(grad.count, width, features, weight.dtype, pre is not None)
    launch(
        linear_input_gradient,
        (cdiv(grad.count, config["BLOCK_M"]) * cdiv(width, config["BLOCK_N"]),),
        config,
        **grad.arguments("grad"),
        **scale.arguments(),
        weight_ptr=weight,
        out_ptr=out,
        pre_ptr=pre,
        activated_ptr=activated,
        rows=grad.count,
        width=width,
        features=features,
        PRECISION=dot_precision(weight.dtype),
    )
    return out


def parameter_gradients(
    grad: Rows,
    scale: Scale,
    x: Rows,
    weight: Tensor,
    weight_needed: bool,
    bias_needed: bool,
    *,
    norm: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None,
    gelu_in: bool = False,
) -> list[Tensor]:
    """Those of the gradients of weight and bias that are needed, for scale * grad. The Linear's input is x; with
    `norm`, (mean, rstd, norm_weight, norm_bias), LayerNorm(x); with `gelu_in` gelu of that."""
    if not (weight_needed or bias_needed):
        return []
    features, width = weight.shape
    dtype = weight.dtype
    grad_weight = weight.new_empty((features, width)) if weight_needed else None
    grad_bias = weight.new_empty(features) if bias_needed else None
    config = _weight_configuration(features, width, dtype)
    tiles = cdiv(features, config["BLOCK_M"]) * ((cdiv(width, config["BLOCK_N"]) if weight_needed else 0) + bias_needed)
    per_piece = rows_per_piece(grad.count, tiles, config["BLOCK_K"], multiprocessors())
    pieces = cdiv(grad.count, per_piece)
    out, bias_out = grad_weight, grad_bias
    size = features * width if weight_needed else 0
    total = size + (features if bias_needed else 0)
    if pieces > 1:
        partial = weight.new_empty((pieces, total), dtype=torch.float32)
        out, bias_out = partial, partial.view(-1)[size:]
    mean, rstd, norm_weight, norm_bias = (None, None, None, None) if norm is None else norm
    launch(
        linear_weight_gradient,
        (tiles, pieces),
        config,
        **grad.arguments("grad"),
        **scale.arguments(),
        **x.arguments("x"),
        mean_ptr=mean,
        rstd_ptr=rstd,
        norm_weight_ptr=None if norm_weight is None else norm_weight.contiguous(),
        norm_bias_ptr=None if norm_bias is None else norm_bias.contiguous(),
        out_ptr=out if weight_needed else None,
        bias_ptr=bias_out if bias_needed else None,
        piece_size=total,
        rows=grad.count,
        rows_per_piece=per_piece,
        width=width if weight_needed else 0,
        features=features,
        GELU=gelu_in,
        COMPUTE=DTYPES[dtype],
        PRECISION=dot_precision(dtype),
    )
    if pieces > 1:
        sum_partials(partial, size, grad_weight, grad_bias)
    return [g for g in (grad_weight, grad_bias) if g is not None]


@functools.cache
def rows_per_piece(rows: int, tiles: int, block: int, processors: int) -> int:
    """How many rows a program sums, a multiple of `block`: as few pieces as fill the machine about twice."""
    pieces = max(1, min(2 * processors // tiles, rows // (4 * block)))
    return cdiv(cdiv(rows, pieces), block) * block


def _input_configuration(rows: int, width: int, features: int, dtype: torch.dtype, gelu_in: bool) -> Configuration:
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


def _weight_configuration(features: int, width: int, dtype: torch.dtype) -> Configuration:
    if dtype.itemsize == 4:
        block_k, num_warps = (16, 8) if dot_precision(dtype) == "ieee" else (32, 4)
        default = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": block_k, "num_warps": num_warps, "num_stages": 3}
    else:
        block_m, block_n = block_of(features, 128, 64), block_of(width, 128 if width >= 128 else 64, 64)
        num_warps = 8 if block_m * block_n > 64 * 64 else 4
        default = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 64, "num_warps": num_warps, "num_stages": 3}
    return configuration("linear_weight_gradient", width, dtype, default)
