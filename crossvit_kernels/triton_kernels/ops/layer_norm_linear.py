"""layer_norm_linear: a program normalises a tile of rows once and multiplies it by all of the weight's column tiles."""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels import linear_tiles
from ..kernels.arithmetic import gelu, gelu_derivative, product
from ..kernels.layer_norm_backward import norm_gradients
from ..kernels.layer_norm_rows import norm_rows
from ..kernels.linear_gradients import input_gradient, parameter_gradients
from ..kernels.rows import FEW_ROWS, Rows, block_of, row_offsets, rows_of
from ..kernels.scale import UNSCALED
from ..launch import Configuration, cdiv, configuration, dot_precision, launch, multiprocessors

# Up to this width a 16-bit row tile stays on the multiprocessor beside two stages of the weight.
WIDEST_HELD = 768


@triton.jit
def normalized(x, first, shift, rstd, norm_weight_ptr, norm_bias_ptr, columns, width, GELU: tl.constexpr):
    """LayerNorm of the chunk x (rows, columns), float32, and gelu; zero beyond the width."""
    inside = columns < width
    y = (x.to(tl.float32) - first[:, None] - shift[:, None]) * rstd[:, None]
    y = y * tl.load(norm_weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if norm_bias_ptr is not None:
        y += tl.load(norm_bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GELU:
        y = gelu(y)
    return tl.where(inside[None, :], y, 0.0)


@triton.jit
def layer_norm_linear_forward(
    x_ptr,
    x_tokens,
    x_batch,
    x_row,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    pre_ptr,
    rows,
    features,
    features_per_program,
    eps,
    WIDTH: tl.constexpr,
    GELU_IN: tl.constexpr,
    GELU_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    CHUNKS: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    KEEP: tl.constexpr = HELD and x_ptr.dtype.element_ty.primitive_bitwidth == 16
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < rows
    x_at = x_ptr + row_offsets(row, x_tokens, x_batch, x_row)
    chunk = tl.arange(0, BLOCK_K)

    # Of x less its first element the mean and then the variance: exact where the mean dwarfs the deviation.
    first = tl.load(x_at, mask=exists, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    raw = ()
    if HELD:
        for k in tl.static_range(CHUNKS):
            columns = k * BLOCK_K + chunk
            inside = (columns < WIDTH)[None, :]
            x = tl.load(x_at[:, None] + columns[None, :], mask=exists[:, None] & inside, other=0.0)
            if KEEP:
                raw = raw + (x,)
            total += tl.sum(tl.where(inside, x.to(tl.float32) - first[:, None], 0.0), 1)
        shift = total / WIDTH
        for k in tl.static_range(CHUNKS):
            columns = k * BLOCK_K + chunk
            inside = (columns < WIDTH)[None, :]
            if KEEP:
                x = raw[k]
            else:
                x = tl.load(x_at[:, None] + columns[None, :], mask=exists[:, None] & inside, other=0.0)
            x = tl.where(inside, x.to(tl.float32) - first[:, None] - shift[:, None], 0.0)
            squares += tl.sum(x * x, 1)
    else:
        for k in tl.range(0, WIDTH, BLOCK_K):
            inside = (k + chunk < WIDTH)[None, :]
            x = tl.load(x_at[:, None] + (k + chunk)[None, :], mask=exists[:, None] & inside, other=0.0)
            total += tl.sum(tl.where(inside, x.to(tl.float32) - first[:, None], 0.0), 1)
        shift = total / WIDTH
        for k in tl.range(0, WIDTH, BLOCK_K):
            inside = (k + chunk < WIDTH)[None, :]
            x = tl.load(x_at[:, None] + (k + chunk)[None, :], mask=exists[:, None] & inside, other=0.0)
            x = tl.where(inside, x.to(tl.float32) - first[:, None] - shift[:, None], 0.0)
            squares += tl.sum(x * x, 1)
    rstd = tl.rsqrt(squares / WIDTH + eps)
    if mean_ptr is not None:
        if tl.program_id(1) == 0:
            tl.store(mean_ptr + row, first + shift, mask=exists)
            tl.store(rstd_ptr + row, rstd, mask=exists)

    tiles = ()
    if HELD:
        for k in tl.static_range(CHUNKS):
            columns = k * BLOCK_K + chunk
            if KEEP:
                x = raw[k]
            else:
                x = tl.load(
                    x_at[:, None] + columns[None, :], mask=exists[:, None] & (columns < WIDTH)[None, :], other=0.0
                )
            y = normalized(x, first, shift, rstd, norm_weight_ptr, norm_bias_ptr, columns, WIDTH, GELU_IN)
            tiles = tiles + (y.to(weight_ptr.dtype.element_ty),)

    begin = tl.program_id(1) * features_per_program
    for n in tl.range(begin, min(begin + features_per_program, features), BLOCK_N):
        feature = n + tl.arange(0, BLOCK_N)
        counts = feature < features
        weight_at = weight_ptr + feature.to(tl.int64) * WIDTH
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if HELD:
            for k in tl.static_range(CHUNKS):
                columns = k * BLOCK_K + chunk
                wanted = counts[:, None] & (columns < WIDTH)[None, :]
                weight = tl.load(weight_at[:, None] + columns[None, :], mask=wanted, other=0.0)
                acc = product(tiles[k], weight.T, acc, PRECISION)
        else:
            for k in tl.range(0, WIDTH, BLOCK_K):
                columns = k + chunk
                inside = (columns < WIDTH)[None, :]
                x = tl.load(x_at[:, None] + columns[None, :], mask=exists[:, None] & inside, other=0.0)
                y = normalized(x, first, shift, rstd, norm_weight_ptr, norm_bias_ptr, columns, WIDTH, GELU_IN)
                weight = tl.load(weight_at[:, None] + columns[None, :], mask=counts[:, None] & inside, other=0.0)
                acc = product(y.to(weight_ptr.dtype.element_ty), weight.T, acc, PRECISION)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + feature, mask=counts, other=0.0).to(tl.float32)[None, :]
        at = row[:, None] * features + feature[None, :]
        wanted = exists[:, None] & counts[None, :]
        if pre_ptr is not None:
            tl.store(pre_ptr + at, acc.to(pre_ptr.dtype.element_ty), mask=wanted)
        if GELU_OUT:
            acc = gelu(acc)
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=wanted)


@triton.jit
def gelu_backward(grad_ptr, grad_tokens, grad_batch, grad_row, pre_ptr, out_ptr, size, width, BLOCK: tl.constexpr):
    """grad * gelu'(pre), pre and out dense (rows, width)."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    row = index // width
    at = row_offsets(row, grad_tokens, grad_batch, grad_row) + (index - row * width)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    pre = tl.load(pre_ptr + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + index, (grad * gelu_derivative(pre)).to(out_ptr.dtype.element_ty), mask=inside)


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    gelu_in: bool,
    gelu_out: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    """(out, mean, rstd, pre) of the op, the last three without rows unless `save`."""
    rows, features = x.numel() // x.shape[-1], weight.shape[0]
    out = weight.new_empty((*x.shape[:-1], features))
    mean = weight.new_empty(rows if save else 0, dtype=torch.float32)
    rstd = weight.new_empty(rows if save else 0, dtype=torch.float32)
    pre = weight.new_empty((rows if save and gelu_out else 0, features))
    launch_forward(rows_of(x), norm_weight, norm_bias, weight, bias, eps, gelu_in, gelu_out, out, mean, rstd, pre)
    return out, mean, rstd, pre


def launch_forward(
    x: Rows,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    gelu_in: bool,
    gelu_out: bool,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    pre: Tensor,
) -> None:
    """Fills `out` and, where they have rows, the saved tensors."""
    weight = weight.contiguous()
    features, width = weight.shape
    bias = None if bias is None else bias.contiguous()
    kept = (mean, rstd) if mean.shape[0] else (None, None)
    if linear_tiles.takes(x.count, weight, out):
        # Where the copy engine feeds the product, normalising into memory beats doing so in front of it.
        y = rows_of(weight.new_empty((x.count, width)))
        norm_rows(x, norm_weight, norm_bias, eps, gelu_in, y.tensor, *kept)
        linear_tiles.linear(y, weight, bias, out, gelu=gelu_out, pre=pre if pre.shape[0] else None)
        return
    config = _configuration(x.count, width, weight.dtype)
    row_tiles, column_tiles = cdiv(x.count, config["BLOCK_M"]), cdiv(features, config["BLOCK_N"])
    share = cdiv(column_tiles, column_splits(row_tiles, column_tiles, multiprocessors()))
    launch(
        layer_norm_linear_forward,
        (row_tiles, cdiv(column_tiles, share)),
        config,
        **x.arguments("x"),
        norm_weight_ptr=norm_weight.contiguous(),
        norm_bias_ptr=None if norm_bias is None else norm_bias.contiguous(),
        weight_ptr=weight,
        bias_ptr=bias,
        out_ptr=out,
        mean_ptr=kept[0],
        rstd_ptr=kept[1],
        pre_ptr=pre if pre.shape[0] else None,
        rows=x.count,
        features=features,
        features_per_program=share * config["BLOCK_N"],
        eps=eps,
        WIDTH=width,
        GELU_IN=gelu_in,
        GELU_OUT=gelu_out,
        PRECISION=dot_precision(weight.dtype),
        HELD=weight.dtype.itemsize == 2 and width <= WIDEST_HELD,
    )


def backward(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    gelu_in: bool,
    gelu_out: bool,
    mean: Tensor,
    rstd: Tensor,
    pre: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients that are needed, of x, norm_weight, norm_bias, weight and bias."""
    grad = rows_of(grad_out)
    if gelu_out:
        out = torch.empty_like(pre)
        config = configuration("gelu_backward", 0, pre.dtype, {"BLOCK": 1024, "num_warps": 4, "num_stages": 1})
        launch(
            gelu_backward,
            (cdiv(pre.numel(), config["BLOCK"]),),
            config,
            **grad.arguments("grad"),
            pre_ptr=pre,
            out_ptr=out,
            size=pre.numel(),
            width=pre.shape[1],
        )
        grad = rows_of(out)
    return backward_of_linear(grad, x, norm_weight, norm_bias, weight, gelu_in, mean, rstd, needs)


def backward_of_linear(
    grad: Rows,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    gelu_in: bool,
    mean: Tensor,
    rstd: Tensor,
    needs: Sequence[bool],
    add: Rows | None = None,
) -> list[Tensor]:
    """The gradients that are needed, of x, norm_weight, norm_bias, weight and bias, from that of the Linear's output;
    `add` is added to x's."""
    rows = rows_of(x)
    result, inputs = [], rows
    norm = (mean, rstd, norm_weight, norm_bias)
    if needs[0] or needs[1] or needs[2]:
        shape = rows.count, x.shape[-1]
        grad_y = input_gradient(grad, UNSCALED, weight, weight.new_empty(shape))
        # What the weight's gradient multiplies is written here once, rather than made again by each of its programs.
        y = weight.new_empty(shape) if needs[3] else None
        result = norm_gradients(
            grad_y, rows, mean, rstd, norm_weight, norm_bias, needs, shape=x.shape, gelu_in=gelu_in, add=add, y=y
        )
        if y is not None:
            inputs, norm, gelu_in = rows_of(y), None, False
    return result + parameter_gradients(grad, UNSCALED, inputs, weight, needs[3], needs[4], norm=norm, gelu_in=gelu_in)


@functools.cache
def column_splits(row_tiles: int, column_tiles: int, processors: int) -> int:
    """Over how many programs the column tiles of a row tile go: normalising costs about as much as two of them."""
    return min(
        range(1, column_tiles + 1),
        key=lambda splits: cdiv(row_tiles * splits, processors) * (cdiv(column_tiles, splits) + 2),
    )


def _configuration(rows: int, width: int, dtype: torch.dtype) -> Configuration:
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
