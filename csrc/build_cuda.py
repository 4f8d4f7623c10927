"""How setup.py builds the CUDA kernels; imported by it, by path.

Two plain libraries, loaded with torch.ops.load_library and each whole in itself:

    _cuda.so        csrc/*.cpp, csrc/torch_c/*.cpp and csrc/cuda/*.cpp by the C++ compiler, csrc/cuda/*.cu by nvcc, and
                    CUDA's runtime: for any Python and any PyTorch from 2.11 on that was built for CUDA
    _emulation.so   the same objects of *.cpp; *.cu as C++ over the headers of tests/cuda_emulation; its runtime

Environment: ``CROSSVIT_KERNELS_CUDA`` 0 leaves _cuda.so out, 1 makes its absence an error; ``TORCH_CUDA_ARCH_LIST``
what it is compiled for, as torch's extensions take it ("8.0;9.0+PTX"); ``CUDA_HOME`` where nvcc is, if not on the PATH.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import old_glibc
import target
import torch
from building import (
    TORCH,
    TORCH_FLAGS,
    TORCH_LIBRARIES,
    NotBuiltError,
    compiler_version,
    make,
    together,
    write_atomically,
)

SOURCES = Path("csrc", "cuda")
EMULATION = Path("tests", "cuda_emulation")
CUDA_LIBRARY, EMULATION_LIBRARY = "_cuda.so", "_emulation.so"

# Code for these, and PTX of the last for what comes after it.
ARCHITECTURES = "8.0;9.0;10.0+PTX"
USUAL_PLACE = "/usr/local/cuda/bin"
OLDEST = 80
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# These take longest, so they begin first: nothing else is left for the other cores at the end.
LONGEST = ["linear", "patch_embed", "layer_norm_linear", "cls_fusion"]
# Kernels keep their visibility, by which the emulation finds their names.
EMULATION_FLAGS = ["-O1", "-std=c++20", "-fPIC", "-g0"]


def architectures(text: str) -> list[str]:
    """What TORCH_CUDA_ARCH_LIST asks for, in nvcc's names, ascending: sm_90 is code, compute_90 PTX. What is older than
    the kernels need is left out."""
    found = []
    for entry in re.split(r"[;\s]+", text.strip("; \t\n")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise NotBuiltError(f"TORCH_CUDA_ARCH_LIST: expected entries like 8.0, 9.0a or 10.0+PTX, got {entry!r}")
        major, minor, suffix, ptx = match.groups()
        if int(major + minor) >= OLDEST:
            found += [f"sm_{major}{minor}{suffix}", *([f"compute_{major}{minor}{suffix}"] if ptx else [])]
    if not found:
        raise NotBuiltError(f"TORCH_CUDA_ARCH_LIST={text!r} names nothing from 8.0 on, which the kernels need")
    return sorted(set(found), key=lambda name: (name.startswith("compute"), int(re.sub(r"\D", "", name)), name))


def gencode(names: Iterable[str]) -> list[str]:
    """nvcc's flags for what `architectures` gave."""
    return [f"-gencode=arch=compute_{name.partition('_')[2]},code={name}" for name in names]


def shared_gencode(names: Sequence[str]) -> list[str]:
    """nvcc's flags for a source that is the same for every architecture: code for all of them is made of the oldest's
    PTX, which saves the compiler's longer half; of its own PTX code for sm_100 spills registers."""
    code = [name for name in names if re.fullmatch(r"sm_\d+", name)]
    return [
        *([f"-gencode=arch=compute_{OLDEST},code=[{','.join(code)}]"] if code else []),
        *gencode(name for name in names if name not in code),
    ]


def tells_architectures_apart(source: Path, folder: Path = Path("csrc")) -> bool:
    """Whether a CUDA source, or a header of ours that it includes, asks what it is compiled for."""
    text = source.read_text()
    headers = [folder / name for name in re.findall(r'#include ["<](cuda/[^">]+)[">]', text)]
    return "__CUDA_ARCH__" in text or any(tells_architectures_apart(header, folder) for header in headers)


def find_nvcc() -> str:
    """nvcc of CUDA_HOME, of the PATH, or of where CUDA installs itself."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [*(os.path.join(home, "bin") for home in homes if home), os.environ.get("PATH", ""), USUAL_PLACE]
    for place in places:
        if (found := shutil.which("nvcc", path=place)) is not None:
            return found
    raise NotBuiltError("nvcc was not found (install CUDA's compiler, or name its folder in CUDA_HOME)")


def nvcc_version(nvcc: str) -> str:
    """Such as 13.0.88."""
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"\bV(\d+\.\d+\.\d+)", told.stdout)
    if told.returncode or match is None:
        raise NotBuiltError(f"{nvcc} --version fails: {told.stderr.strip() or told.stdout.strip()}")
    return match[1]


# Device and stream come from there.
CUDA_LIBRARIES = ["-ltorch_cuda"] if (TORCH / "lib" / "libtorch_cuda.so").exists() else []


class Build:
    """The jobs of both libraries on one pool of threads; `finish` waits for them.

    cxx       the C++ compiler's command line, None where there is none, with the reason in `lacking`
    flags     with which C++ is compiled; `sanitize` is -fsanitize's value
    folder    for objects, `package` for the libraries
    emulate   whether the emulation is wanted, which is for tests
    """

    def __init__(
        self,
        cxx: list[str],
        lacking: str | None,
        flags: list[str],
        sanitize: str,
        folder: Path,
        package: Path,
        emulate: bool = True,
    ) -> None:
        self.cxx, self.lacking, self.sanitize = cxx, lacking, sanitize
        self.cxx_version = compiler_version(cxx)
        self.folder, self.package = folder / "cuda", package
        self.flags = [*flags, "-fPIC", "-Icsrc", *TORCH_FLAGS]
        self.kernels = sorted(SOURCES.glob("*.cu"), key=lambda path: (path.stem not in LONGEST, path.stem))
        self.sources = sorted(p for f in ("", "torch_c", "cuda") for p in Path("csrc", f).glob("*.cpp"))
        self.cuda: dict[str, Any] = {"nvcc": None, "architectures": [], "missing": None}
        self.emulation: dict[str, Any] = {"missing": None}
        self.emulate = emulate
        self.started = False
        self.asked = os.environ.get("CROSSVIT_KERNELS_CUDA", "")
        if self.asked not in ("", "0", "1"):
            sys.exit(f"crossvit-kernels: the variable CROSSVIT_KERNELS_CUDA: expected 0 or 1, got {self.asked!r}")

    def start(self, pool: ThreadPoolExecutor, workers: int) -> None:
        """Hands every job to the pool."""
        self.started, self.workers = True, workers
        self.host: list[Future] = []
        self.device: list[Future] = []
        self.emulated: list[Future] = []
        try:
            self._cuda_possible()
        except NotBuiltError as why:
            self.cuda["missing"] = str(why)
        if self.lacking is not None:
            self.emulation["missing"] = self.lacking
        elif not self.emulate:
            self.emulation["missing"] = "only a build in the source tree has it"
        elif not EMULATION.is_dir():
            self.emulation["missing"] = f"{EMULATION} is not in the source tree"
        with_cuda, with_emulation = (record["missing"] is None for record in (self.cuda, self.emulation))
        if with_cuda or with_emulation:
            self.host = [pool.submit(self._by_cxx, together(self.sources, self.folder / "host.cpp"))]
        if with_cuda:
            self.device = [pool.submit(self._by_nvcc, path) for path in self.kernels]
        if with_emulation:
            runtime = sorted(EMULATION.glob("*.cpp"))
            self.emulated = [pool.submit(self._emulated, path) for path in (*self.kernels, *runtime)]

    def finish(self) -> dict[str, Any]:
        """Links what was compiled; the entries of _build.json."""
        for record, jobs, name, link in (
            (self.cuda, self.device, CUDA_LIBRARY, self._link_cuda),
            (self.emulation, self.emulated, EMULATION_LIBRARY, self._link_emulation),
        ):
            library = self.package / name
            if record["missing"] is None:
                try:
                    objects = [job.result() for job in (*jobs, *self.host)]
                    data = link(self.folder / name, objects).read_bytes()
                    self.package.mkdir(parents=True, exist_ok=True)
                    write_atomically(library, data, 0o755)
                except NotBuiltError as why:
                    record["missing"] = str(why)
            if record["missing"] is not None:
                library.unlink(missing_ok=True)
                wanted = self.asked != "0" and (record is self.cuda or self.emulate)
                if wanted and not self.sanitize:
                    print(f"crossvit-kernels: without {name}: {record['missing']}", file=sys.stderr)
        if self.cuda["missing"] is not None:
            self.cuda["architectures"] = []
            if self.asked == "1":
                sys.exit(f"crossvit-kernels: CROSSVIT_KERNELS_CUDA=1, but {self.cuda['missing']}")
        return {"cuda": self.cuda, "emulation": self.emulation}

    def _cuda_possible(self) -> None:
        if self.asked == "0":
            raise NotBuiltError("CROSSVIT_KERNELS_CUDA=0 left it out")
        if target.cross():
            raise NotBuiltError("CUDA kernels are not built for another machine than this one")
        if self.sanitize:
            raise NotBuiltError("sanitizers look at the emulation")
        if torch.version.cuda is None:
            raise NotBuiltError("this torch was built without CUDA")
        self.nvcc = find_nvcc()
        self.cuda["nvcc"] = version = nvcc_version(self.nvcc)
        # The driver that a torch of one CUDA asks for also runs what an older CUDA made, and no newer one.
        if int(version.partition(".")[0]) > int(torch.version.cuda.partition(".")[0]):
            raise NotBuiltError(f"{self.nvcc} is of CUDA {version}, this torch of the older CUDA {torch.version.cuda}")
        self.cuda["architectures"] = architectures(os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES)
        if self.lacking is not None:
            raise NotBuiltError(self.lacking)

    def _by_cxx(self, source: Path) -> Path:
        return self._make(source, "host", [*self.cxx, *self.flags, "-c", str(source)], self.cxx_version)

    def _by_nvcc(self, source: Path) -> Path:
        threads = str(-(-self.workers // len(self.kernels)))
        host = next((part for part in self.cxx if "ccache" not in part), self.cxx[0])
        code = gencode if tells_architectures_apart(source) else shared_gencode
        flags = ["-ccbin", host, *NVCC_FLAGS, "-Icsrc", *code(self.cuda["architectures"])]
        return self._make(
            source,
            "nvcc",
            [self.nvcc, *flags, "-c", str(source)],
            self.cuda["nvcc"],
            free=["--threads", threads, "--split-compile", threads],
        )

    def _emulated(self, source: Path) -> Path:
        flags = [f for f in self.flags if f.startswith(("-fsanitize", "-fno-sanitize", "-fno-omit"))]
        flags += ["-g", "-O1"] if flags else []
        includes = [f"-I{EMULATION / 'include'}", f"-I{EMULATION}", "-Icsrc"]
        command = [*self.cxx, *EMULATION_FLAGS, *flags, "-fopenmp", *includes, "-x", "c++", "-c", str(source)]
        return self._make(source, "emulated", command, self.cxx_version)

    def _make(self, source: Path, kind: str, command: list[str], compiler: str, free: Sequence[str] = ()) -> Path:
        return make(self.folder / kind / f"{source.stem}.o", command, compiler, free=free)

    def _link_cuda(self, output: Path, objects: list[Path]) -> Path:
        command = [self.nvcc, "-shared", "-cudart", "static", *gencode(self.cuda["architectures"])]
        if target.machine() == target.X86_64:
            command += map(str, old_glibc.libraries(self.cxx, self.folder / "old_glibc"))
        command += ["-Xlinker", "--exclude-libs=ALL", *map(str, objects), *TORCH_LIBRARIES, *CUDA_LIBRARIES]
        return make(output, command, self.cuda["nvcc"], inputs=objects)

    def _link_emulation(self, output: Path, objects: list[Path]) -> Path:
        # Not linked to libgomp, whose calls go to the one that torch loaded: one pool of threads.
        sanitize = [f"-fsanitize={self.sanitize}"] if self.sanitize else []
        command = [*self.cxx, "-shared", "-Wl,-Bsymbolic", *sanitize, *map(str, objects), *TORCH_LIBRARIES, "-ldl"]
        return make(output, command, "", inputs=objects)
