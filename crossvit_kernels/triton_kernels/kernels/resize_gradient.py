"""The gradient of a bicubic resize: each pixel of the images gathers from the resized pixels whose taps meet it."""

import triton
import triton.language as tl

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
