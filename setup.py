"""Builds the extension module ``crossvit_kernels._C`` and the CUDA kernels; the rest is in pyproject.toml.

``csrc/*.cpp`` and ``csrc/cpu/*.cpp`` see torch and are compiled once, together, for the baseline CPU.
``csrc/cpu/isa.cpp`` sees no torch header and is compiled once per instruction set that the compiler knows, each time
into an object of its own; which one runs is chosen at run time. Beside the module go the CUDA kernels
(``csrc/build_cuda.py``) and ``_build.json``: what was built, against which torch, or why it was not.

Environment: ``CXX`` the compiler, ``MAX_JOBS`` the number of compilations at once, ``CROSSVIT_KERNELS_SANITIZE`` a
value for ``-fsanitize=``, and those of ``csrc/build_cuda.py``.
"""

import fcntl
import functools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools

HOW_TO_INSTALL = "type: pip install 'torch>=2.11' 'setuptools>=77' wheel ninja && pip install --no-build-isolation ."
if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(
        f"crossvit-kernels is built by setuptools 77 or newer, and this is {setuptools.__version__}: {HOW_TO_INSTALL}"
    )
try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    sys.exit(f"crossvit-kernels is built with the torch it will run on, not in isolation from it: {HOW_TO_INSTALL}")
if torch.__version__ < "2.11":
    sys.exit(f"crossvit-kernels needs torch 2.11 or newer, and this is {torch.__version__}: {HOW_TO_INSTALL}")

# Where ninja lies in a virtual environment that is used without being activated.
os.environ["PATH"] += os.pathsep + os.path.dirname(sys.executable)

CSRC = Path("csrc")
ISA_SOURCE = CSRC / "cpu" / "isa.cpp"
sys.path.insert(0, str(CSRC))
import build_cuda  # noqa: E402

INCLUDE_DIRS = [str(CSRC.resolve())]  # absolute, since ninja runs elsewhere
SANITIZE = os.environ.get("CROSSVIT_KERNELS_SANITIZE", "")

# Compiler flags and, to see whether the compiler knows the set, an expression that needs it. Ascending, because of an
# inline function that several sets emit the linker keeps the first: the one that every CPU which gets there can run.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mavx2"]
INSTRUCTION_SETS = {
    "generic": ([], "0"),
    "avx2": (
        ["-mavx2", "-mfma", "-mf16c"],
        "_mm256_fmadd_ps(_mm256_cvtph_ps(_mm_setzero_si128()), __m256(), __m256())",
    ),
    "avx512": (AVX512, "_mm512_fmadd_ps(__m512(), __m512(), __m512())"),
    "avx512_bf16": ([*AVX512, "-mavx512bf16"], "_mm512_cvtneps_pbh(__m512())"),
}

COMMON_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra", "-g0"]
if SANITIZE:
    COMMON_FLAGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
# What sees torch allocates and calls kernels: optimising it more only costs the compiler time.
TORCH_FLAGS = [*COMMON_FLAGS, "-O1"]
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
    """The compiler's command line, as torch's BuildExtension will call it."""
    command = get_cxx_compiler()
    return shlex.split(command) if isinstance(command, str) else list(command)


def compiles(source: str, flags: list[str]) -> bool:
    """Whether the compiler turns this source into an object."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source)
        command = [*cxx(), "-std=c++20", *flags, "-c", str(path), "-o", str(path.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def missing() -> str | None:
    """What keeps the extension from being compiled, in words, or None."""
    if shutil.which(cxx()[0]) is None:
        return f"no C++ compiler: {cxx()[0]!r} is not on the PATH (install g++, or name one in the variable CXX)"
    # clang's OpenMP calls are not those of libgomp, which torch loads.
    if not compiles("#include <concepts>\n#if __GNUC__ < 12 || defined(__clang__)\n#error\n#endif", []):
        return f"the C++ compiler {shlex.join(cxx())!r} will not do: g++ 12 or newer is needed"
    include = sysconfig.get_path("include")
    if not compiles("#include <Python.h>\nint main() {}", [f"-I{include}"]):
        return f"Python.h is not in {include} (Debian: apt-get install python3-dev)"
    return None


def known_instruction_sets() -> list[str]:
    """The instruction sets that the compiler can compile for, ascending; not on an x86-64: the generic one alone."""
    probe = "#if {0}\n#include <immintrin.h>\n#endif\nint main() {{ (void)({1}); }}"
    return [
        n for n, (flags, needs) in INSTRUCTION_SETS.items() if compiles(probe.format(int(bool(flags)), needs), flags)
    ]


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Whoever reads ``path`` meanwhile sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.chmod(mode)
    os.replace(temporary, path)


class BuildKernels(BuildExtension):
    """torch's BuildExtension, with ``isa.cpp`` compiled once per instruction set and a ``_build.json`` at the end."""

    def run(self) -> None:
        # A folder for each torch (newer headers may carry older dates), also where pip would take a temporary one.
        name = f"{sysconfig.get_config_var('SOABI')}-torch-{torch.__version__}"
        self.build_temp = os.path.join("build", name + (f"-{SANITIZE.replace(',', '-')}" if SANITIZE else ""))
        os.makedirs(self.build_temp, exist_ok=True)
        with open(os.path.join(self.build_temp, "lock"), "w") as lock:  # two builds of one checkout take turns
            fcntl.flock(lock, fcntl.LOCK_EX)
            super().run()

    def build_extensions(self) -> None:
        (extension,) = self.extensions
        reason = missing()
        module = Path(self.build_lib, self.get_ext_filename(extension.name))
        cuda = build_cuda.Build(cxx(), reason, TORCH_FLAGS, SANITIZE, Path(self.build_temp), module.parent)
        workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        with ThreadPoolExecutor(workers) as self.pool:
            self.start_cuda = functools.partial(cuda.start, self.pool, workers)
            if reason is None:
                try:
                    super().build_extensions()
                except Exception as error:  # ninja's, distutils' and torch's failures share no class
                    reason = f"the C++ sources did not compile on {platform.machine()} ({error})"
            if not cuda.started:
                self.start_cuda()
        if reason is not None:
            if "build_ext" in self.distribution.commands:  # the extension was asked for by name, not as part of a whole
                sys.exit(f"crossvit-kernels: {reason}")
            module.unlink(missing_ok=True)
            print(f"crossvit-kernels: without C++ kernels, it will run on the reference: {reason}", file=sys.stderr)
        record = {
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "abi": sysconfig.get_config_var("SOABI"),
            "compiler": None if reason else self.compiler_version,
            "instruction_sets": [] if reason else self.instruction_sets,
            "sanitize": SANITIZE,
            "missing": reason,
            **cuda.finish(),
        }
        module.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(module.with_name("_build.json"), (json.dumps(record, indent=2) + "\n").encode())

    def build_extension(self, ext) -> None:
        self.instruction_sets = known_instruction_sets()
        version = subprocess.run([*cxx(), "--version"], capture_output=True, text=True, check=False)
        self.compiler_version = version.stdout.partition("\n")[0]

        def compile_for(name: str) -> str:
            flags = [*COMMON_FLAGS, *ISA_FLAGS, *INSTRUCTION_SETS[name][0], f"-DCROSSVIT_ISA={name}"]
            folder = os.path.join(self.build_temp, name)
            (compiled,) = self.compiler.compile(
                [str(ISA_SOURCE)],
                output_dir=folder,
                include_dirs=INCLUDE_DIRS,
                extra_postargs={"cxx": flags},
                depends=ext.depends,
            )
            return compiled

        # The widest set takes longest. The CUDA kernels come behind, beside which the rest is compiled.
        jobs = {n: self.pool.submit(compile_for, n) for n in reversed(self.instruction_sets) if self.use_ninja}
        self.start_cuda()
        ext.extra_objects = [jobs[n].result() if n in jobs else compile_for(n) for n in self.instruction_sets]
        ext.sources = [str(build_cuda.together(map(Path, ext.sources), Path(self.build_temp, "cpu.cpp")))]
        ext.extra_compile_args["cxx"] += [f"-DCROSSVIT_HAVE_{name.upper()}" for name in self.instruction_sets]
        super().build_extension(ext)

    def copy_extensions_to_source(self) -> None:
        (extension,) = self.extensions
        module = Path(self.build_lib, self.get_ext_filename(extension.name))
        here = Path("crossvit_kernels")
        for name in (module.name, build_cuda.CUDA_LIBRARY, build_cuda.EMULATION_LIBRARY):
            built = module.with_name(name)
            if built.exists():
                write_atomically(here / name, built.read_bytes(), 0o755)
            else:
                (here / name).unlink(missing_ok=True)
        write_atomically(here / "_build.json", module.with_name("_build.json").read_bytes())

    def get_source_files(self) -> list[str]:
        """For sdist, what is compiled beyond the extension's own sources."""
        folders = (build_cuda.SOURCES, build_cuda.EMULATION)
        others = [str(path) for folder in folders for path in sorted(folder.rglob("*.*")) if path.suffix != ".pyc"]
        return sorted({*super().get_source_files(), str(CSRC / "build_cuda.py"), *others})


extension = CppExtension(
    "crossvit_kernels._C",
    [
        str(CSRC / "bindings.cpp"),
        str(CSRC / "views.cpp"),
        *(str(path) for path in sorted(CSRC.glob("cpu/*.cpp")) if path != ISA_SOURCE),
    ],
    depends=[str(path) for path in (*sorted(CSRC.rglob("*.h")), *sorted(CSRC.glob("**/*.cpp")))],
    # -fopenmp when compiling only: linked without libgomp, its calls go to the one that torch loaded: one thread pool.
    extra_compile_args={"cxx": [*TORCH_FLAGS, "-fopenmp"]},
    extra_link_args=[f"-fsanitize={SANITIZE}"] if SANITIZE else [],
    optional=True,
)
# As system headers, torch's raise no warnings here.
extension.extra_compile_args["cxx"] += [f"-isystem{folder}" for folder in extension.include_dirs]
extension.include_dirs = INCLUDE_DIRS

setuptools.setup(ext_modules=[extension], cmdclass={"build_ext": BuildKernels})
