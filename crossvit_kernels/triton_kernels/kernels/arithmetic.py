"""What the kernels share on the device."""

import triton
import triton.language as tl


@triton.jit
def gelu(x):
    """x Phi(x), by erf; x float32."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_derivative(x):
    """Phi(x) + x phi(x); x float32."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def erf16(x):
    """erf(x / sqrt(2)) for results of 16 bits, x float32: an odd polynomial up to 4.4, where it is 1.

    Fitted for the least |x error| / 2, which is gelu's: at most 4.3e-5, where half a unit in the last place of a
    float16 between 1/16 and 1/8 is 3e-5. The exact one takes three times the instructions, and as long as the product.
    """
    x = tl.minimum(tl.maximum(x, -4.4), 4.4)
    u = x * x
    p = tl.fma(u, 7.13885895e-11, -7.5080937e-09)
    p = tl.fma(p, u, 3.48169152e-07)
    p = tl.fma(p, u, -9.44972635e-06)
    p = tl.fma(p, u, 0.000168585873)
    p = tl.fma(p, u, -0.0021099837)
    p = tl.fma(p, u, 0.0192860514)
    p = tl.fma(p, u, -0.132152855)
    p = tl.fma(p, u, 0.79752177)
    return x * p


@triton.jit
def gelu16(x):
    """x Phi(x) for results of 16 bits; x float32."""
    half = 0.5 * x
    return tl.fma(half, erf16(x), half)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. Of float32 numbers a tile's products are summed apart before they are added, as errors of short sums
    are smaller than those of one long one; Triton would otherwise go on summing in `acc`."""
    if PRECISION == "ieee" and a.dtype.primitive_bitwidth == 32:
        return acc + tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=1)
    return tl.dot(a, b, acc, input_precision=PRECISION)
