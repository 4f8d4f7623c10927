"""Gradients of a Linear y = x weight^T + bias: of x, and of weight and bias by sums over pieces of the rows."""

import triton
import triton.language as tl

from .arithmetic import gelu, gelu_derivative, product
from .tiles import load_inside, row_starts, scaled, store_inside


@triton.jit
def linear_input_gradient(
    grad, scale, weight_ptr, out_ptr, pre_ptr, activated_ptr, width, features,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(scale * grad) weight; where x was gelu(pre), times gelu'(pre), with gelu(pre) stored if it is wanted."""
    column_tiles = tl.cdiv(width, BLOCK_N)
    row = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    exists, counts = row < grad.count, column < width
    chunk = tl.arange(0, BLOCK_K)
    grad_at = row_starts(grad, row)[:, None] + chunk[None, :]
    weight_at = weight_ptr + chunk.to(tl.int64)[:, None] * width + column[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, features, BLOCK_K):
        inside = k + chunk < features
        grads = tl.load(grad_at + k, mask=exists[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weight_at, mask=inside[:, None] & counts[None, :], other=0.0)
        if scale.sample is not None or scale.channel is not None:
            grads = scaled(grads.to(tl.float32), scale, row, exists, k + chunk, inside)
        acc = product(grads.to(weight_ptr.dtype.element_ty), weight, acc, PRECISION)
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
    grad, scale, x, norm, out_ptr, bias_ptr, piece_size, rows_per_piece, width, features,
    GELU: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(scale * grad)^T x over a piece of the rows, to out_ptr + piece * piece_size, with x normalised and activated on
    the way in where that is asked for; and, of programs behind the last column tile, the column sums of scale * grad.
    """
    row_tiles, column_tiles = tl.cdiv(features, BLOCK_M), tl.cdiv(width, BLOCK_N)
    column_tile = tl.program_id(0) // row_tiles
    piece = tl.program_id(1).to(tl.int64)
    feature = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    counts = feature < features
    begin = piece * rows_per_piece
    end = tl.minimum(begin + rows_per_piece, x.count)
    if column_tile < column_tiles and out_ptr is not None:
        column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = column < width
        if norm is not None:
            norm_weight = tl.load(norm.weight + column, mask=inside, other=0.0).to(tl.float32)
            if norm.bias is not None:
                norm_bias = tl.load(norm.bias + column, mask=inside, other=0.0).to(tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in tl.range(begin, end, BLOCK_K):
            row = start + tl.arange(0, BLOCK_K)
            exists = row < end
            grads = load_inside(row_starts(grad, row), exists, feature, counts)
            values = load_inside(row_starts(x, row), exists, column, inside)
            if scale.sample is not None or scale.channel is not None:
                grads = scaled(grads.to(tl.float32), scale, row, exists, feature, counts)
            if norm is not None:
                mean = tl.load(norm.mean + row, mask=exists, other=0.0)
                rstd = tl.load(norm.rstd + row, mask=exists, other=0.0)
                values = (values.to(tl.float32) - mean[:, None]) * rstd[:, None] * norm_weight[None, :]
                if norm.bias is not None:
                    values += norm_bias[None, :]
                values = tl.where(exists[:, None], values, 0.0)
            if GELU:
                values = gelu(values.to(tl.float32))
            acc = product(grads.to(COMPUTE).T, values.to(COMPUTE), acc, PRECISION)
        store_inside(out_ptr + piece * piece_size + feature.to(tl.int64) * width, counts, column, inside, acc)
    elif bias_ptr is not None:
        total = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
        for start in tl.range(begin, end, BLOCK_K):
            row = start + tl.arange(0, BLOCK_K)
            exists = row < end
            grads = load_inside(row_starts(grad, row), exists, feature, counts)
            total += scaled(grads.to(tl.float32), scale, row, exists, feature, counts)
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
        total += load_inside(partial_ptr + row.to(tl.int64) * size, row < count, column, inside)
    result = tl.sum(total, 0)
    if leading_ptr is not None:
        tl.store(leading_ptr + column, result.to(leading_ptr.dtype.element_ty), mask=column < leading_size)
    if trailing_ptr is not None:
        at = trailing_ptr + (column - leading_size)
        tl.store(at, result.to(trailing_ptr.dtype.element_ty), mask=inside & (column >= leading_size))
