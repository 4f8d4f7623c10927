"""The gradient of a bicubic resize: each pixel of the images gathers from the resized pixels whose taps meet it."""

import math

import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, launch
from .patches import cubic_taps


@triton.jit
def resize_axis_gradient(
    grad_ptr, out_ptr, total, size, resized, inner, scale, inverse_scale, candidates, BLOCK: tl.constexpr
):
    """grad (..., resized, inner) to out (..., size, inner), `total` elements: along an axis of `size` pixels that was
    resized."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = element < total
    outer = element // inner // size
    at = (element // inner % size).to(tl.int32)
    # Taps reach two pixels to either side; beyond a border they reach the border's pixel, which is no farther.
    least = tl.floor((at.to(tl.float32) - 1.5) * inverse_scale - 0.5).to(tl.int32) - 1
    sums = tl.zeros((BLOCK,), tl.float32)
    for i in tl.range(0, candidates):
        candidate = least + i
        pixels, weights = cubic_taps(candidate, scale, size, 1, tl.int32)
        weight = tl.zeros((BLOCK,), tl.float32)
        meets = candidate < 0
        for t in tl.static_range(4):
            weight += tl.where(pixels[t] == at, weights[t], 0.0)
            meets |= pixels[t] == at
        meets &= exists & (candidate >= 0) & (candidate < resized)
        grad = tl.load(grad_ptr + (outer * resized + candidate) * inner + element % inner, mask=meets, other=0.0)
        sums += tl.where(meets, grad.to(tl.float32) * weight, 0.0)
    tl.store(out_ptr + element, sums.to(out_ptr.dtype.element_ty), mask=exists)


def resize_gradient(grad: Tensor, images: Tensor) -> Tensor:
    """The gradient of `images` (B, C, H, W) for that of the resized images, `grad`, contiguous and float32."""
    batch, channels, height, width = images.shape
    rows = grad.new_empty((batch, channels, height, grad.shape[3]))
    _resize_axis_gradient(grad, rows, height, grad.shape[2], grad.shape[3])
    out = images.new_empty(images.shape)
    _resize_axis_gradient(rows, out, width, grad.shape[3], 1)
    return out


def _resize_axis_gradient(grad: Tensor, out: Tensor, size: int, resized: int, inner: int) -> None:
    scale = size / resized
    config = {"BLOCK": 512, "num_warps": 4, "num_stages": 2}
    launch(
        resize_axis_gradient,
        (cdiv(out.numel(), config["BLOCK"]),),
        config,
        grad_ptr=grad,
        out_ptr=out,
        total=out.numel(),
        size=size,
        resized=resized,
        inner=inner,
        scale=scale,
        inverse_scale=1 / scale,
        candidates=math.ceil(4 / scale) + 4,
    )
