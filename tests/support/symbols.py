"""What the kernels' libraries may ask of others: PyTorch's stable C interface, C, C++ and OpenMP, of manylinux_2_28."""

import re
from collections.abc import Iterable

from elf import Symbol

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


def strange(symbols: Iterable[Symbol]) -> list[Symbol]:
    """Those that are none of what a library may ask for: of Python, say, or of PyTorch's C++."""
    return [
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


def newer(symbols: Iterable[Symbol]) -> list[Symbol]:
    """Those that manylinux_2_28 does not have yet."""
    found = []
    for symbol in symbols:
        family, _, number = symbol.version.partition("_")
        if family in NEWEST and tuple(map(int, number.split("."))) > NEWEST[family]:
            found.append(symbol)
    return found


def newest(symbols: Iterable[Symbol], family: str) -> str:
    """The newest version that is asked for of a family, such as GLIBC; empty where none is."""
    versions = {s.version for s in symbols if s.version.startswith(f"{family}_")}
    return max(versions, key=lambda v: tuple(map(int, v.partition("_")[2].split("."))), default="")
