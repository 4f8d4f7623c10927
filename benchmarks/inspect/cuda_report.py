"""What nvcc made of the CUDA kernels, for each architecture, read from the library: no GPU needed.

python -m benchmarks.inspect.cuda_report [--kernel NAME] [--architecture sm_90] [--json FILE]

Registers, stack (spilled registers lie there) and static shared memory are the compiler's, instructions are counted in
the disassembly; the dynamic shared memory, which the kernels ask for at their launch, is in
`python -m benchmarks.ops --plan --kernels cuda`.
"""

import argparse
import ctypes
import dataclasses
import functools
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import crossvit_kernels

from .. import timing

LIBRARY = Path(crossvit_kernels.__file__).with_name("_cuda.so")
# Tensor-core instructions: of registers (mma.sync), of shared memory on Hopper (wgmma), on Blackwell (tcgen05).
MATRIX = r"[HIDBQO]G?MMA|UTC\w*MMA"
COUNTED = {"matrix": MATRIX, "async copies": "LDGSTS|UBLKCP|UTMALDG", "ldmatrix": "LDSM", "FMA": "FFMA2?"}
RESERVED = 1024
_TYPES = {"__half": "float16", "__nv_bfloat16": "bfloat16"}


@dataclass(frozen=True)
class Kernel:
    """A kernel's code for an architecture: registers of a thread, bytes of its stack and of static shared memory
    (without the kilobyte of each block that is CUDA's from sm_90 on), and how often the code holds each of COUNTED."""

    name: str
    architecture: str
    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]

    @property
    def matrix(self) -> int:
        """How many tensor-core instructions there are."""
        return self.instructions["matrix"]


def tool(name: str) -> str:
    """cuobjdump or nvdisasm: the toolkit's, or those that Triton carries. FileNotFoundError where neither is there."""
    places = [shutil.which(name)]
    if (triton := importlib.util.find_spec("triton")) is not None and triton.origin is not None:
        places.append(shutil.which(name, path=Path(triton.origin).parent / "backends/nvidia/bin"))
    for place in places:
        if place is not None:
            return place
    raise FileNotFoundError(f"{name} is neither on the PATH nor in the package triton")


@functools.cache
def resources(library: Path) -> dict[tuple[str, str], Kernel]:
    """{(symbol, architecture): a kernel, without its instructions}, of every kernel of a library for every architecture
    that it has code for."""
    found = {}
    for symbol, architecture, line in _usage(library):
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        found[symbol, architecture] = Kernel(
            name=kernel_name(symbol),
            architecture=architecture,
            registers=used["REG"],
            stack=used["STACK"] + used["LOCAL"],
            shared=used["SHARED"] - (RESERVED if int(re.sub(r"\D", "", architecture)) >= 90 else 0),
            instructions={},
        )
    return found


@functools.cache
def kernels(library: Path, architectures: tuple[str, ...] | None = None) -> list[Kernel]:
    """Every kernel of a library, for these architectures or for every one that it has code for, with its instructions.
    To disassemble one architecture takes a quarter of a minute."""
    found = {key: k for key, k in resources(library).items() if architectures is None or key[1] in architectures}
    counted = {}
    with ThreadPoolExecutor(2) as pool:
        for counts in pool.map(functools.partial(_instructions, library), sorted({key[1] for key in found})):
            counted |= counts
    return [dataclasses.replace(kernel, instructions=counted[key]) for key, kernel in sorted(found.items())]


def kernel_name(symbol: str) -> str:
    """A function's name and template arguments, without its namespaces and parameters."""
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    found = demangle(symbol.encode(), None, None, ctypes.byref(status))
    if status.value != 0:
        return symbol
    name = ctypes.string_at(found).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(found))
    return short(name.removeprefix("void ")[: _parameters(name.removeprefix("void "))])


def short(name: str) -> str:
    """A kernel's name as it is printed."""
    name = re.sub(r"crossvit::cuda::|\(anonymous namespace\)::", "", name).replace("> >", ">>")
    return re.sub("|".join(_TYPES), lambda match: _TYPES[match[0]], name)


def _parameters(name: str) -> int:
    """Where a demangled function's list of parameters begins."""
    depth = 0
    for i in reversed(range(len(name))):
        depth += (name[i] == ")") - (name[i] == "(")
        if name[i] == "(" and depth == 0:
            return i
    return len(name)


def _usage(library: Path) -> Iterator[tuple[str, str, str]]:
    """(symbol, architecture, registers and memory) from cuobjdump."""
    architecture = symbol = ""
    for line in _run(tool("cuobjdump"), "-res-usage", str(library)):
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            symbol = found[1]
        elif "REG:" in line and symbol:
            yield symbol, architecture, line
            symbol = ""


def _instructions(library: Path, architecture: str) -> dict[tuple[str, str], dict[str, int]]:
    """How often each of COUNTED is in each function's disassembly, by (symbol, architecture)."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    count = Counter[str]()
    for line in _run(tool("cuobjdump"), "-sass", "-arch", architecture, str(library)):
        if found := re.match(r"\s*Function : (\S+)", line):
            count = counts.setdefault((found[1], architecture), Counter())
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ +)?(\w+)", line):
            count[found[1]] += 1
    return {
        key: {
            name: sum(n for word, n in count.items() if re.fullmatch(pattern, word))
            for name, pattern in COUNTED.items()
        }
        for key, count in counts.items()
    }


def _run(*command: str) -> Iterator[str]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def main(arguments: Sequence[str] | None = None) -> None:
    """The report as a table, and as JSON where that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--library", type=Path, default=LIBRARY, help="what to read")
    parser.add_argument("--kernel", default="", help="only kernels whose name holds this")
    parser.add_argument("--architecture", default="", help="only this one, such as sm_90")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args(arguments)
    if not options.library.is_file():
        record = crossvit_kernels.backends.reason("cuda") if options.library == LIBRARY else None
        parser.error(f"{options.library} does not exist" + (f": {record}" if record else ""))
    names = sorted({name for _, name in resources(options.library) if name.startswith(options.architecture)})
    found = [kernel for kernel in kernels(options.library, tuple(names)) if options.kernel in kernel.name]
    headings = ["kernel", "architecture", "registers", "stack", "static shared", *COUNTED]
    rows = [
        [k.name, k.architecture, k.registers, k.stack, k.shared, *k.instructions.values()]
        for k in sorted(found, key=lambda k: (k.name, int(re.sub(r"\D", "", k.architecture))))
    ]
    widths = [max(len(str(row[i])) for row in [headings, *rows]) for i in range(len(headings))]
    for row in [headings, *rows]:
        cells = [str(c).ljust(w) if i < 2 else str(c).rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        print("  ".join(cells))
    spilling = [f"{k.name} ({k.architecture})" for k in found if k.stack]
    print(
        f"{len(found)} kernels; with a stack, to which registers may have been spilled: {', '.join(spilling) or 'none'}"
    )
    if options.json is not None:
        timing.write_json(options.json, [dataclasses.asdict(k) for k in found])


if __name__ == "__main__":
    main()
