"""Which machine the kernels are built for; imported by path, by build_cpu.py, build_cuda.py and build_kernels.py.

It is the machine that setuptools names a wheel after: this one or, in a cross build, the one that the environment
variable ``_PYTHON_HOST_PLATFORM`` names, such as linux-aarch64. Cross builds of CPython and of its extensions use the
same variable. ``CXX`` names the cross compiler.
"""

import platform
import shlex
import subprocess
import sysconfig
from pathlib import Path

from building import TORCH_LIBRARIES, make

# The machines that have instruction sets beside the generic one.
X86_64, AARCH64 = "x86_64", "aarch64"


def machine() -> str:
    """The machine that is built for, such as x86_64."""
    return sysconfig.get_platform().removeprefix("linux-")


def cross() -> bool:
    """Whether that is another machine than this one."""
    return machine() != platform.machine()


def wrong_compiler(cxx: list[str]) -> str | None:
    """What is wrong with a compiler that compiles for another machine, in words, or None."""
    told = subprocess.run([*cxx, "-dumpmachine"], capture_output=True, text=True, check=False)
    compiled = told.stdout.strip().partition("-")[0]
    if compiled == machine() or not {compiled, machine()} & {X86_64, AARCH64}:
        return None
    return (
        f"the C++ compiler {shlex.join(cxx)!r} compiles for {compiled or 'an unknown machine'}, and the kernels are "
        f"for {machine()} (a cross build names the compiler in the variable CXX, such as aarch64-linux-gnu-g++, and "
        "the platform in _PYTHON_HOST_PLATFORM, such as linux-aarch64)"
    )


def torch_libraries(cxx: list[str], folder: Path) -> list[str]:
    """What a library is linked to, so that it asks the loader for PyTorch's. In a cross build, where PyTorch's own is
    of another machine, that is an empty library of its name."""
    if not cross():
        return TORCH_LIBRARIES
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "nothing.c"
    source.write_text("")
    name = "libtorch_cpu.so"
    command = [*cxx, "-shared", "-fPIC", "-nostdlib", "-x", "c", str(source), f"-Wl,-soname,{name}"]
    return ["-Wl,--no-as-needed", str(make(folder / name, command, "", inputs=[source]))]
