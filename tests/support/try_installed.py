"""python tests/support/try_installed.py FOLDER TORCH: what an installed wheel is and does, in an environment in FOLDER.

.ci/try-wheel runs it. The package is the installed one, no compiler is on the PATH, PyTorch is the one that was asked
for, importing the package says nothing, and a model on its kernels gives the reference's logits.
"""

import contextlib
import hashlib
import io
import platform
import shutil
import sys
import warnings
from pathlib import Path

import torch
from packaging.requirements import Requirement


def main(folder: str, requirement: str) -> None:
    """AssertionError says what is wrong."""
    compilers = [name for name in ("cc", "gcc", "c++", "g++", "clang", "clang++", "nvcc") if shutil.which(name)]
    assert not compilers, f"on the PATH is {compilers}"
    wanted, version = Requirement(requirement), torch.__version__.partition("+")[0]
    assert wanted.name == "torch", f"TORCH: expected torch, torch==2.11.0 or the like, got {requirement!r}"
    assert wanted.specifier.contains(version, prereleases=True), f"asked for was {requirement}, here is torch {version}"
    said = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(said):
        warnings.simplefilter("always")
        import crossvit
        import crossvit_kernels
    told = [
        f"{warning.filename}:{warning.lineno}: {warning.message}" for warning in caught
    ] + said.getvalue().splitlines()
    assert not told, f"importing the package says {told}"
    library = Path(crossvit_kernels.__file__).with_name("_cpu.so")
    assert library.is_relative_to(folder), f"expected a package in {folder}, got {library.parent}"
    assert crossvit_kernels.backends.reason("cpu") is None, crossvit_kernels.backends.reason("cpu")

    images, logits = torch.randn(2, 3, 240, 240), {}
    for kernels in ("cpu", "reference"):
        torch.manual_seed(0)
        model = crossvit.create_model("crossvit_tiny_240", kernels=kernels).eval()
        with torch.inference_mode():
            logits[kernels] = model(images)
    torch.testing.assert_close(logits["cpu"], logits["reference"], rtol=1e-4, atol=1e-5)
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    print(f"Python {platform.python_version()}, PyTorch {torch.__version__}, {' '.join(platform.libc_ver())}")
    print(f"{library.name}, sha256 {digest}: a model gives the reference's logits")


if __name__ == "__main__":
    main(*sys.argv[1:])
