"""The reference in simulated arithmetic: every operation rounds, and every sum is taken in a known order.

PyTorch's own products and sums come from whatever code MKL, oneDNN and ATen choose for the CPU at hand; its error is
another number on another one. Under `Rounded` the same formulas give the same bits on every machine:

    sum of K terms            in float32, in chains of CHAIN terms one after the other; the chains' sums likewise
    product of matrices       the products of two numbers, each rounded, summed like that
    exp, erf, rsqrt           from float64, rounded once
    LayerNorm                 x - x[0], its mean and variance; (x - mean) * rstd
    attention                 s = q k^T scale ; p = exp(s - max s) ; out = p v / sum p ; the backward from logsumexp, as
                              FlashAttention has it: p = exp(s - lse)
    softmax, gelu and the     what PyTorch's decompositions make of them
    other derivatives

+, -, * and / round alike on every machine and are left to PyTorch. Products and sums of 16-bit numbers are float64's,
rounded once: how float32 adds them up is far below that rounding.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode

CHAIN = 64

aten, prims = torch.ops.aten, torch.ops.prims


def chained(terms: Tensor, chain: int) -> Tensor:
    """Float32 `terms` (K, ...) summed over K in chains of at most `chain`: chain c takes c, c + chains, and so on."""
    while len(terms) > 1:
        chains = -(-len(terms) // chain)
        sums = terms[:chains].clone()
        for start in range(chains, len(terms), chains):
            following = terms[start : start + chains]
            sums[: len(following)] += following
        terms = sums
    return terms[0] if len(terms) else terms.new_zeros(terms.shape[1:])


def bicubic_taps(size: int, wanted: int) -> Tensor:
    """The matrices (4, wanted, size) of the four taps of cubic convolution along one axis, made of float32 positions;
    float64. A tap outside is one of the outermost pixel."""
    position = torch.tensor(size / wanted) * (torch.arange(wanted) + 0.5) - 0.5
    first = position.floor()
    t, a = position - first, -0.75
    near = lambda x: ((a + 2) * x - (a + 3)) * x * x + 1  # noqa: E731
    far = lambda x: ((a * x - 5 * a) * x + 8 * a) * x - 4 * a  # noqa: E731
    matrices = torch.zeros(4, wanted, size, dtype=torch.float64)
    for tap, weight in enumerate((far(t + 1), near(t), near(1 - t), far(2 - t))):
        column = (first.long() - 1 + tap).clamp(0, size - 1)
        matrices[tap].scatter_(1, column[:, None], weight.double()[:, None])
    return matrices


def rows_of_windows(images: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """The rows (B windows, C P Q) of images (B, C, H, W) that a convolution by weight (D, C, P, Q) meets."""
    windows = F.unfold(images.double(), weight.shape[2:], stride=stride, padding=padding)
    return windows.mT.flatten(0, 1).to(images.dtype)


class Rounded(TorchDispatchMode):
    """What is called inside computes as above; an operation without a rule here raises.

    Subclasses override `multiply`, a product of matrices, or any other method, to plant a fault.
    """

    def __init__(self, chain: int = CHAIN) -> None:
        super().__init__()
        self.chain = chain
        self.rules: dict[Any, Callable[..., Any]] = {
            aten.mm.default: lambda a, b: self.multiply(a[None], b[None])[0],
            aten.bmm.default: self.multiply,
            aten.addmm.default: self.addmm,
            aten.sum.default: self.sum,
            aten.sum.dim_IntList: self.sum,
            aten.mean.dim: lambda x, dims, keepdim=False, **_: (
                self.sum(x, dims, keepdim) / math.prod(x.shape[d] for d in dims)
            ),
            prims.sum.default: lambda x, dims, **_: self.sum(x, dims),
            aten.convolution.default: self.convolution,
            aten.convolution_backward.default: self.convolution_backward,
            aten.native_layer_norm.default: self.layer_norm,
            aten.upsample_bicubic2d.default: self.bicubic,
            aten.upsample_bicubic2d_backward.default: self.bicubic_backward,
            aten._safe_softmax.default: self.softmax,
            aten._scaled_dot_product_flash_attention_for_cpu.default: self.attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward.default: self.attention_backward,
        }

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in self.rules:
            return self.rules[function](*args, **kwargs)
        if function in DECOMPOSED:
            with self:
                return DECOMPOSED[function](*args, **kwargs)
        if function in FROM_FLOAT64:
            return function(args[0].double()).to(args[0].dtype)
        if function not in ALIKE:
            raise NotImplementedError(f"{function} has no rule in {__name__}: is it the same on every machine?")
        return function(*args, **kwargs)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """a (B, M, K) times b (B, K, N), in their dtype."""
        if a.dtype != torch.float32:
            return (a.double() @ b.double()).to(a.dtype)
        depth = a.shape[2]
        if not depth:
            return a @ b
        chains = -(-depth // self.chain)
        a, b = a.permute(2, 0, 1)[..., None].contiguous(), b.permute(1, 0, 2)[:, :, None].contiguous()
        sums = a[:chains] * b[:chains]  # (chains, B, M, N); the terms as `chained` takes them, made one after the other
        following = torch.empty_like(sums)
        for start in range(chains, depth, chains):
            count = min(chains, depth - start)
            torch.mul(a[start : start + count], b[start : start + count], out=following[:count])
            sums[:count] += following[:count]
        return chained(sums, self.chain)

    def addmm(self, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if a.dtype != torch.float32:
            return (bias.double() + a.double() @ b.double()).to(a.dtype)
        return bias + self.multiply(a[None], b[None])[0]

    def sum(self, x: Tensor, dims: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
        """x over `dims`, by default all."""
        dims = [d % x.dim() for d in (dims or range(x.dim()))]
        kept = [d for d in range(x.dim()) if d not in dims]
        count = math.prod(x.shape[d] for d in dims)
        terms = x.permute(*dims, *kept).reshape(count, *(x.shape[d] for d in kept))
        result = chained(terms, self.chain) if x.dtype == torch.float32 else terms.double().sum(0).to(x.dtype)
        if keepdim:
            result = result.reshape([1 if d in dims else n for d, n in enumerate(x.shape)])
        return result.to(dtype or x.dtype)

    def mean(self, x: Tensor) -> Tensor:
        """x over its last dimension, which stays."""
        return self.sum(x, [-1], keepdim=True) / x.shape[-1]

    def layer_norm(
        self, x: Tensor, shape: list[int], weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, ...]:
        """(out, mean, rstd), the last two float32."""
        wide = x.float()
        mean, rstd = self.statistics(wide, eps)
        out = (wide - mean) * rstd * weight.float()
        out = out if bias is None else out + bias.float()
        return out.to(x.dtype), mean, rstd

    def statistics(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """LayerNorm's mean and rstd of float32 rows."""
        first = x[..., :1]
        shifted = x - first
        mean = self.mean(shifted)
        variance = self.mean((shifted - mean).square())
        return first + mean, (variance + eps).double().rsqrt().float()

    def convolution(
        self, images: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], *rest: Any
    ) -> Tensor:
        assert rest == ([1, 1], False, [0, 0], 1), "a convolution without dilation, transposition and groups"
        rows, matrix = rows_of_windows(images, weight, stride, padding), weight.flatten(1).t()
        out = self.multiply(rows[None], matrix[None])[0] if bias is None else self.addmm(bias, rows, matrix)
        height, width = (
            (n + 2 * p - k) // s + 1 for n, p, k, s in zip(images.shape[2:], padding, weight.shape[2:], stride)
        )
        return out.reshape(len(images), height, width, len(weight)).permute(0, 3, 1, 2)

    def convolution_backward(
        self,
        grad: Tensor,
        images: Tensor,
        weight: Tensor,
        bias: list[int] | None,
        stride: list[int],
        padding: list[int],
        *_: Any,
    ) -> tuple[Tensor, ...]:
        rows, columns = (
            rows_of_windows(images, weight, stride, padding),
            grad.permute(0, 2, 3, 1).reshape(-1, len(weight)),
        )
        patches = grad.shape[2] * grad.shape[3]
        windows = self.multiply(columns[None], weight.flatten(1)[None]).reshape(len(images), patches, rows.shape[1])
        grad_images = F.fold(windows.double().mT, images.shape[2:], weight.shape[2:], stride=stride, padding=padding)
        grad_weight = self.multiply(columns.t()[None], rows[None]).reshape(weight.shape)
        return grad_images.to(images.dtype), grad_weight, self.sum(columns, [0])

    def bicubic(self, images: Tensor, size: list[int], align_corners: bool, *_: Any) -> Tensor:
        rows, columns = (bicubic_taps(*sizes).sum(0) for sizes in zip(images.shape[2:], size))
        return (rows @ (images.double() @ columns.t()).float().double()).to(images.dtype)

    def bicubic_backward(self, grad: Tensor, size: list[int], images: list[int], *_: Any) -> Tensor:
        # Tap by tap, as a pixel's gradient is added up: a border's taps are one pixel's, and their sum would be exact.
        rows, columns = (bicubic_taps(*sizes).flatten(0, 1).float()[None] for sizes in zip(images[2:], size))
        planes = grad.flatten(0, 1).float()
        along_rows = self.multiply(planes.repeat(1, 1, 4), columns.expand(len(planes), -1, -1))
        result = self.multiply(rows.mT.expand(len(planes), -1, -1), along_rows.repeat(1, 4, 1))
        return result.view(images).to(grad.dtype)

    def softmax(self, x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        with self:
            return DECOMPOSED[aten._softmax.default](x.to(dtype or x.dtype), dim, False)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, *_: Any, scale: float | None = None, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """(out, logsumexp) of q, k, v (B, H, N, d); p meets v in v's dtype."""
        scores = self.scores(q, k, scale)
        largest = scores.amax(-1, keepdim=True)
        p = (scores - largest).double().exp().float()
        total = self.sum(p, [-1], keepdim=True)
        out = self.wide_product(p.to(v.dtype), v) / total
        return out.to(q.dtype), (largest + total.double().log().float())[..., 0]

    def attention_backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *_: Any,
        scale: float | None = None,
        **__: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        p = (self.scores(q, k, scale) - lse[..., None]).double().exp().float()
        # The other way round than dO V^T adds the same up: no kernel has both alike, and here would be no error at all.
        delta = self.sum((grad.float() * out.float()).flip(-1), [-1], keepdim=True)
        ds = (p * (self.wide_product(grad, v.mT) - delta)).to(q.dtype)
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        grad_q, grad_k = self.wide_product(ds, k) * factor, self.wide_product(ds.mT, q) * factor
        return grad_q.to(q.dtype), grad_k.to(q.dtype), self.wide_product(p.to(v.dtype).mT, grad).to(q.dtype)

    def scores(self, q: Tensor, k: Tensor, scale: float | None) -> Tensor:
        return self.wide_product(q, k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)

    def wide_product(self, a: Tensor, b: Tensor) -> Tensor:
        """a (B, H, M, K) times b (B, H, K, N): float32."""
        if a.dtype != torch.float32:
            return (a.double() @ b.double()).float()
        return self.multiply(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


DECOMPOSED = get_decompositions(
    [
        aten.native_layer_norm_backward,
        aten._softmax,
        aten._softmax_backward_data,
        aten.gelu,
        aten.gelu_backward,
    ]
)
FROM_FLOAT64 = {aten.exp.default, aten.erf.default}
# Views, copies, and what IEEE 754 defines to the bit.
ALIKE = {
    *(getattr(aten, name).default for name in (
        "_to_copy", "_unsafe_view", "alias", "amax", "as_strided", "cat", "clone", "contiguous", "copy_", "detach",
        "expand", "neg", "new_full", "new_zeros", "ones_like", "permute", "relu", "relu_", "select_backward",
        "slice_backward", "squeeze", "stack", "t", "threshold_backward", "unsqueeze", "view", "zeros", "zeros_like",
    )),
    *(getattr(aten, name).Tensor for name in ("add", "div", "mul", "slice", "sub")),
    aten.div.Scalar, aten.mul.Scalar, aten.randn.generator, aten.select.int, aten.squeeze.dim, aten.squeeze_.dim,
    aten.to.dtype, aten.transpose.int, aten.unbind.int,
}  # fmt: skip
