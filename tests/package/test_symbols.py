"""What the libraries of kernels ask of others: PyTorch's stable C interface, C, C++ and OpenMP, nothing of Python or of
PyTorch's C++, so that one build serves every Python and every PyTorch."""

from pathlib import Path

import pytest

import crossvit_kernels
import elf
import symbols

PACKAGE = Path(crossvit_kernels.__file__).parent
LIBRARIES = [path for name in ("_cpu.so", "_cuda.so", "_emulation.so") if (path := PACKAGE / name).exists()]

if not LIBRARIES:
    pytest.skip("no library of kernels was built", allow_module_level=True)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_only_the_stable_c_interface_is_asked_for(library: Path) -> None:
    asked = elf.undefined(library)
    assert any(symbols.TORCH.fullmatch(symbol.name) for symbol in asked)
    assert not symbols.strange(asked)


# The emulation runs where it was built.
@pytest.mark.parametrize("library", [p for p in LIBRARIES if p.stem != "_emulation"], ids=lambda path: path.name)
def test_nothing_newer_than_manylinux_2_28_is_asked_for(library: Path) -> None:
    assert not symbols.newer(elf.undefined(library))


def test_a_symbol_of_python_is_found() -> None:
    """The inspection module, which is Python's, does not pass."""
    (module, *_) = [*PACKAGE.glob("_C.*.so"), None]
    if module is None:
        pytest.skip("the inspection module was not built")
    assert any(symbol.name.startswith("Py") for symbol in symbols.strange(elf.undefined(module)))
