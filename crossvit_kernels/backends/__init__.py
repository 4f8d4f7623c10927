"""Which backends exist on this machine, and if not, why; and which of them serves a call.

"reference" is plain PyTorch and always there, "cpu" the C++ kernels of the library `_cpu.so`, "triton" and "cuda" the
kernels for NVIDIA GPUs, the latter in the libraries `_cuda.so` and, for CPU tensors, `_emulation.so`. The environment
variable CROSSVIT_KERNELS, read once, says what kernels="auto" means in this process.
"""

from .availability import BACKENDS, available, devices, dtypes, emulated, reason, serves
from .choice import resolve
from .reporting import in_words, report, served_by

__all__ = [
    "BACKENDS",
    "available",
    "devices",
    "dtypes",
    "emulated",
    "in_words",
    "reason",
    "report",
    "resolve",
    "served_by",
    "serves",
]
