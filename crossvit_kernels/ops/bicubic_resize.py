"""bicubic_resize: images at another size, as torch.nn.functional.interpolate makes them.

    out[y, x] = Σ_s Σ_t u_s(y) v_t(x) images[y_s, x_t]             s, t = 0 … 3

The sums run over the four rows y_s and the four columns x_t that are nearest to the place of (y, x) in the image; of a
pixel outside the image the nearest inside is taken. u and v are the weights of cubic convolution with a = -0.75, and
corners are not aligned.
"""

import torch.nn.functional as F
from torch import Tensor

from ..dispatch.call import call, needs_reference
from ..dispatch.register import register
from ..dispatch.spec import Argument, OpSpec, Result, Shapes
from . import validate


def _reference(images: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(images, (height, width), mode="bicubic", align_corners=False)


def bicubic_resize_reference(images: Tensor, image_size: int | tuple[int, int]) -> Tensor:
    """bicubic_resize in plain PyTorch."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return images if images.shape[-2:] == (height, width) else _reference(images, height, width)


def _shapes(images: Tensor, height: int, width: int) -> Shapes:
    validate.tensor("images", images, "(B, C, H, W)")
    validate.positive("height", height)
    validate.positive("width", width)
    return {"images": images.shape}


def _results(images: Tensor, height: int, width: int) -> tuple[Result, ...]:
    return (((*images.shape[:2], height, width), images.dtype),)


_op = register(
    OpSpec(
        "bicubic_resize",
        [Argument("images", activation=True), Argument("height", "SymInt"), Argument("width", "SymInt")],
        computes_in="images",
        reference=_reference,
        shapes=_shapes,
        results=_results,
        flops=lambda backend: 0,  # PyTorch's counter counts products of matrices
        backward_flops=lambda backend, needs: 0,
        save=lambda: (),
    )
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
    validate.tensor("images", images, "(B, C, H, W)")
    validate.positive("images' smallest side", min(images.shape[1:]))
    height, width = validate.size("image_size", image_size)
    inputs = (images, height, width)
    reference = needs_reference(_op, inputs, kernels)
    if images.shape[2] == height and images.shape[3] == width:
        return images
    return _reference(*inputs) if reference else call(_op, inputs, kernels)
