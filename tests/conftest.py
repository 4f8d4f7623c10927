"""What the tests share: a seeded generator, the backends of this machine, and fresh memory that holds NaN."""

from collections.abc import Iterator

import pytest
import torch

from crossvit_kernels import backends
from inputs import Random

NATIVE = [name for name in backends.BACKENDS if name != "reference" and backends.available(name)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `backend` runs on every backend of this machine but the reference."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", NATIVE)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where only the reference is, leaves out what compares with it; test_backends says so in one skip."""
    if not NATIVE:
        left_out = [item for item in items if "backend" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


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
