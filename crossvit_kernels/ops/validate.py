"""Argument checks that the ops share: each names the argument, what was expected and what came. Messages are made only
where a check fails."""

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_STRIDED = torch.strided
_ranks: dict[str, tuple[int, int]] = {}  # the least and most dimensions of a layout, made when it is first seen


def tensor(name: str, value: Tensor, layout: str) -> None:
    """A floating-point tensor with the dimensions of `layout`, e.g. "(B, N, D)"; one that starts with "..." may have
    any number in front."""
    if not isinstance(value, Tensor):
        _no_tensor(name, layout, value)
    if value.dtype not in FLOATING or value.layout is not _STRIDED:
        raise TypeError(f"{name}: expected a dense floating-point tensor {layout}, got {value.dtype}, {value.layout}")
    least, most = _ranks.get(layout) or _ranks_of(layout)
    if not least <= value.dim() <= most:
        raise ValueError(f"{name}: expected a tensor {layout}, got shape {tuple(value.shape)}")


def _ranks_of(layout: str) -> tuple[int, int]:
    named = layout.count(",") + 1
    found = (named - 1, sys.maxsize) if layout.startswith("(...") else (named, named)
    if not torch.compiler.is_compiling():  # which guards what it reads, and must not write there
        _ranks[layout] = found
    return found


for _layout in (
    "(..., D)",
    "(..., K)",
    "(E, D)",
    "(B, N, D)",
    "(B, N, 3 D)",
    "(B, D_d)",
    "(B, C, H, W)",
    "(D, C, P, P)",
):
    _ranks_of(_layout)


def _no_tensor(name: str, expected: str, value: Any) -> NoReturn:
    message = f"{name}: expected a tensor {expected}, got {type(value).__name__}"
    if isinstance(value, torch.fx.Proxy):
        message += "; the op looks at its arguments, so that torch.fx.symbolic_trace can only pass it by: torch.fx.wrap"
    raise TypeError(message)


def autocast(first: Tensor) -> bool:
    """Whether autocast brings the arguments to one dtype; it knows no meta device."""
    device = first.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def beside(
    name: str,
    value: Tensor,
    shape: Sequence[int],
    first_name: str,
    first: Tensor,
    *,
    any_dtype: bool = False,
    float32: bool = False,
) -> None:
    """The tensor must have this shape and go together with the op's first argument: be on its device and, outside
    autocast, have its dtype. With `float32` it may have that dtype too, with `any_dtype` any but float64."""
    if not isinstance(value, Tensor):
        _no_tensor(name, f"of shape {tuple(shape)}", value)
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != first.device:
        raise ValueError(f"{name}: expected to be on {first.device} as {first_name} is, got {value.device}")
    if value.dtype is not first.dtype:
        _mixed(name, value, first_name, first, any_dtype or (float32 and value.dtype is torch.float32))
    if value.layout is not _STRIDED:
        raise TypeError(f"{name}: expected a dense tensor, got {value.layout}")


def _mixed(name: str, value: Tensor, first_name: str, first: Tensor, any_dtype: bool) -> None:
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    if torch.float64 in (value.dtype, first.dtype) or not (any_dtype or autocast(first)):
        raise TypeError(
            f"{name}: expected {first.dtype} as {first_name} is, got {value.dtype} (dtypes mix under autocast only)"
        )


def norm(
    name: str, weight: Tensor, bias_name: str, bias: Tensor | None, shape: Sequence[int], first_name: str, first: Tensor
) -> None:
    """A LayerNorm's weight and bias, both in the first argument's dtype or, beside 16 bits, both float32; see
    `beside`."""
    beside(name, weight, shape, first_name, first, float32=True)
    if bias is not None:
        beside(bias_name, bias, shape, name, weight)


def linear(
    name: str, weight: Tensor, bias_name: str, bias: Tensor | None, shape: Sequence[int], first_name: str, first: Tensor
) -> None:
    """A Linear's or a convolution's weight, of this shape, and its bias, in the first argument's dtype: `beside`."""
    beside(name, weight, shape, first_name, first)
    if bias is not None:
        beside(bias_name, bias, shape[:1], first_name, first)


def matrix(
    name: str, weight: Tensor, bias_name: str, bias: Tensor | None, columns: int, first_name: str, first: Tensor
) -> int:
    """The number of rows, which may be any, of a Linear's weight; see `linear`."""
    tensor(name, weight, "(E, D)")
    rows = weight.shape[0]
    beside(name, weight, (rows, columns), first_name, first)
    positive(f"{name}'s rows", rows)
    if bias is not None:
        beside(bias_name, bias, (rows,), first_name, first)
    return rows


def heads(num_heads: int, width: int, width_name: str) -> None:
    """A number of heads that divides the width."""
    if not isinstance(num_heads, int) or isinstance(num_heads, bool):
        raise TypeError(f"num_heads: expected an int, got {type(num_heads).__name__}")
    if num_heads <= 0 or width % num_heads:
        raise ValueError(f"num_heads: expected a divisor of {width_name}, {width}, got {num_heads}")


def positive(name: str, value: int) -> None:
    """A size that is not zero: only the batch may be empty."""
    if value <= 0:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def epsilon(eps: Any) -> None:
    """LayerNorm's eps, a number that is not negative."""
    if not isinstance(eps, float) and (not isinstance(eps, int) or isinstance(eps, bool)):
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"eps: expected at least 0, got {eps}")


def activation(name: str, value: str | None) -> bool:
    """Whether this activation is "gelu"; the other choice is None."""
    if value is None:
        return False
    if value != "gelu":
        raise ValueError(f"{name}: expected None or 'gelu', got {value!r}")
    return True


def scale(value: Tensor, x: Tensor, width: int) -> bool:
    """Whether a factor is one per sample, (B, 1, ..., 1) with the dimensions of x, or one per channel, (width,). Where
    x is a single row, (D,), it is one per channel."""
    if not isinstance(value, Tensor):
        _no_tensor("scale", "per sample or per channel", value)
    per_sample = value.dim() == x.dim() > 1
    shape = (x.shape[0], *([1] * (x.dim() - 1))) if per_sample else (width,)
    beside("scale", value, shape, "x", x, any_dtype=True)
    return per_sample


def scale_shape(value: Tensor | None, per_sample: bool, x: Tensor, width: int) -> Sequence[int]:
    """The shape that a factor must have once it is decided whether it is one per sample; see `scale`."""
    if not per_sample:
        return (width,)
    if value is None or x.dim() < 2:
        why = "without a scale" if value is None else f"for x of shape {tuple(x.shape)}"
        raise ValueError(f"per_sample: expected False {why}, got True")
    return (x.shape[0], *[1] * (x.dim() - 1))


def size(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width, given as one int or two."""
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(pair) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in pair):
        raise TypeError(f"{name}: expected an int or (height, width), got {value!r}")
    positive(f"{name}'s smaller side", min(pair))
    return pair


def promoted(residual: Tensor, scale: Tensor | None, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """The residual and the scale in the dtype of residual + scale * Linear, where they do not all share one."""
    if residual.dtype is matrix.dtype and (scale is None or scale.dtype is matrix.dtype):
        return residual, scale
    device = residual.device.type
    linear = torch.get_autocast_dtype(device) if autocast(residual) else matrix.dtype
    dtype = torch.promote_types(residual.dtype, linear)
    if scale is None:
        return residual.to(dtype), None
    dtype = torch.promote_types(dtype, scale.dtype)
    return residual.to(dtype), scale.to(dtype)
