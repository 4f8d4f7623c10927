"""How pytest-benchmark runs this folder: `pytest benchmarks --benchmark-only`, beside what it runs with on its own."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import pytest
import torch

from . import floor, timing
from .devices import PLACES, use, why_not
from .session import DTYPES

WARM_UP_SECONDS = 0.05
ROUND_SECONDS = 0.004  # a round is as many calls as fill this, at least one
SECONDS = 0.25  # as many rounds as fill this, within ROUNDS
ROUNDS = (9, 60)


class Timed(Protocol):
    """What the fixture `timed` gives: it times a call that was checked before, within a group of the table."""

    def __call__(self, run: Callable[[], object], group: str, **facts: Any) -> None: ...


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Has --benchmark-only time although pytest's settings disable benchmarks, which they do for the tests."""
    if config.getoption("benchmark_only", False):
        config.option.benchmark_enable = True


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Adds what the JSON files of the other benchmarks say of the machine."""
    facts = {"device": timing.device_name(), "threads": torch.get_num_threads(), "versions": timing.versions()}
    machine_info.update(facts)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The device and the kernels of a key of PLACES; skipped, with the reason, where they have no times here. Takes the
    test's parameter `dtype` into account."""
    device, kernels = PLACES[request.param]
    dtype = DTYPES[request.getfixturevalue("dtype")]
    if (why := why_not(device, kernels, dtype) or emulated(device, kernels, dtype)) is not None:
        pytest.skip(why)
    use(device)
    return device, kernels


def emulated(device: str, kernels: str, dtype: torch.dtype) -> str | None:
    """Why the reference has no times on this CPU, or None: PyTorch multiplies bfloat16 by loops where oneDNN does not,
    and a call takes seconds."""
    if (device, kernels, dtype) != ("cpu", "reference", torch.bfloat16):
        return None
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if supported is None or supported():
        return None
    return "PyTorch's products of bfloat16 take seconds on this CPU, which has no AVX-512"


@pytest.fixture
def timed(benchmark: Any, place: tuple[str, str]) -> Timed:
    """Times a call by the benchmark fixture; on a GPU each call waits until its work is done."""
    device, kernels = place

    def time(run: Callable[[], object], group: str, **facts: Any) -> None:
        gflop = float(f"{floor.executed_flops(run) / 1e9:.4g}")
        machine = {"machine": use(device).facts()["device"], "threads": torch.get_num_threads()}
        benchmark.group = f"{group}, {device}"
        benchmark.extra_info |= {"backend": kernels, "gflop": gflop, **machine, **facts}
        call = run if device == "cpu" else waiting(run)
        if not benchmark.enabled:
            benchmark(call)
            return
        seconds = timing.warm_up(call, WARM_UP_SECONDS)
        calls = max(1, math.ceil(ROUND_SECONDS / seconds))
        rounds = min(max(ROUNDS[0], int(SECONDS / (seconds * calls))), ROUNDS[1])
        benchmark.pedantic(call, rounds=rounds, iterations=calls)

    return time


def waiting(run: Callable[[], object]) -> Callable[[], None]:
    """The same call, until the GPU has done its work."""

    def call() -> None:
        run()
        torch.cuda.synchronize()

    return call
