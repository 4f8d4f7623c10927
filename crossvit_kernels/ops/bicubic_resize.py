"""bicubic_resize: images at another size, as torch.nn.functional.interpolate makes them.

out[y, x] = sum over s, t < 4 of u_s(y) v_t(x) images[y_s, x_t]     the 4 x 4 nearest pixels, those outside the image
being the nearest inside; u and v the weights of cubic convolution (a = -0.75), corners not aligned
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..dispatch.register import Op
from . import _validate


def _reference(images: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(images, (height, width), mode="bicubic", align_corners=False)


def bicubic_resize_reference(images: Tensor, image_size: int | tuple[int, int]) -> Tensor:
    """bicubic_resize in plain PyTorch."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return images if images.shape[-2:] == (height, width) else _reference(images, height, width)


def _shapes(images: Tensor, height: int, width: int) -> tuple[Any, ...]:
    _validate.tensor("images", images, "(B, C, H, W)")
    _validate.positive("height", height)
    _validate.positive("width", width)
    return (images.shape,)


def _results(images: Tensor, height: int, width: int) -> tuple[Any, ...]:
    return (((*images.shape[:2], height, width), images.dtype),)


_op = Op(
    "bicubic_resize",
    "Tensor images, SymInt height, SymInt width",
    reference=_reference,
    shapes=_shapes,
    results=_results,
    flops=lambda backend, *inputs: 0,  # PyTorch's counter counts products of matrices
    backward_flops=lambda backend, needs, *inputs: 0,
    matrices=(),
    activations=("images",),
    save=lambda *inputs: (),
)


def bicubic_resize(images: Tensor, image_size: int | tuple[int, int], *, kernels: str = "auto") -> Tensor:
    """Images at another size, as torch.nn.functional.interpolate with mode="bicubic", align_corners=False makes them.

    Args:
        images: (B, C, H, W), floating point, any strides.
        image_size: the size wanted, an int or (height, width); where it is the images' own they come back themselves.
        kernels: the backend, see `crossvit_kernels.backends`; on a GPU all are PyTorch's own.

    Returns:
        (B, C, height, width) in the images' dtype, under autocast too.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is wrong; RuntimeError: the backend
            asked for is not there.
    """
    _validate.tensor("images", images, "(B, C, H, W)")
    _validate.positive("images' smallest side", min(images.shape[1:]))
    height, width = _validate.size("image_size", image_size)
    reference = _op.needs_reference(kernels, images, images.dtype)
    if images.shape[2] == height and images.shape[3] == width:
        return images
    return _reference(images, height, width) if reference else _op(images, height, width, kernels=kernels)
