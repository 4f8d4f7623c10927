"""What the libraries of kernels ask of others: PyTorch's stable C interface, C, C++ and OpenMP, nothing of Python or of
PyTorch's C++, so that one build serves every Python and every PyTorch."""

import re
from pathlib import Path

import pytest

import crossvit_kernels
import elf

PACKAGE = Path(crossvit_kernels.__file__).parent
LIBRARIES = [path for name in ("_cpu.so", "_cuda.so", "_emulation.so") if (path := PACKAGE / name).exists()]
# The C interface of PyTorch 2.11; what came later may be used where it is there.
TORCH = re.compile(r"aoti_torch_\w+|torch_(?!exception_)\w+")
LATER = {"torch_exception_get_what_without_backtrace"}
OPENMP = re.compile(r"GOMP_\w+|omp_\w+")
# Symbols that come with the C and C++ runtimes under a version.
RUNTIMES = re.compile(r"(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")
# Those that compilers leave behind, which nobody has to define.
LEFT_BEHIND = re.compile(r"_ITM_\w+|__gmon_start__|_ZTH\w+")
# manylinux_2_28, for which PyTorch's own wheels are built.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8,)}
SANITIZERS = re.compile(r"__(asan|ubsan|tsan|lsan|sanitizer)_\w+")

if not LIBRARIES:
    pytest.skip("no library of kernels was built", allow_module_level=True)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_only_the_stable_c_interface_is_asked_for(library: Path) -> None:
    symbols = elf.undefined(library)
    assert any(TORCH.fullmatch(symbol.name) for symbol in symbols)
    strange = [
        symbol
        for symbol in symbols
        if not (
            TORCH.fullmatch(symbol.name)
            or OPENMP.fullmatch(symbol.name)
            or RUNTIMES.fullmatch(symbol.version)
            or SANITIZERS.fullmatch(symbol.name)
            or (symbol.weak and (symbol.name in LATER or LEFT_BEHIND.fullmatch(symbol.name)))
        )
    ]
    assert not strange


# The emulation runs where it was built.
@pytest.mark.parametrize("library", [p for p in LIBRARIES if p.stem != "_emulation"], ids=lambda path: path.name)
def test_nothing_newer_than_manylinux_2_28_is_asked_for(library: Path) -> None:
    newer = []
    for symbol in elf.undefined(library):
        family, _, number = symbol.version.partition("_")
        if family in NEWEST and tuple(map(int, number.split("."))) > NEWEST[family]:
            newer.append(symbol)
    assert not newer


def test_a_symbol_of_python_is_found() -> None:
    """The inspection module, which is Python's, does not pass."""
    (module, *_) = [*PACKAGE.glob("_C.*.so"), None]
    if module is None:
        pytest.skip("the inspection module was not built")
    names = {symbol.name for symbol in elf.undefined(module)}
    assert "PyModule_Create2" in names or any(name.startswith("Py") for name in names)
