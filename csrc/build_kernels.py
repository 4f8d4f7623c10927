"""The commands by which setup.py builds the kernels' libraries and the wheel that has them; imported by it, by path."""

import fcntl
import json
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import build_cpu
import build_cuda
import target
import torch
from building import COMMON_FLAGS, write_atomically
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SANITIZE = os.environ.get("CROSSVIT_KERNELS_SANITIZE", "")
PACKAGE = Path("crossvit_kernels")
BUILT = (build_cpu.LIBRARY, build_cpu.INSPECTION, build_cuda.CUDA_LIBRARY, build_cuda.EMULATION_LIBRARY)


class BuildKernels(build_ext):
    """Builds into ``build``, and from there into the package."""

    def run(self) -> None:
        if self.inplace and target.cross():
            sys.exit(f"crossvit-kernels: a source tree holds kernels for this machine; {target.machine()} gets a wheel")
        # A folder for objects that stays, also where pip would take a temporary one.
        name = f"{platform.system()}-{target.machine()}".lower()
        folder = Path("build", name + (f"-{SANITIZE.replace(',', '-')}" if SANITIZE else ""))
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:  # two builds of one checkout take turns
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._build(folder, Path(self.build_lib) / PACKAGE)
            if self.inplace:
                self.copy_extensions_to_source()

    def _build(self, folder: Path, package: Path) -> None:
        cpu = build_cpu.Build(SANITIZE, folder, package, inspect=bool(self.inplace))
        for_tests = bool(self.inplace or SANITIZE) and not target.cross()  # what is installed has no emulation
        flags = [*COMMON_FLAGS, *build_cpu.sanitizer_flags(SANITIZE)]
        cuda = build_cuda.Build(build_cpu.cxx(), cpu.reason, flags, SANITIZE, folder, package, for_tests)
        workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        with ThreadPoolExecutor(workers) as pool:
            cpu.start(pool)
            cuda.start(pool, workers)
            of_cpu = cpu.finish()
            of_cuda = cuda.finish()
        if (reason := of_cpu["missing"]) is not None:
            if "build_ext" in self.distribution.commands:  # the kernels were asked for by name, not as part of a whole
                sys.exit(f"crossvit-kernels: {reason}")
            print(f"crossvit-kernels: without C++ kernels, it will run on the reference: {reason}", file=sys.stderr)
        record = {
            "torch": str(torch.__version__),  # whose headers were there; any from 2.11 on may run it
            "machine": target.machine(),
            "sanitize": SANITIZE,
            **of_cpu,
            **of_cuda,
        }
        package.mkdir(parents=True, exist_ok=True)
        write_atomically(package / "_build.json", (json.dumps(record, indent=2) + "\n").encode())

    def copy_extensions_to_source(self) -> None:
        package = Path(self.build_lib) / PACKAGE
        for name in BUILT:
            if (package / name).exists():
                write_atomically(PACKAGE / name, (package / name).read_bytes(), 0o755)
            else:
                (PACKAGE / name).unlink(missing_ok=True)
        write_atomically(PACKAGE / "_build.json", (package / "_build.json").read_bytes())

    def get_outputs(self) -> list[str]:
        return [str(path) for path in sorted((Path(self.build_lib) / PACKAGE).glob("_*.*"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


class Wheel(bdist_wheel):
    """A wheel for every Python, of this platform."""

    def run(self) -> None:
        """Packs what an earlier build left behind only where the sources still have it, which setuptools would not
        look after."""
        built = Path(self.get_finalized_command("build").build_lib)
        for path in built.rglob("*.py"):
            if not path.relative_to(built).exists():
                path.unlink()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]
