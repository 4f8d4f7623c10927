"""Random calls: some of them here, and that a wrong result, or a process that dies, is found and can be replayed."""

import itertools
import os
import signal
import time
from typing import Any

import pytest
import torch
from torch import Tensor

import crossvit_kernels
import draws
import random_calls
from crossvit_kernels import backends

pytestmark = pytest.mark.skipif(not backends.available("cpu"), reason="there are no C++ kernels")
ALL = tuple(draws.CASES)


@pytest.fixture(autouse=True)
def _threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", draws.CASES)
def test_some(backend: str, name: str) -> None:
    for index in range(2 if draws.slow(backend) else 12):
        calls, _ = random_calls.check(draws.draw(3, index, (name,), backend))
        assert calls >= 3


@pytest.mark.parametrize("name", ["linear_residual", "layer_norm_mlp"])
def test_a_single_row_with_a_factor_per_channel(backend: str, name: str) -> None:
    """A call that few draws make: x of one dimension, of another width than the output."""
    drawn = (draws.draw(0, index, (name,), backend) for index in range(10**6))
    rows = (d for d in drawn if "scale" in d.values and d.values["x"].dim() == 1)
    for draw in itertools.islice(rows, 1 if draws.slow(backend) else 3):
        random_calls.check(draw)


@pytest.mark.parametrize("name", draws.CASES)
def test_an_empty_batch(backend: str, name: str) -> None:
    """What few draws make, of which the yardstick too has to know a result."""
    drawn = (draws.draw(0, index, (name,), backend) for index in range(10**6))
    empty = (d for d in drawn if any(isinstance(v, Tensor) and not v.numel() for v in d.values.values()))
    random_calls.check(next(empty))


def test_every_form_of_every_argument_is_drawn(backend: str) -> None:
    """Ranks, widths, heads, missing biases, factors, epsilons, sizes, batches, memory layouts and mixed dtypes."""
    drawn = [draws.draw(1, index, ALL, backend) for index in range(1500)]
    of = {op: [d for d in drawn if d.op == op] for op in ALL}
    for op in ("layer_norm_linear", "linear_residual", "layer_norm_mlp"):
        assert {d.values["x"].dim() for d in of[op]} == {1, 2, 3, 4, 5}
        assert {1, 2, 3, 17} <= {d.values["x"].shape[-1] for d in of[op]}
        assert {0, 1, 2} <= {d.values["x"].shape[0] for d in of[op]}
    for op in ("linear_residual", "layer_norm_mlp"):
        factors = {(d.values["x"].dim(), d.values["scale"].dim()) for d in of[op] if "scale" in d.values}
        assert {(1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (5, 1), (5, 5)} <= factors
    for op in ("self_attention", "cls_cross_attention", "cls_fusion"):
        widths = [(d.values["num_heads"], d.values.get("qkv", d.values.get("q_weight")).shape[-1]) for d in of[op]]
        assert any(heads in (width, width // 3) for heads, width in widths)
    for op, found in of.items():
        for name in found[0].values:
            if name.endswith(("bias", "b1", "b2")):
                assert {d.values[name] is None for d in found} == {True, False}, (op, name)
            if name == "eps":
                assert {d.values["eps"] for d in found} == {0.0, 1e-6, 1e-5, 1e-3}
        tensors = [v for d in found for v in d.values.values() if isinstance(v, Tensor)]
        assert {t.is_contiguous() for t in tensors} == {True, False}
        assert any(0 in t.stride() for t in tensors if t.numel() > 1)
        assert {d.precision for d in found} == {p for d in drawn for p in [d.precision]}
        wanted = {name for group in draws.WIDE.get(op, ()) for name in group}
        assert {name for d in found for name in d.wide} == wanted
    assert {type(d.values.get("image_size")) for d in of["patch_embed"]} == {type(None), int, tuple}


def test_a_draw_is_the_same_again() -> None:
    first, again, other = (draws.draw(0, index, ALL) for index in (5, 5, 6))
    assert str(first) == str(again) != str(other)
    for name, value in first.values.items():
        assert torch.equal(value, again.values[name]) if isinstance(value, Tensor) else value == again.values[name]
    more = next(first.others(1))
    assert {n: v.shape for n, v in more.values.items() if isinstance(v, Tensor)} == {
        n: v.shape for n, v in first.values.items() if isinstance(v, Tensor)
    }


@pytest.mark.parametrize("fault", ["out", "gradient", "nan", "unsteady"])
def test_a_wrong_kernel_is_found(fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    right, calls = crossvit_kernels.linear_residual, iter(range(10**6))

    def wrong(x: Tensor, *args: Any, kernels: str, **options: Any) -> Tensor:
        if kernels == "cpu" and fault == "gradient":
            return right(x, *args, kernels=kernels, **options) + 0.1 * (x - x.detach()).sum()
        out = right(x, *args, kernels=kernels, **options)
        if kernels == "cpu":
            out = out + {"out": 0.1, "nan": torch.nan, "unsteady": 1e-3 * next(calls)}.get(fault, 0)
        return out

    monkeypatch.setattr(crossvit_kernels, "linear_residual", wrong)
    with pytest.raises(random_calls.MismatchError, match="again" if fault == "unsteady" else "the call: |again: "):
        random_calls.main(["--backend", "cpu", "--only", "1", "--ops", "linear_residual", "--seed", "4"])
    assert "linear_residual((" in capsys.readouterr().out


def test_a_process_that_dies_is_found_and_another_goes_on() -> None:
    worker = random_calls.Worker(0, range(1, 10**6, 2), ALL, "cpu")
    deadline = time.monotonic() + 300
    while worker.now.value < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert worker.crashed() is None
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.join()
    index = worker.crashed()
    assert index is not None
    assert index >= 3
    assert worker.indices[0] == index + 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--calls", "0"], "--calls: expected at least 1, got 0"),
        (["--ops", "x"], "--ops: unknown x, expected of layer"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        random_calls.main(arguments)
    assert message in capsys.readouterr().err
