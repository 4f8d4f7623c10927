"""What several ops launch for a Linear: the product on many rows, and its gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import defaults
from ..configs import configuration
from ..kernels.linear_gradients import linear_input_gradient, linear_weight_gradient, sum_of_partials
from ..kernels.linear_tiles import linear_tiles
from ..launch import launch
from ..target import DTYPES, architecture, dot_precision, multiprocessors
from ..tiling import FEW_ROWS, cdiv, rows_per_piece
from ..views import UNSCALED, Linear, Norm, Rows, Scale

_ALIGNMENT = 16  # bytes, of what the copy engine addresses


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
    if x.base.dtype is not weight.dtype or x.distance is None or not takes(x.count, weight, out):
        return False
    return _aligned(2 * x.distance, 2 * x.base.storage_offset())


def _aligned(*sizes: int | torch.SymInt) -> bool:
    return not any(int(size) % _ALIGNMENT for size in sizes)


def linear(
    x: Rows,
    params: Linear,
    out: Tensor,
    *,
    gelu: bool = False,
    pre: Tensor | None = None,
    residual: Rows | None = None,
    scale: Scale = UNSCALED,
) -> None:
    """Fills `out` (rows, features), and `pre` where it is given; see `linear_tiles`. Only where it `fits`."""
    weight, (features, width) = params.weight, params.weight.shape
    last_step = "residual" if residual is not None else "gelu" if gelu else "linear"
    if pre is not None:  # its tile takes shared memory too
        last_step += "_saved"
    if out.dtype.itemsize == 4:  # as under autocast: a tile of the result takes twice the shared memory
        last_step += "_float32"
    config = configuration(f"linear_tiles_{last_step}", width, weight.dtype, defaults.LINEAR_TILES)
    tile_m, tile_n, tile_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    programs = min(config["RESIDENT"] * multiprocessors(), cdiv(x.count, tile_m) * cdiv(features, tile_n))
    launch(
        linear_tiles,
        (programs,),
        config,
        x_tiles=TensorDescriptor(x.base, [x.count, width], [x.distance, 1], [tile_m, tile_k]),
        weight_tiles=TensorDescriptor.from_tensor(weight, [tile_n, tile_k]),
        out_tiles=_tiles(out, features, tile_m, tile_n),
        pre_tiles=None if pre is None else _tiles(pre, features, tile_m, tile_n),
        bias_ptr=params.bias,
        residual=residual,
        scale=scale,
        rows=x.count,
        features=features,
        width=width,
        GELU=gelu,
        DTYPE=DTYPES[out.dtype],
    )


def _tiles(tensor: Tensor, features: int, tile_m: int, tile_n: int) -> TensorDescriptor:
    rows = tensor.numel() // features
    return TensorDescriptor(tensor, [rows, features], [features, 1], [tile_m, tile_n])


def sum_partials(partial: Tensor, leading_size: int, leading: Tensor | None, trailing: Tensor | None) -> None:
    """The sum of the float32 partial (count, size) over its rows: what is before `leading_size` goes to
    `leading`, the rest to `trailing`."""
    count, size = partial.shape
    config, sizes = defaults.sum_of_partials(count), {"count": count, "leading_size": leading_size, "size": size}
    tensors = {"partial_ptr": partial, "leading_ptr": leading, "trailing_ptr": trailing}
    launch(sum_of_partials, (cdiv(size, config["BLOCK_N"]),), config, tensors, **sizes)


def input_gradient(
    grad: Rows, scale: Scale, weight: Tensor, out: Tensor, pre: Tensor | None = None, activated: Tensor | None = None
) -> Tensor:
    """Fills and returns `out`, the gradient of the Linear's input x for scale * grad; where x was gelu(pre) that of
    pre, and `activated` becomes x."""
    weight = weight.contiguous()
    (features, width), precision = weight.shape, dot_precision(weight.dtype)
    size = grad.count, width, features, weight.dtype, precision, multiprocessors()
    name, default = defaults.linear_input_gradient(*size, pre is not None)
    config = configuration(name, width, weight.dtype, default)
    grid = (cdiv(grad.count, config["BLOCK_M"]) * cdiv(width, config["BLOCK_N"]),)
    tensors = {"weight_ptr": weight, "out_ptr": out, "pre_ptr": pre, "activated_ptr": activated}
    sizes = {"width": width, "features": features, "PRECISION": precision}
    launch(linear_input_gradient, grid, config, tensors, grad=grad, scale=scale, **sizes)
    return out


def parameter_gradients(
    grad: Rows,
    scale: Scale,
    x: Rows,
    weight: Tensor,
    needs: Sequence[bool],
    *,
    norm: Norm | None = None,
    gelu_in: bool = False,
) -> list[Tensor]:
    """Those of the gradients of weight and bias that `needs` names, for scale * grad. The Linear's input is x; with
    `norm` LayerNorm(x); with `gelu_in` gelu of that."""
    weight_needed, bias_needed = needs
    if not (weight_needed or bias_needed):
        return []
    features, width = weight.shape
    dtype = weight.dtype
    grad_weight = weight.new_empty((features, width)) if weight_needed else None
    grad_bias = weight.new_empty(features) if bias_needed else None
    precision = dot_precision(dtype)
    default = defaults.linear_weight_gradient(features, width, dtype, precision)
    config = configuration("linear_weight_gradient", width, dtype, default)
    tiles = cdiv(features, config["BLOCK_M"]) * ((cdiv(width, config["BLOCK_N"]) if weight_needed else 0) + bias_needed)
    per_piece = rows_per_piece(grad.count, tiles, config["BLOCK_K"], multiprocessors())
    pieces = cdiv(grad.count, per_piece)
    out, bias_out = grad_weight, grad_bias
    size = features * width if weight_needed else 0
    total = size + (features if bias_needed else 0)
    if pieces > 1:
        partial = weight.new_empty((pieces, total), dtype=torch.float32)
        out, bias_out = partial, partial.view(-1)[size:]
    launch(
        linear_weight_gradient,
        (tiles, pieces),
        config,
        grad=grad,
        scale=scale,
        x=x,
        norm=norm,
        out_ptr=out if weight_needed else None,
        bias_ptr=bias_out if bias_needed else None,
        piece_size=total,
        rows_per_piece=per_piece,
        width=width if weight_needed else 0,
        features=features,
        GELU=gelu_in,
        COMPUTE=DTYPES[dtype],
        PRECISION=precision,
    )
    if pieces > 1:
        sum_partials(partial, size, grad_weight, grad_bias)
    return [g for g in (grad_weight, grad_bias) if g is not None]
