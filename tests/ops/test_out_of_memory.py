"""What C++ raises where a GPU's memory is full reaches Python as PyTorch's own error for it, by which programs look for
the batch that fits."""

from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from crossvit_kernels.dispatch import native
from crossvit_kernels.dispatch.torch_internals import Schema


def kernel(monkeypatch: pytest.MonkeyPatch, backend: str, said: str) -> Any:
    """A native op that says this and fails."""

    def fails(*args: Any) -> NoReturn:
        raise RuntimeError(said)

    op = SimpleNamespace(some_op=SimpleNamespace(default=fails))
    ops = SimpleNamespace(crossvit_kernels_cuda=op, crossvit_kernels_cpu=op)
    monkeypatch.setattr(native.torch, "ops", ops)
    monkeypatch.setattr(native, "schema_of", lambda found: Schema([("x", True)], True))
    return native.native_kernel(backend, "some_op", ["x"], [])


def test_a_full_gpu_is_pytorchs_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "CUDA out of memory. Tried to allocate 2.00 GiB."
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 2\.00 GiB"):
        kernel(monkeypatch, "cuda", said)(torch.ones(1))


@pytest.mark.parametrize(
    "where, said", [("cuda", "x: expected float32, got float64"), ("cpu", "not enough memory: out of memory")]
)
def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch, where: str, said: str) -> None:
    with pytest.raises(RuntimeError, match=said) as found:
        kernel(monkeypatch, where, said)(torch.ones(1))
    assert type(found.value) is RuntimeError
