"""Which backends exist on this machine, and if not, why; and which of them serves a call.

"reference" is plain PyTorch and always there, "cpu" the C++ kernels of the extension module `crossvit_kernels._C`,
"triton" and "cuda" the kernels for NVIDIA GPUs. The environment variable CROSSVIT_KERNELS, read once, says what
kernels="auto" means in this process.
"""

import functools
import importlib
import importlib.util
import json
import os
import sysconfig
import warnings
from pathlib import Path
from types import ModuleType

import torch

from . import triton

BACKENDS = ("reference", "cpu", "triton", "cuda")
_CHOICES = "'auto' or one of " + ", ".join(map(repr, BACKENDS))

# What kernels="auto" takes, by the type of device: the first that is there. CPU: on a 2-core EPYC with AVX-512 and bf16
# units, float32 and bfloat16. CUDA: on an H100, bfloat16, as CUDA graphs; called one by one small batches are slower.
_FASTEST: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}
_DTYPES = {"cpu": (torch.float32, torch.bfloat16)}  # others go to the reference
_DEVICES = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
_NOT_WRITTEN = "not built: no kernels of this backend in this version"
_INSTALL = "to build it, type `pip install --no-build-isolation .` in the source folder"


def _load_extension() -> tuple[ModuleType | None, str | None]:
    """The extension module, or why it is not there; one built against another torch is not loaded."""
    record_path = Path(__file__).with_name("_build.json")
    try:
        record = json.loads(record_path.read_text())
    except FileNotFoundError:
        return None, f"the extension crossvit_kernels._C was not built; {_INSTALL}"
    except (OSError, ValueError) as error:
        return None, f"{record_path} cannot be read ({error}); {_INSTALL} again"
    if record.get("missing"):
        return (
            None,
            f"the extension crossvit_kernels._C was not built: {record['missing']}; {_INSTALL} once that is mended",
        )
    if record.get("torch") != str(torch.__version__):
        built = record.get("torch")
        return (
            None,
            f"crossvit_kernels._C was built against torch {built}, this is {torch.__version__}; {_INSTALL} again",
        )
    if record.get("abi") != (abi := sysconfig.get_config_var("SOABI")):
        return None, f"crossvit_kernels._C was built for {record.get('abi')}, this Python is {abi}; {_INSTALL} again"
    try:
        return importlib.import_module("crossvit_kernels._C"), None
    except ImportError as error:
        return None, f"crossvit_kernels._C cannot be loaded ({error}); {_INSTALL} again"


_extension, _extension_missing = _load_extension()


def reason(name: str) -> str | None:
    """Why the backend `name` is not there, in words; None where it is. ValueError where no backend has that name."""
    if name not in BACKENDS:
        raise ValueError(f"kernels: expected {_CHOICES}, got {name!r}")
    if name == "reference":
        return None
    if name == "triton":
        return _triton_missing()
    return _extension_missing if name == "cpu" else _NOT_WRITTEN


def triton_interprets() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors: the environment variable TRITON_INTERPRET."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _triton_missing() -> str | None:
    """Why the Triton kernels cannot run here."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if triton_interprets():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device was found; on CPU tensors Triton runs in its interpreter, TRITON_INTERPRET=1"
    if torch.version.cuda is None:
        return "this torch was built for another vendor's GPUs than NVIDIA's"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
    return None


def devices(name: str) -> tuple[str, ...]:
    """The types of device whose tensors the backend `name` takes."""
    return ("cpu", "cuda") if name == "triton" and triton_interprets() else (_DEVICES[name],)


def dtypes(name: str) -> tuple[torch.dtype, ...]:
    """The dtypes the backend `name` computes in; others go to the reference."""
    if name != "triton":
        return _DTYPES[name]
    # Triton's interpreter corrupts bfloat16.
    return (torch.float32, torch.float16, *(() if triton_interprets() else (torch.bfloat16,)))


def available(name: str) -> bool:
    """Whether the backend `name` works on this machine. ValueError where no backend has that name."""
    return reason(name) is None


def serves(name: str, op: str) -> bool:
    """Whether the backend `name` has kernels of its own for `op`; where not, the reference serves it there."""
    if name == "reference":
        return True
    if name == "triton":
        return available(name) and op in triton.SERVED
    return available(name) and hasattr(getattr(torch.ops, f"crossvit_kernels_{name}"), op)


@functools.cache
def _environment() -> str:
    """The default that CROSSVIT_KERNELS names, or "auto"."""
    name = os.environ.get("CROSSVIT_KERNELS") or "auto"
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"the environment variable CROSSVIT_KERNELS: expected {_CHOICES}, got {name!r}")
    return name


@functools.cache
def _fallback_warning() -> None:
    """Says once that a CPU is served by the reference."""
    warnings.warn(f"crossvit_kernels runs on its PyTorch reference: {_extension_missing}", RuntimeWarning, stacklevel=6)


_resolved: dict[tuple[str, torch.device, torch.dtype, str], str] = {}


def _resolve(kernels: str, device: torch.device, dtype: torch.dtype, op: str) -> str:
    name = _environment() if kernels == "auto" else kernels
    if name == "auto":
        name = next(filter(available, _FASTEST.get(device.type, ())), "reference")
        if device.type == "cpu" and name == "reference":
            _fallback_warning()
    elif (why := reason(name)) is not None:
        raise RuntimeError(f"kernels={name!r} is not there: {why}")
    elif name != "reference" and device.type not in devices(name):
        if kernels == "auto":  # CROSSVIT_KERNELS speaks of its own kind of device, not of every tensor
            name = "reference"
        else:
            raise ValueError(f"kernels={name!r} takes tensors on {_DEVICES[name]}, got tensors on {device}")
    if name != "reference" and (dtype not in dtypes(name) or not serves(name, op)):
        name = "reference"
    return name


# Its answer depends on constants of a traced graph alone, so torch.compile need not look inside.
@torch.compiler.assume_constant_result
def resolve(kernels: str, device: torch.device, dtype: torch.dtype, op: str) -> str:
    """The backend that serves `op` for `kernels=` and tensors of `dtype` on `device`.

    Raises ValueError for an unknown name and for a device that the named backend does not take, RuntimeError, with the
    reason, for a backend asked for by name that is not there.
    """
    key = (kernels, device, dtype, op)
    name = _resolved.get(key)
    if name is None:
        name = _resolved[key] = _resolve(*key)
    return name


def report() -> str:
    """Prints, and returns, which backends exist on this machine and why the others do not."""
    lines = [f"{name}: {reason(name) or 'available'}" for name in BACKENDS]
    if _extension is not None:
        built = _extension.build_info()
        sets = ", ".join(built["instruction_sets"])
        lines[1] += f", {_extension.cpu_instruction_set()} in use (built: {sets}; compiler {built['compiler']})"
    default = _environment()
    lines.append(f"kernels='auto' means {default}" + ("" if default == "auto" else ", from CROSSVIT_KERNELS"))
    text = "\n".join(lines)
    print(text)
    return text
