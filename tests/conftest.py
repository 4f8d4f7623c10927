"""What the tests share: a seeded generator, the backends of this machine, and fresh memory that holds NaN.

tests/support/available.py says how the backends run here, tests/support/selection.py which cases a run leaves out.
"""

import gc
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before torch loads OpenMP, which reads both once. A waiting thread of one test process leaves its core to another, and
# several test processes share the cores, as the processes that they start do.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
SHARE_CORES = WORKERS > 1 and "OMP_NUM_THREADS" not in os.environ
if SHARE_CORES:
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // WORKERS))

import pytest
import torch

import available
from available import NATIVE
from inputs import Random
from numerics import RATIOS
from selection import MARKERS, LeftOut


def pytest_configure(config: pytest.Config) -> None:
    """Registers the markers, and the plugin that leaves cases out."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as behind a shell's &: what tests start is to hear Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    config.pluginmanager.register(LeftOut())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `backend` runs on every backend of this machine but the reference; every test over as many
    seeds as CROSSVIT_TESTS_SEEDS says, one by default."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", NATIVE)
    if (seeds := int(os.environ.get("CROSSVIT_TESTS_SEEDS", "1"))) > 1:
        metafunc.parametrize("_seed", range(seeds), indirect=True)


def pytest_sessionfinish() -> None:
    """Writes down how near every result came to its bound, where CROSSVIT_TESTS_RATIOS names a file for it."""
    if path := os.environ.get("CROSSVIT_TESTS_RATIOS"):
        Path(f"{path}.part").write_text(json.dumps(RATIOS))
        os.replace(f"{path}.part", path)


def pytest_collection_finish() -> None:
    """What the collected tests and the imports hold stays: the garbage collector need not look through it each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One module compiles for minutes: behind all others it would keep one of two processes waiting."""
    items.sort(key=lambda item: item.module.__name__ != "test_triton_compiled")


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Has the CPU's kernels share out their work among two threads at least, however few this process is left with."""
    threads = torch.get_num_threads()
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    on_cpu = "cpu" in (parameters.get("backend"), parameters.get("kernels"))
    if SHARE_CORES and (on_cpu or request.node.get_closest_marker("several_threads")):
        torch.set_num_threads(max(2, threads))
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Moves the seeds of all that a test draws, where it runs over several."""
    Random.shift = getattr(request, "param", 0)
    yield
    Random.shift = 0


@pytest.fixture
def rng() -> Random:
    """A generator, seeded anew for every test."""
    return Random()


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialised holds NaN, so that an element no kernel writes is seen."""
    with available.empty_memory_filled_with_nan():
        yield
