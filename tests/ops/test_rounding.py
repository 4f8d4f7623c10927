"""The reference in simulated arithmetic: its formulas are the reference's, its bits no machine's."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import crossvit_kernels
import inputs
from inputs import EXAMPLES, Random
from numerics import (
    AUTOCAST,
    BFLOAT16,
    DRAWS,
    FLOAT16,
    FLOAT32,
    PRECISIONS,
    Draw,
    Precision,
    errors,
    evaluate,
    exact,
    judge,
    nearby,
    simulated,
)
from rounding import Rounded, chained

# What chooses other code in MKL, oneDNN and ATen, and other partial sums in OpenMP; ignored where a CPU lacks it.
MACHINES = [
    {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "3"},
    {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "OMP_NUM_THREADS": "1"},
]


def bits() -> str:
    """A digest of everything that the simulation makes of the examples, in float32 and in 16 bits."""
    digest = hashlib.sha256()
    for name, make in EXAMPLES.items():
        op, given = getattr(crossvit_kernels, name), make()
        for precision in (FLOAT32, BFLOAT16, AUTOCAST):
            found = simulated(op, given, precision, gradients=name != "cls_fusion")
            for key, value in sorted(found.items()):
                digest.update(f"{name} {precision} {key}".encode())
                digest.update(value.float().contiguous().numpy().tobytes())
    wide = inputs.layer_norm_linear(Random(), 3, 17, 384, out=96)
    for value in simulated(crossvit_kernels.layer_norm_linear, wide, FLOAT32).values():
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m["ATEN_CPU_CAPABILITY"])
def test_the_bits_are_the_same_on_other_machines(machine: dict[str, str]) -> None:
    here = Path(__file__).parent
    environment = os.environ | machine | {"PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    command = [sys.executable, "-c", "import test_rounding; print(test_rounding.bits())"]
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.split()[-1] == bits()


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_formulas_are_the_references(name: str, precision: Precision) -> None:
    """The simulation and PyTorch round differently, by about as much, around the same numbers, in the same dtypes."""
    op, given, gradients = getattr(crossvit_kernels, name), EXAMPLES[name](), name != "cls_fusion"
    found = simulated(op, given, precision, gradients=gradients)
    plain = evaluate(op, given, precision, "reference", gradients=gradients)
    ref64 = exact(op, given, precision, gradients=gradients)
    assert found.keys() == plain.keys() == ref64.keys()
    for key, value in ref64.items():
        assert (found[key].dtype, found[key].shape) == (plain[key].dtype, plain[key].shape), key
        if key != "grad k_bias":  # zero by mathematics
            assert errors(found[key], value)[0] < 32 * precision.ulp, key


@pytest.mark.parametrize("stride, padding", [((4, 4), (0, 0)), ((2, 2), (1, 1)), ((2, 3), (3, 0))], ids=str)
def test_convolutions_with_windows_that_meet(stride: tuple[int, int], padding: tuple[int, int]) -> None:
    rng = Random()
    leaves = [t.requires_grad_() for t in (rng.normal(2, 3, 12, 16), rng.normal(5, 3, 4, 4), rng.normal(5))]

    def results(*leaves: Tensor) -> list[Tensor]:
        out = torch.nn.functional.conv2d(*leaves, stride=stride, padding=padding)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    with Rounded():
        found = results(*leaves)
    for value, expected in zip(found, results(*(t.detach().double().requires_grad_() for t in leaves))):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("terms", [0, 1, 2, 63, 64, 65, 1152, 5000])
def test_sums_are_made_of_short_chains(terms: int) -> None:
    """To the bit: the chains one after the other, and each of them term by term."""
    x = Random().normal(terms)
    expected, chain = x, 64
    while len(expected) > 1:
        chains = -(-len(expected) // chain)
        sums = []
        for c in range(chains):
            total = torch.zeros(())
            for i, term in enumerate(expected[c::chains]):
                total = term if i == 0 else total + term
            sums.append(total)
        expected = torch.stack(sums)
    assert torch.equal(chained(x, chain), expected[0] if terms else torch.zeros(()))
    ones = torch.ones(terms, 1)
    with Rounded(chain):
        total, product = x.sum(), x[None] @ ones
    assert torch.equal(total, chained(x, chain))
    assert torch.equal(product[0, 0], chained(x, chain))


def test_an_operation_without_a_rule_is_named() -> None:
    x = torch.ones(3)
    with Rounded(), pytest.raises(NotImplementedError, match=r"aten\.cumsum\.default has no rule"):
        x.cumsum(0)


def test_draws_beside_the_inputs_keep_what_is_special_about_them() -> None:
    given: dict[str, Any] = inputs.layer_norm_linear(Random(), 6, 5, 16, out=12, kind="constant tokens")
    given["x"][4] = 0
    given["weight"] = inputs.arrange(given["weight"], "every other element")
    given["bias"] = torch.ones(()).expand(12)
    for precision in (FLOAT32, FLOAT16, BFLOAT16):
        other = nearby(given, precision, 3)
        for name, value in given.items():
            assert (other[name].shape, other[name].stride()) == (value.shape, value.stride()), name
            spread = 17 * precision.ulp
            assert ((other[name] - value).abs() <= spread * value.abs()).all(), name
            assert not torch.equal(other[name], value), name
        assert torch.equal(other["x"].amax(-1) == other["x"].amin(-1), given["x"].amax(-1) == given["x"].amin(-1))
        assert not other["x"][4].any()
        again = nearby(given, precision, 3)
        assert all(torch.equal(other[name], again[name]) for name in given)
    assert nearby(given, FLOAT32, 0) is given


def test_luck_in_few_numbers_is_told_from_a_fault() -> None:
    """Errors of one number, drawn like the reference's: some draw is four times the other, but not all of them."""
    rng = torch.Generator().manual_seed(0)

    def draws(scale: float) -> Any:
        noise = torch.randn(100, 2, generator=rng, dtype=torch.float64) * 1e-5
        one = {"out": torch.ones(1, dtype=torch.float64)}
        return lambda i: Draw({"out": one["out"] + scale * noise[i, 0]}, ({"out": one["out"] + noise[i, 1]},), one)

    def found(scale: float, numbers: tuple[int, ...]) -> int:
        """In how many of three hundred cases."""
        count = 0
        for _ in range(300):
            try:
                judge(draws(scale), FLOAT32.ulp, draws=numbers)
            except AssertionError:
                count += 1
        return count

    assert found(1.0, (1,)) > 60
    assert found(1.0, DRAWS) == 0
    assert found(8.0, DRAWS) > 240  # by the other draws, but where the first one is near zero by luck


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_fails(value: float) -> None:
    ref64 = {"out": torch.ones(5, dtype=torch.float64)}
    wrong = {"out": torch.tensor([1.0, 1.0, value, 1.0, 1.0])}
    with pytest.raises(AssertionError, match="of their bounds"):
        judge(lambda _: Draw(wrong, ({"out": torch.ones(5)},), ref64), FLOAT32.ulp)


def test_where_only_zero_is_exact_nothing_else_will_do() -> None:
    ref64, zeros = {"out": torch.zeros(5, dtype=torch.float64)}, {"out": torch.zeros(5)}
    judge(lambda _: Draw(zeros, (zeros,), ref64), FLOAT32.ulp)
    with pytest.raises(AssertionError, match="of their bounds"):
        judge(lambda _: Draw({"out": torch.full((5,), 1e-30)}, (zeros,), ref64), FLOAT32.ulp)
