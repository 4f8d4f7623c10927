"""What the tests share: a seeded generator, the backends of this machine, and fresh memory that holds NaN.

Without a GPU the Triton kernels run in Triton's interpreter and the CUDA kernels in the emulation, on CPU tensors; with
one, on it.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
    os.environ.setdefault("CROSSVIT_KERNELS_EMULATE", "1")

from crossvit_kernels import backends
from crossvit_kernels.dispatch.register import OPS
from inputs import Random
from numerics import AUTOCAST, AUTOCAST16, BFLOAT16, FLOAT16, FLOAT32, PRECISIONS, RATIOS

# What the interpreter cannot show: it runs one kernel at a time, and holds its state in the module.
COMPILED_ONLY = ("test_calls_from_several_threads_do_not_meet",)
# What is no different for a GPU's kernels, and slow without one.
NOT_INTERPRETED = ("test_compile_with_inductor_and_a_dynamic_batch",)
# float16 is run through the interpreter, where bfloat16 is not to be had; a GPU compiles its kernels as bfloat16's.
INTERPRETED = (FLOAT16, AUTOCAST16)
# Over these lists Triton does without autocast: interpreting, or compiling for each width and dtype, takes seconds.
LISTS = {"shape", "kind", "where", "value"}
# Without a GPU a test over several cases runs each in one of these precisions: over the lists, and over other cases.
TURNS = {
    "triton": ((FLOAT32, FLOAT16), (FLOAT32, FLOAT16, AUTOCAST16)),
    "cuda": ((FLOAT32, BFLOAT16, FLOAT16, AUTOCAST), PRECISIONS),
}
# And of these tests' variants one in so many runs: every op, change, kind and factor is still met.
EVERY = {
    "test_opcheck": 2,
    "test_compile_of_the_whole_graph": 2,
    "test_activations_and_kinds_of_tokens": 2,
    "test_kinds_of_tokens": 2,
    "test_nonfinite_values_come_out_where_the_reference_has_them": 2,
    "test_the_weights_of_now_are_used": 6,
    "test_scale_and_kinds_of_tokens": 3,
}
LARGE = 4_000_000  # of the product of a case's sizes: from here in float16 alone, from five times that not at all
# Resizes and shapes that take the interpreter many seconds each, where others show the same.
SLOW = {
    *((60, 60), (28, 28), (240, 240), (1, 1)),
    *((1, 240, 240, 12, 32), (1, 224, 224, 16, 32)),
    *((1, 196, 384, 6), (9, 64, 224, 7), (1, 40, 768, 12), (5, 30, 448, 7)),
    *((2, 768), (5, 448)),
}
NATIVE = [name for name in backends.BACKENDS if name != "reference" and backends.available(name)]


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what needs a GPU, and leaves out what would compare the reference with itself: all, where only the
    reference is (test_backends says so in one skip), and ops and dtypes that a backend hands to the reference."""
    left_out = []
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        backend, precision = parameters.get("backend"), parameters.get("precision")
        op = parameters.get("name", item.module.__name__.removeprefix("test_"))
        if ("backend" in getattr(item, "fixturenames", ()) and not NATIVE) or (
            backend is not None and op in OPS and not backends.serves(backend, op)
        ):
            left_out.append(item)
        elif backend is not None and precision is not None and not computes(backend, precision):
            if backend == "cpu":
                left_out.append(item)
            else:
                item.add_marker("gpu")
        elif backend == "triton" and not GPU and item.originalname in COMPILED_ONLY:
            item.add_marker("gpu")
        elif backend in ("triton", "cuda") and GPU:
            item.add_marker("gpu")
            # nvcc has compiled every dtype beforehand; Triton would now, for seconds each.
            if backend == "triton" and (
                precision in INTERPRETED or (precision == AUTOCAST and parameters.keys() & LISTS)
            ):
                left_out.append(item)
        elif not _has_its_turn(item):
            left_out.append(item)
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    config.hook.pytest_deselected(items=left_out)
    gone = set(left_out)
    items[:] = [item for item in items if item not in gone]
    # One test of it compiles for minutes: behind all others it would keep one of the two processes waiting.
    items.sort(key=lambda item: item.module.__name__ != "test_triton_compiled")


def interpreted(backend: str) -> bool:
    """Whether the backend runs here without the GPU that it is for, which is slow: in Triton's interpreter or the
    emulation."""
    return backend in TURNS and not GPU


def _has_its_turn(item: pytest.Item) -> bool:
    """Whether this case runs without a GPU: of a test over several cases each in one precision, which takes turns,
    so that every precision is met, in a fraction of the time. Other backends, and a GPU, run them all."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    backend = parameters.get("backend", parameters.get("kernels"))
    if not interpreted(backend) or (backend == "cuda" and os.environ.get("CROSSVIT_TESTS_ALL")):
        return True
    if item.originalname in NOT_INTERPRETED:
        return False
    if backend == "triton" and parameters.get("size", parameters.get("shape")) in SLOW:
        return False
    steps = []
    for mark in item.iter_markers("parametrize"):
        names = [name.strip() for name in mark.args[0].split(",")]
        if names[0] not in ("kernels", "precision"):
            here = [parameters[name] for name in names]
            cases = [list(case) if len(names) > 1 else [case] for case in mark.args[1]]
            steps.append(cases.index(here))
    if not steps:
        return True
    every = 4 if parameters.get("image_size") == (24, 40) else EVERY.get(item.originalname, 1)
    turn, left = divmod(sum(steps), every if len(steps) > 1 else 1)
    if left or "precision" not in parameters:
        return not left
    cost = math.prod(parameters.get("shape", ())) * parameters.get("out", parameters.get("hidden", 0))
    if backend == "triton" and cost > LARGE:
        return parameters["precision"] == FLOAT16 and cost < 5 * LARGE
    turns = TURNS[backend][0 if parameters.keys() & LISTS else 1]
    return parameters["precision"] == turns[turn % len(turns)]


def computes(backend: str, precision: object) -> bool:
    """Whether the backend's own kernels compute in this precision here."""
    return (precision.autocast or precision.inputs) in backends.dtypes(backend)


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
    assert torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
