"""One random call, held to everything: tests/support/random_calls.py and its tests."""

import math
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import crossvit_kernels
import draws
from inputs import Random
from numerics import DEVICES, FLOAT64, assert_equal_to_reference, like
from rounding import Rounded

AGAIN = 48  # draws of the same shapes that decide where one misses the rule
ZERO = {"grad k_bias": 0.0}  # by mathematics; the kernels return zeros
Results = dict[str, Tensor]


class MismatchError(AssertionError):
    """A kernel's result is not what it has to be."""


def evaluate(
    draw: draws.Draw, kernels: str, wanted: frozenset[str] | None = None, *, dense: bool = False
) -> tuple[Results, int]:
    """ "out" and "grad <input>" of the inputs `wanted` (None: all that are tensors), for a fixed gradient of out; and
    how many calls that were. `kernels` "float64" is the reference in float64 on the inputs rounded to their dtypes,
    "simulated" the reference in the arithmetic of rounding.py."""
    exact, simulated = kernels == "float64", kernels == "simulated"
    device = "cpu" if simulated else DEVICES[draw.backend]
    values = {n: v for n, v in draw.values.items() if isinstance(v, Tensor)}
    wanted = values.keys() if wanted is None else wanted
    leaves = {}
    for name, value in values.items():
        v = value.contiguous() if dense else value
        rounded = v.detach().to(draw.dtype(name)).to(device)
        leaves[name] = like(rounded.double() if exact else rounded, v).requires_grad_(name in wanted)
    asked = [name for name in leaves if name in wanted]
    given: dict[str, Any] = draw.values | leaves | {"kernels": "reference" if exact or simulated else kernels}
    with Rounded() if simulated else nullcontext():
        with (FLOAT64 if exact else draw.precision).context(device):
            out = getattr(crossvit_kernels, draw.op)(**given)
        results = {"out": out.detach().cpu()}
        if wanted:
            grad_out = Random(7).normal(*out.shape).bfloat16().to(out)
            gradients = torch.autograd.grad(out, [leaves[name] for name in asked], grad_out)
            results |= {f"grad {name}": g.cpu() for name, g in zip(asked, gradients)}
    return results, 1 + bool(wanted)


def check(draw: draws.Draw) -> tuple[int, int]:
    """Holds one draw to everything; returns how many calls of the kernels it took, and how many of their results only
    obeyed the rule together with others' (`luck`).

    Raises MismatchError that says which run of them failed, and how.
    """
    kernels = draw.backend
    torch.set_num_threads(draw.threads)
    wanted = None if draw.op != "cls_fusion" else frozenset[str]()
    first, calls = evaluate(draw, kernels, wanted)
    again, more = evaluate(draw, kernels, wanted)
    calls += more
    same_bits("the same call again", again, first)
    bare, more = evaluate(draw, kernels, frozenset())
    calls += more
    same_bits("the call without gradients", bare, {"out": first["out"]})
    laid, more = evaluate(draw, kernels, wanted, dense=True)
    calls += more
    runs = {"the call": first, "dense tensors": laid}
    if wanted is None:
        runs["some gradients only"], more = evaluate(draw, kernels, frozenset(draw.some))
        calls += more
        if kernels == "cpu":  # elsewhere what is kept for one gradient in the inputs' dtype enters another
            partial = runs.pop("some gradients only")
            same_bits("some gradients only", partial, {n: first[n] for n in partial})
    torch.set_num_threads(1)
    reference, _ = evaluate(draw, "simulated", wanted)
    ref64, _ = evaluate(draw, "float64", wanted)
    lucky = 0
    for what, found in runs.items():
        expected = [{name: r[name] for name in found} for r in (reference, ref64)]
        error = misses(found, *expected, draw.precision.ulp)
        if error is not None and (cancelled := left_of_summands(draw, found, ref64)):
            rest = [{n: v for n, v in r.items() if n not in cancelled} for r in (found, *expected)]
            error = misses(*rest, draw.precision.ulp)
        if error is not None:
            if not luck(draw, error):
                raise MismatchError(f"{what}: {error}")
            lucky += 1
    return calls, lucky


def same_bits(what: str, found: Results, expected: Results) -> None:
    """Raises MismatchError where two runs differ in a bit."""
    for name, value in expected.items():
        if found[name].dtype != value.dtype or not torch.equal(found[name], value):
            off = (found[name].double() - value.double()).abs().max().item()
            raise MismatchError(f"{what}: {name} is not the same: {off:.3g} off")


def misses(found: Results, reference: Results, ref64: Results, ulp: float) -> AssertionError | None:
    """How numerics' rule is missed, if it is; where nothing but zero is exact (an empty batch) zero is wanted."""
    nothing = {name for name, exact in ref64.items() if exact.numel() and not exact.any() and name not in ZERO}
    rest = [{n: v for n, v in results.items() if n not in nothing} for results in (found, reference, ref64)]
    try:
        for name in nothing:
            assert not found[name].any(), f"{name}: {found[name].abs().max().item():.3g} where 0 is exact"
        assert_equal_to_reference(*rest, ulp, zero=ZERO)
    except AssertionError as error:
        return error
    return None


def left_of_summands(draw: draws.Draw, found: Results, ref64: Results) -> set[str]:
    """The gradients of which next to nothing is left, that are as near as an ulp or four at the scale of the summands.

    Through a LayerNorm of two elements, which makes 1 and -1 of nearly everything, passes what eps leaves of it alone.
    The summands are the gradient that passes where mean and deviation are constants.
    """
    norm_weight = draw.values.get("norm_weight")
    if draw.op not in ("layer_norm_linear", "cls_cross_attention") or norm_weight.numel() != 2:
        return set()
    with mock.patch.object(F, "layer_norm", _with_constant_statistics):
        summands, _ = evaluate(draw, "float64")
    names = {f"grad {name}" for name in draws.ACTIVATIONS} & found.keys()
    bound = {name: 4 * draw.precision.ulp * summands[name].abs().max().item() for name in names}
    return {name for name in names if (found[name].double() - ref64[name]).abs().max().item() <= bound[name]}


def _with_constant_statistics(x: Tensor, shape: Any, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    variance, mean = torch.var_mean(x.detach(), dim=-1, correction=0, keepdim=True)
    y = (x - mean) * (variance + eps).rsqrt() * weight
    return y if bias is None else y + bias


def luck(draw: draws.Draw, error: AssertionError) -> bool:
    """Whether other values in the same shapes obey the rule, taken together.

    The error of a mean over a few numbers is a matter of luck, the reference's too; so is that of a small difference of
    large numbers. Squares are added up over the draws, and the largest error is the largest of all.
    """
    total: dict[str, list[float]] = {}
    ulp = draw.precision.ulp
    wanted = None if draw.op != "cls_fusion" else frozenset[str]()
    for other in draw.others(AGAIN):
        torch.set_num_threads(draw.threads)
        found, _ = evaluate(other, draw.backend, wanted)
        torch.set_num_threads(1)
        plain, _ = evaluate(other, "simulated", wanted)
        ref64, _ = evaluate(other, "float64", wanted)
        for name in found.keys() - left_of_summands(other, found, ref64):
            exact = ref64[name]
            if name in ZERO or not exact.numel() or not exact.any():
                continue
            scale, most = exact.square().mean().item(), exact.abs().max().item()
            off, plain_off = (r[name].double() - exact for r in (found, plain))
            sums = total.setdefault(name, [0.0] * 4)
            sums[0] += off.square().mean().item() / scale
            sums[1] += plain_off.square().mean().item() / scale
            sums[2] = max(sums[2], off.abs().max().item() / most)
            sums[3] = max(sums[3], plain_off.abs().max().item() / most)
    for square, plain_square, largest, plain_largest in total.values():
        if not math.sqrt(square / AGAIN) <= 2 * math.sqrt(plain_square / AGAIN) + ulp:
            return False
        if not largest <= 4 * plain_largest + 4 * ulp:
            return False
    return "nan" not in str(error) and "dtype" not in str(error) and "where 0 is exact" not in str(error)
