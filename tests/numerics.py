"""What "equal" means: a kernel's error against float64 is held to the error of the reference in the kernel's own dtype.

For an op's output and for every gradient, with ref64 the reference in float64 on the same (rounded) inputs,

    rms error(kernel) <= 2 rms error(reference) + 1 ulp                     both over the rms of ref64
    max error(kernel) <= 4 max error(reference) + 4 ulp at max|ref64|

where an ulp is one of the compute dtype. NaN fails; infinities and NaN that the inputs bring must come out where the
reference has them.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crossvit_kernels import backends


@dataclass(frozen=True)
class Precision:
    """The dtype of the inputs and, under autocast, another one of the matrix operands."""

    name: str
    inputs: torch.dtype
    autocast: torch.dtype | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def ulp(self) -> float:
        """The distance from 1 to the next number of the compute dtype."""
        return torch.finfo(self.autocast or self.inputs).eps

    def context(self, device: str) -> Any:
        """The context that the op is called in."""
        return nullcontext() if self.autocast is None else torch.autocast(device, self.autocast)


FLOAT32 = Precision("float32", torch.float32)
BFLOAT16 = Precision("bfloat16", torch.bfloat16)
AUTOCAST = Precision("autocast bfloat16", torch.float32, torch.bfloat16)
FLOAT16 = Precision("float16", torch.float16)
AUTOCAST16 = Precision("autocast float16", torch.float32, torch.float16)
FLOAT64 = Precision("float64", torch.float64)
PRECISIONS = (FLOAT32, BFLOAT16, AUTOCAST, FLOAT16, AUTOCAST16)

# Where a backend is tested: the first type of device that it takes here.
DEVICES = {name: backends.devices(name)[0] for name in backends.BACKENDS if name != "reference"}


def place(inputs: dict[str, Any], backend: str) -> dict[str, Any]:
    """`inputs` on the device where `backend` is tested."""
    device = DEVICES[backend]
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in inputs.items()}


def like(value: Tensor, layout: Tensor) -> Tensor:
    """`value` in the strides of `layout`, with NaN in the gaps that these leave."""
    if not value.numel():
        return value.clone()
    for d, stride in enumerate(layout.stride()):
        if stride == 0:
            value = value.narrow(d, 0, 1)
    size = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, layout.stride()))
    storage = value.new_full((size,), math.nan)
    return storage.as_strided(value.shape, layout.stride()).copy_(value).expand(layout.shape)


def evaluate(
    op: Callable[..., Tensor],
    inputs: dict[str, Any],
    precision: Precision,
    kernels: str,
    *,
    gradients: bool = True,
    device: str | None = None,
) -> dict[str, Tensor]:
    """The op's output "out" and its gradients "grad <input>", for a fixed random gradient (bfloat16 numbers) of out;
    all on the CPU, computed on `device`, by default where `kernels` is tested."""
    device = device or DEVICES.get(kernels, "cpu")
    values = {
        name: like(v.detach().to(device, precision.inputs), v).requires_grad_(gradients) if isinstance(v, Tensor) else v
        for name, v in inputs.items()
    }
    with precision.context(device):
        out = op(**values, kernels=kernels)
    result = {"out": out.detach()}
    if gradients:
        leaves = {name: v for name, v in values.items() if isinstance(v, Tensor)}
        grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).bfloat16().to(out)
        result |= {f"grad {name}": g for name, g in zip(leaves, torch.autograd.grad(out, leaves.values(), grad_out))}
    return {name: value.cpu() for name, value in result.items()}


def errors(value: Tensor, ref64: Tensor) -> tuple[float, float]:
    """(rms error over the rms of ref64, largest error)."""
    difference = value.double() - ref64
    rms = difference.square().mean().sqrt() / ref64.square().mean().sqrt()
    return rms.item(), difference.abs().max().item()


def ulp_at(value: float, ulp: float) -> float:
    """The distance between neighbouring numbers at this magnitude, where `ulp` is the one at 1."""
    return ulp * 2.0 ** math.floor(math.log2(value)) if value > 0 else 0.0


def assert_equal_to_reference(
    kernel: dict[str, Tensor],
    reference: dict[str, Tensor],
    ref64: dict[str, Tensor],
    ulp: float,
    *,
    zero: dict[str, float] | None = None,
) -> None:
    """Every tensor of `kernel` obeys the rule above.

    `zero` names those that are zero by mathematics, with the scale of their summands: they are held to one ulp there.
    """
    failures = []
    assert kernel.keys() == reference.keys() == ref64.keys()
    for name, exact in ref64.items():
        value, plain = kernel[name], reference[name]
        assert value.dtype == plain.dtype, f"{name}: {value.dtype} where the reference has {plain.dtype}"
        assert value.shape == plain.shape, f"{name}: {tuple(value.shape)} where the reference has {tuple(plain.shape)}"
        if exact.numel() == 0:
            continue
        if zero is not None and name in zero:
            largest = value.abs().max().item()
            if not largest <= ulp * zero[name]:
                failures.append(f"{name}: {largest:.3g} where 0 is exact, bound {ulp * zero[name]:.3g}")
            continue
        (rms, largest), (plain_rms, plain_largest) = errors(value, exact), errors(plain, exact)
        rms_bound = 2 * plain_rms + ulp
        max_bound = 4 * plain_largest + 4 * ulp_at(exact.abs().max().item(), ulp)
        if not rms <= rms_bound:
            failures.append(f"{name}: rms error {rms:.3g}, bound {rms_bound:.3g} (reference {plain_rms:.3g})")
        if not largest <= max_bound:
            failures.append(f"{name}: max error {largest:.3g}, bound {max_bound:.3g} (reference {plain_largest:.3g})")
    assert not failures, "\n".join(["", *failures])


def assert_same_nonfinite(kernel: dict[str, Tensor], reference: dict[str, Tensor], *, exact: str = "out") -> None:
    """Elements are finite in `kernel` exactly where they are in `reference`; in `exact` NaN, +inf, -inf agree.

    Elsewhere a sum of infinities may come in another order, which is inf here and NaN there.
    """
    assert any(not t.isfinite().all() for t in reference.values())
    for name, plain in reference.items():
        kinds = (torch.isfinite, torch.isnan, torch.isposinf, torch.isneginf) if name == exact else (torch.isfinite,)
        for kind in kinds:
            found, expected = kind(kernel[name]), kind(plain)
            assert torch.equal(found, expected), (
                f"{name}: {kind.__name__} at {int(found.sum())} elements, in the reference at {int(expected.sum())}, "
                f"of which {int((found & expected).sum())} in common"
            )


def check(
    op: Callable[..., Tensor],
    inputs: dict[str, Any],
    precision: Precision,
    backend: str,
    *,
    gradients: bool = True,
    zero: dict[str, float] | None = None,
) -> None:
    """`op` on `backend` equals its reference, forward and every gradient."""

    rounded = {n: like(v.to(precision.inputs), v) if isinstance(v, Tensor) else v for n, v in inputs.items()}
    device = DEVICES[backend]
    kernel = evaluate(op, inputs, precision, backend, gradients=gradients, device=device)
    reference = evaluate(op, inputs, precision, "reference", gradients=gradients, device=device)
    ref64 = evaluate(op, rounded, FLOAT64, "reference", gradients=gradients, device=device)
    assert_equal_to_reference(kernel, reference, ref64, precision.ulp, zero=zero)
