"""Builds the libraries of kernels, ``crossvit_kernels/_cpu.so`` and those for CUDA; the rest is in pyproject.toml.

They are plain libraries, which ask of PyTorch its stable C interface alone and of Python nothing: a build serves every
Python and every PyTorch from 2.11 on. Beside them go, in a source tree, the inspection module ``_C`` and the emulation
of CUDA, and everywhere ``_build.json``: what was built, or why it was not. ``csrc/build_*.py`` say how.

Kernels are built on Linux. On other systems the package is Python alone, and runs on its PyTorch reference.

Environment: ``CXX`` the compiler, ``MAX_JOBS`` the number of compilations at once, ``CROSSVIT_KERNELS_SANITIZE`` a
value for ``-fsanitize=``, and those of ``csrc/build_cuda.py``.
"""

import sys
from typing import Any

import setuptools

HOW_TO_INSTALL = "type: pip install 'torch>=2.11' 'setuptools>=77' wheel && pip install --no-build-isolation ."
if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(
        f"crossvit-kernels is built by setuptools 77 or newer, and this is {setuptools.__version__}: {HOW_TO_INSTALL}"
    )


def with_kernels() -> dict[str, Any]:
    """What setuptools is told where kernels are built."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        sys.exit(f"crossvit-kernels is built where torch is installed, not without it: {HOW_TO_INSTALL}")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        sys.exit(f"crossvit-kernels needs torch 2.11 or newer, and this is {torch.__version__}: {HOW_TO_INSTALL}")
    sys.path.insert(0, "csrc")
    from build_kernels import BuildKernels, Wheel

    return {
        # An extension stands for the libraries, so that setuptools takes the package for what it is: not pure Python.
        "ext_modules": [setuptools.Extension("crossvit_kernels._cpu", [])],
        "cmdclass": {"build_ext": BuildKernels, "bdist_wheel": Wheel},
    }


setuptools.setup(**(with_kernels() if sys.platform == "linux" else {}))
