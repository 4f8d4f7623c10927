"""What the tests share: a seeded generator, the backends of this machine, and fresh memory that holds NaN.

Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors; with one, on it.
"""

import os
from collections.abc import Iterator

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from crossvit_kernels import backends
from crossvit_kernels.ops._registry import OPS
from inputs import Random
from numerics import AUTOCAST, AUTOCAST16, FLOAT16

# What the interpreter cannot show: it runs one kernel at a time, and holds its state in the module.
COMPILED_ONLY = ("test_calls_from_several_threads_do_not_meet",)
# float16 is run through the interpreter, where bfloat16 is not to be had; a GPU compiles its kernels as bfloat16's.
INTERPRETED = (FLOAT16, AUTOCAST16)
# Over these lists Triton does without autocast: interpreting, or compiling for each width and dtype, takes seconds.
LISTS = {"shape", "kind", "where", "value"}
NATIVE = [name for name in backends.BACKENDS if name != "reference" and backends.available(name)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `backend` runs on every backend of this machine but the reference."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", NATIVE)


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
        elif backend is not None and precision is not None and not _computes(backend, precision):
            if backend == "cpu":
                left_out.append(item)
            else:
                item.add_marker("gpu")
        elif backend == "triton" and not GPU and item.originalname in COMPILED_ONLY:
            item.add_marker("gpu")
        elif backend in ("triton", "cuda") and GPU:
            item.add_marker("gpu")
            if precision in INTERPRETED or (precision == AUTOCAST and parameters.keys() & LISTS):
                left_out.append(item)
        elif backend == "triton" and precision == AUTOCAST16 and parameters.keys() & LISTS:
            left_out.append(item)
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    config.hook.pytest_deselected(items=left_out)
    gone = set(left_out)
    items[:] = [item for item in items if item not in gone]


def _computes(backend: str, precision: object) -> bool:
    """Whether the backend's own kernels compute in this precision here."""
    return (precision.autocast or precision.inputs) in backends.dtypes(backend)


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
