"""Random calls: some of them here, and that a wrong result, or a process that dies, is found and can be replayed."""

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
@pytest.mark.parametrize("op", draws.CASES)
def test_some(op: str) -> None:
    for index in range(6):
        calls, _ = random_calls.check(draws.draw(3, index, (op,)))
        assert calls >= 3


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
