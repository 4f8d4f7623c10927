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
