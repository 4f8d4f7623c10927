"""How setup.py builds the CPU's kernels; imported by it, by path.

_cpu.so            csrc/*.cpp, csrc/torch_c/*.cpp and csrc/cpu/*.cpp, compiled once, together, for the baseline CPU,
                   and csrc/cpu/isa.cpp, which sees no torch header, once for each instruction set that the
                   compiler knows; a plain library, loaded with torch.ops.load_library
_C.<Python's>.so   csrc/inspection/*.cpp: what tests ask about the kernels; in a source tree, where pybind11 is
"""

import os
import shlex
import shutil
import sysconfig
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import target
from building import (
    COMMON_FLAGS,
    TORCH_FLAGS,
    NotBuiltError,
    compiler_version,
    compiles,
    make,
    together,
    write_atomically,
    written,
)

SOURCES = Path("csrc")
ISA_SOURCE = SOURCES / "cpu" / "isa.cpp"
CHOICE_SOURCE = SOURCES / "cpu" / "instruction_sets.cpp"
LIBRARY = "_cpu.so"
INSPECTION = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")

# By machine, beside the generic set: compiler flags and, to see whether the compiler knows the set, an expression that
# needs it. Ascending, because of an inline function that several sets emit the linker keeps the first: the one that
# every CPU which gets there can run. On an aarch64 the generic set is NEON, which all of them have.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mavx2"]
INSTRUCTION_SETS: dict[str, dict[str, tuple[list[str], str]]] = {
    target.X86_64: {
        "avx2": (
            ["-mavx2", "-mfma", "-mf16c"],
            "_mm256_fmadd_ps(_mm256_cvtph_ps(_mm_setzero_si128()), __m256(), __m256())",
        ),
        "avx512": (AVX512, "_mm512_fmadd_ps(__m512(), __m512(), __m512())"),
        "avx512_bf16": ([*AVX512, "-mavx512bf16"], "_mm512_cvtneps_pbh(__m512())"),
    },
    target.AARCH64: {
        "neon_bf16": (
            ["-march=armv8.2-a+bf16"],
            "vbfdotq_f32(float32x4_t(), vdupq_n_bf16(bfloat16_t()), vdupq_n_bf16(bfloat16_t()))",
        ),
    },
}
INTRINSICS = {target.X86_64: "immintrin.h", target.AARCH64: "arm_neon.h"}
# Functions start at a cache line: at the 16 bytes that are the compiler's choice, the same product took up to 7 %
# longer in one build than in the next. GCC 12 warns of its own intrinsics headers.
ISA_FLAGS = [
    "-falign-functions=64",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]


def cxx() -> list[str]:
    """The compiler's command line."""
    return shlex.split(os.environ.get("CXX") or "c++")


def instruction_sets(machine: str) -> dict[str, tuple[list[str], str]]:
    """The instruction sets of a machine, ascending, each with its flags and what needs it."""
    return {"generic": ([], "0"), **INSTRUCTION_SETS.get(machine, {})}


def sanitizer_flags(sanitize: str) -> list[str]:
    """What a value of -fsanitize= adds to every compilation."""
    if not sanitize:
        return []
    return [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]


class Compiler:
    """The C++ compiler of CXX. `folder` keeps what was asked of it, for the next build."""

    def __init__(self, folder: Path) -> None:
        self.command, self.folder = cxx(), folder
        self.version = compiler_version(self.command)

    def missing(self) -> str | None:
        """What keeps C++ from being compiled, in words, or None."""
        if shutil.which(self.command[0]) is None:
            name = self.command[0]
            return f"no C++ compiler: {name!r} is not on the PATH (install g++, or name one in the variable CXX)"
        if not self._knows("concepts", "#include <concepts>\n#if __GNUC__ < 12 || defined(__clang__)\n#error\n#endif"):
            return f"the C++ compiler {shlex.join(self.command)!r} will not do: g++ 12 or newer is needed"
        return target.wrong_compiler(self.command)

    def instruction_sets(self) -> list[str]:
        """Those of the machine that is built for which it can compile for, ascending."""
        machine, known = target.machine(), []
        for name, (flags, needs) in instruction_sets(machine).items():
            include = f"#include <{INTRINSICS[machine]}>\n" if flags else ""
            if self._knows(name, f"{include}int main() {{ (void)({needs}); }}", flags):
                known.append(name)
        return known

    def inspection_missing(self) -> str | None:
        """What keeps the inspection module from being compiled, in words, or None."""
        try:
            import pybind11  # noqa: F401
        except ModuleNotFoundError:
            return "pybind11 is not installed"
        include = sysconfig.get_path("include")
        if not self._knows("python", "#include <Python.h>\nint main() {}", [f"-I{include}"]):
            return f"Python.h is not in {include} (Debian: apt-get install python3-dev)"
        return None

    def _knows(self, name: str, source: str, flags: Sequence[str] = ()) -> bool:
        command = [*self.command, "-std=c++20", *flags]
        return compiles(written(self.folder / f"{name}.cpp", source), command, self.version)


class Build:
    """The jobs of the CPU's library on a pool of threads; `finish` waits for them.

    folder    for objects, `package` for the libraries
    inspect   whether the inspection module is wanted
    """

    def __init__(self, sanitize: str, folder: Path, package: Path, inspect: bool) -> None:
        self.folder, self.package, self.inspect = folder / "cpu", package, inspect
        self.flags = [*COMMON_FLAGS, *sanitizer_flags(sanitize)]
        self.link_flags = [f"-fsanitize={sanitize}"] if sanitize else []
        self.compiler = Compiler(self.folder / "probes")
        self.reason = self.compiler.missing()
        self.instruction_sets = [] if self.reason else self.compiler.instruction_sets()
        self.have = [f"-DCROSSVIT_HAVE_{name.upper()}" for name in self.instruction_sets]
        self.sources = [
            *(path for folder in (SOURCES, SOURCES / "torch_c") for path in sorted(folder.glob("*.cpp"))),
            *(path for path in sorted(SOURCES.glob("cpu/*.cpp")) if path not in (ISA_SOURCE, CHOICE_SOURCE)),
        ]

    def start(self, pool: ThreadPoolExecutor) -> None:
        """Hands every job to the pool. The widest set takes longest."""
        if self.reason is not None:
            return
        self.sets: list[Future] = [pool.submit(self._instruction_set, n) for n in reversed(self.instruction_sets)][::-1]
        host = together(self.sources, self.folder / "host.cpp")
        self.choice = pool.submit(self._compile, CHOICE_SOURCE, self.have)
        self.host = pool.submit(self._compile, host, TORCH_FLAGS)

    def finish(self) -> dict[str, Any]:
        """Links what was compiled; the entries of _build.json."""
        inspection: str | None = "only a build in the source tree has it"
        if self.reason is None:
            try:
                kernels = [self.choice.result(), *(job.result() for job in self.sets)]
                # Not linked to an OpenMP library: PyTorch's threads run the kernels.
                libraries = target.torch_libraries(cxx(), self.folder / "torch")
                self._link(LIBRARY, [self.host.result(), *kernels], libraries)
                if self.inspect:
                    inspection = self._inspection(kernels)
            except NotBuiltError as why:
                self.reason = str(why)
        for name, why in ((LIBRARY, self.reason), (INSPECTION, self.reason or inspection)):
            if why is not None:
                (self.package / name).unlink(missing_ok=True)
        return {
            "compiler": None if self.reason else self.compiler.version,
            "instruction_sets": [] if self.reason else self.instruction_sets,
            "missing": self.reason,
            "inspection": {"missing": self.reason or inspection},
        }

    def _compile(self, source: Path, flags: list[str], name: str = "") -> Path:
        output = self.folder / f"{name or source.stem}.o"
        command = [*self.compiler.command, *self.flags, *flags, f"-I{SOURCES}", "-c", str(source)]
        return make(output, command, self.compiler.version)

    def _instruction_set(self, name: str) -> Path:
        flags = [*ISA_FLAGS, *instruction_sets(target.machine())[name][0], f"-DCROSSVIT_ISA={name}"]
        return self._compile(ISA_SOURCE, flags, name)

    def _link(self, name: str, objects: list[Path], libraries: list[str]) -> None:
        command = [*self.compiler.command, "-shared", *self.link_flags, *map(str, objects), *libraries]
        built = make(self.folder / name, command, self.compiler.version, inputs=objects)
        self.package.mkdir(parents=True, exist_ok=True)
        write_atomically(self.package / name, built.read_bytes(), 0o755)

    def _inspection(self, kernels: list[Path]) -> str | None:
        """Builds the module beside the library, or says why not."""
        if (why := self.compiler.inspection_missing()) is not None:
            return why
        import pybind11

        includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
        sources = [self._compile(path, includes) for path in sorted(SOURCES.glob("inspection/*.cpp"))]
        self._link(INSPECTION, [*sources, *kernels], [])
        return None
