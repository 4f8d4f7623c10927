"""What "equal" means: a kernel's error against float64 is held to the error of the reference in the kernel's own dtype.

For an op's output and for every gradient, with ref64 the reference in float64 on the same (rounded) inputs,

    rms error(kernel) <= 2 rms error(reference) + 1 ulp                     both over the rms of ref64
    max error(kernel) <= 4 max error(reference) + 4 ulp at max|ref64|

where an ulp is one of the compute dtype, and error(reference) is computed, not what PyTorch happens to make on the CPU
at hand: the error of the reference's formula in the arithmetic of rounding.py. Where a result comes nearer to its bound
than NEAR, several draws beside the inputs decide (`nearby`), their squares added up. docs/numerics.md says why. NaN
fails; infinities and NaN that the inputs bring must come out where the reference has them.
"""

import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossvit_kernels import backends
from inputs import Random
from rounding import Rounded

NEAR = 0.75  # of its bound: from there on one draw alone is no proof
DRAWS = (1, 12, 48)  # how many are looked at together, one number after the other until all are further away
SPREAD = 16  # ulps by which a row of an input is scaled, up or down, in another draw

Results = dict[str, Tensor]


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
        grad_out = Random(7).normal(*out.shape).bfloat16().to(out)
        result |= {f"grad {name}": g for name, g in zip(leaves, torch.autograd.grad(out, leaves.values(), grad_out))}
    return {name: value.cpu() for name, value in result.items()}


def simulated(
    op: Callable[..., Tensor], inputs: dict[str, Any], precision: Precision, *, gradients: bool = True
) -> Results:
    """What `evaluate` finds for the reference in the arithmetic of rounding.py: the same bits on every machine."""
    with Rounded():
        return evaluate(op, inputs, precision, "reference", gradients=gradients, device="cpu")


def exact(
    op: Callable[..., Tensor], inputs: dict[str, Any], precision: Precision, *, gradients: bool = True
) -> Results:
    """What `evaluate` finds for the reference in float64, on the inputs as `precision` rounds them."""
    rounded = {n: like(v.to(precision.inputs), v) if isinstance(v, Tensor) else v for n, v in inputs.items()}
    return evaluate(op, rounded, FLOAT64, "reference", gradients=gradients, device="cpu")


def nearby(inputs: dict[str, Any], precision: Precision, number: int) -> dict[str, Any]:
    """Draw `number` beside the inputs: every row (along the last dimension) times a factor next to 1 of its own.

    The op is as well or badly conditioned there, equal numbers in a row stay equal, and every rounding falls another
    way. Draw 0 is the inputs themselves.
    """
    if number == 0:
        return inputs
    rng, spread = torch.Generator().manual_seed(number), SPREAD * precision.ulp
    found = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            rows = (*value.shape[:-1], 1) if value.dim() else ()
            factors = 1 + spread * (2 * torch.rand(rows, generator=rng, dtype=torch.float64) - 1)
            found[name] = like((value.cpu().double() * factors).to(value), value)
    return found


class Draw(NamedTuple):
    """A kernel's results on some inputs, those of references (the larger error counts), and those of float64."""

    kernel: Results
    references: tuple[Results, ...]
    ref64: Results


class Errors(NamedTuple):
    """Of one tensor: rms errors over the rms of ref64, and largest errors in ulps at max|ref64|."""

    rms: float
    reference_rms: float
    largest: float
    reference_largest: float


def errors(value: Tensor, ref64: Tensor) -> tuple[float, float]:
    """(rms error over the rms of ref64, largest error); where ref64 is nothing but zeros, 0 or infinity."""
    difference = value.double() - ref64
    if not ref64.any():
        return (math.inf, math.inf) if not torch.equal(value.double(), ref64) else (0.0, 0.0)
    rms = difference.square().mean().sqrt() / ref64.square().mean().sqrt()
    return rms.item(), difference.abs().max().item()


def ulp_at(value: float, ulp: float) -> float:
    """The distance between neighbouring numbers at this magnitude, where `ulp` is the one at 1."""
    return ulp * 2.0 ** math.floor(math.log2(value)) if value > 0 else 0.0


def measure(draw: Draw, name: str, ulp: float) -> Errors:
    exact = draw.ref64[name]
    rms, largest = errors(draw.kernel[name], exact)
    own = [errors(reference[name], exact) for reference in draw.references]
    unit = ulp_at(exact.abs().max().item(), ulp) or 1.0
    return Errors(rms, max(rms for rms, _ in own), largest / unit, max(largest for _, largest in own) / unit)


def ratios(measured: list[Errors], ulp: float) -> tuple[float, float]:
    """Of one tensor over several draws: (rms error, max error), each over its bound."""
    rms, reference_rms = (
        math.sqrt(sum(getattr(e, f) ** 2 for e in measured) / len(measured)) for f in Errors._fields[:2]
    )
    largest, reference_largest = (max(getattr(e, field) for e in measured) for field in Errors._fields[2:])
    return rms / (2 * reference_rms + ulp), largest / (4 * reference_largest + 4)


def judge(
    draw: Callable[[int], Draw], ulp: float, *, zero: dict[str, float] | None = None, draws: tuple[int, ...] = DRAWS
) -> dict[str, float]:
    """Every tensor's larger ratio of error to bound; raises AssertionError where one is over 1.

    `draw` makes the draw of a number, 0 those as given; as long as one is NEAR, as many as `draws` says next are taken
    together. `zero` names what is zero by mathematics, with the scale of its summands: it is held to one ulp there.
    """
    first = draw(0)
    failures, found = [], {}
    measured: dict[str, list[Errors]] = {}
    assert all(results.keys() == first.ref64.keys() for results in (first.kernel, *first.references))
    for name, exact in first.ref64.items():
        value, plain = first.kernel[name], first.references[-1][name]
        assert value.dtype == plain.dtype, f"{name}: {value.dtype} where the reference has {plain.dtype}"
        assert value.shape == plain.shape, f"{name}: {tuple(value.shape)} where the reference has {tuple(plain.shape)}"
        if exact.numel() == 0:
            continue
        if zero is not None and name in zero:
            largest = value.abs().max().item()
            if not largest <= ulp * zero[name]:
                failures.append(f"{name}: {largest:.3g} where 0 is exact, bound {ulp * zero[name]:.3g}")
            continue
        measured[name] = [measure(first, name, ulp)]
    made = 1
    for count in draws:
        for number in range(made, count):
            other = draw(number)
            for name, errors in measured.items():
                errors.append(measure(other, name, ulp))
        made = count
        largest = max((max(ratios(errors, ulp)) for errors in measured.values()), default=0.0)
        if largest <= NEAR or not math.isfinite(sum(sum(errors[0]) for errors in measured.values())):
            break
    for name, errors in measured.items():
        rms, largest = ratios(errors, ulp)
        found[name] = max(rms, largest) if rms == rms else rms
        if not (rms <= 1 and largest <= 1):
            failures.append(
                f"{name}: rms error {rms:.3g} and max error {largest:.3g} of their bounds, over {len(errors)} draws; "
                f"the first: {errors[0]}"
            )
    assert not failures, "\n".join(["", *failures])
    return found


def assert_equal_to_reference(
    kernel: Results, reference: Results, ref64: Results, ulp: float, *, zero: dict[str, float] | None = None
) -> dict[str, float]:
    """Every tensor of `kernel` obeys the rule, by this one draw."""
    return judge(lambda _: Draw(kernel, (reference,), ref64), ulp, zero=zero, draws=(1,))


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
) -> dict[str, float]:
    """`op` on `backend` equals its reference, forward and every gradient: each tensor's ratio of error to bound.

    On a GPU PyTorch's own error there counts too: whether its products are TF32's is a setting.
    """
    device = DEVICES.get(backend, "cpu")

    def draw(number: int) -> Draw:
        given = nearby(inputs, precision, number)
        references = [simulated(op, given, precision, gradients=gradients)]
        if device != "cpu":
            references.append(evaluate(op, given, precision, "reference", gradients=gradients, device=device))
        kernel = evaluate(op, given, precision, backend, gradients=gradients, device=device)
        return Draw(kernel, tuple(references), exact(op, given, precision, gradients=gradients))

    found = judge(draw, precision.ulp, zero=zero)
    record(op, backend, precision, found)
    return found


# One entry for each tensor of each `check`, for machines.py: (the test, op, backend, precision, tensor, ratio).
RATIOS: list[tuple[str, str, str, str, str, float]] = []


def record(op: Callable[..., Tensor], backend: str, precision: Precision, found: dict[str, float]) -> None:
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    RATIOS.extend((test, op.__name__, backend, precision.name, name, ratio) for name, ratio in found.items())
