"""Which backends exist on this machine, and if not, why; and which of them serves a call.

"reference" is plain PyTorch and always there, "cpu" the C++ kernels of the extension module `crossvit_kernels._C`,
"triton" and "cuda" the kernels for NVIDIA GPUs, the latter in the libraries `_cuda.so` and, for CPU tensors,
`_emulation.so`. The environment variable CROSSVIT_KERNELS, read once, says what kernels="auto" means in this process.
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
from typing import Any

import torch

from .. import triton

BACKENDS = ("reference", "cpu", "triton", "cuda")
_CHOICES = "'auto' or one of " + ", ".join(map(repr, BACKENDS))

# What kernels="auto" takes, by the type of device: the first that is there. CPU: on a 2-core EPYC with AVX-512 and bf16
# units, float32 and bfloat16. CUDA: on an H100, bfloat16, as CUDA graphs; called one by one small batches are slower.
_FASTEST: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}
# Dispatcher ops for which a GPU's "auto" was measured between "triton" and "cuda": {op: (the faster one, on what)}. For
# all others it is as above.
_MEASURED: dict[str, tuple[str, str]] = {}
_DTYPES = {  # others go to the reference
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}
_DEVICES = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
_CAPABILITY = (8, 0)  # the least that the GPU kernels are written for
_INSTALL = "to build it, type `pip install --no-build-isolation .` in the source folder"


def _read_record(what: str) -> tuple[dict[str, Any], str | None]:
    """What setup.py wrote down of the build, and why `what`, a part of it, is not to be loaded."""
    path = Path(__file__).parent.with_name("_build.json")
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return {}, f"{what} was not built; {_INSTALL}"
    except (OSError, ValueError) as error:
        return {}, f"{path} cannot be read ({error}); {_INSTALL} again"
    part = {"_cuda.so": "cuda", "_emulation.so": "emulation"}.get(what.rpartition("/")[2])
    missing = (
        record.get("missing") if part is None else record.get(part, {"missing": "by an older setup.py"})["missing"]
    )
    if missing:
        return record, f"{what} was not built: {missing}; {_INSTALL} once that is mended"
    if record.get("torch") != str(torch.__version__):
        built = record.get("torch")
        return record, f"{what} was built against torch {built}, this is {torch.__version__}; {_INSTALL} again"
    return record, None


def _load_extension() -> tuple[ModuleType | None, str | None]:
    """The extension module, or why it is not there; one built against another torch is not loaded."""
    record, why = _read_record("crossvit_kernels._C")
    if why is not None:
        return None, why
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
    return _extension_missing if name == "cpu" else _cuda_missing()


_NO_GPU = "no CUDA device was found"


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
        return f"{_NO_GPU}; on CPU tensors Triton runs in its interpreter, TRITON_INTERPRET=1"
    return _gpu_unfit()


@functools.cache
def emulated() -> bool:
    """Whether the CUDA kernels run in the emulation, on CPU tensors: CROSSVIT_KERNELS_EMULATE, read once."""
    return os.environ.get("CROSSVIT_KERNELS_EMULATE", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _cuda_missing() -> str | None:
    """Why the CUDA kernels cannot run here; loads them."""
    name = "_emulation.so" if emulated() else "_cuda.so"
    record, why = _read_record(f"crossvit_kernels/{name}")
    if why is not None:
        return why
    if not emulated():
        if not torch.cuda.is_available():
            return f"{_NO_GPU}; on CPU tensors the kernels run in an emulation, CROSSVIT_KERNELS_EMULATE=1"
        if (why := _gpu_unfit() or _not_built_for(record["cuda"]["architectures"])) is not None:
            return why
    return _load_cuda(name)


@functools.cache
def _load_cuda(name: str) -> str | None:
    """Registers the ops of a library, or says why it cannot."""
    try:
        torch.ops.load_library(Path(__file__).parent.with_name(name))
    except OSError as error:
        return f"crossvit_kernels/{name} cannot be loaded ({error}); {_INSTALL} again"
    return None


def _gpu_unfit() -> str | None:
    if torch.version.cuda is None:
        return "this torch was built for another vendor's GPUs than NVIDIA's"
    capability = torch.cuda.get_device_capability()
    if capability < _CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
    return None


def _not_built_for(architectures: list[str]) -> str | None:
    """None where one of the architectures runs on this GPU: code on its own generation, PTX on all later ones."""
    major, minor = torch.cuda.get_device_capability()
    for name in architectures:
        kind, _, number = name.partition("_")
        exact = number.rstrip("af") != number
        built = divmod(int(number.rstrip("af")), 10)
        if built == (major, minor) or (
            not exact and built <= (major, minor) and (kind == "compute" or built[0] == major)
        ):
            return None
    return (
        f"crossvit_kernels/_cuda.so was built for {', '.join(architectures)}, the GPU has compute capability "
        f"{major}.{minor}; {_INSTALL} again, with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


def _cuda_ops() -> list[str]:
    """The ops of the library in use, or of the one that would be with a GPU."""
    if _cuda_missing() is not None and (_read_record("crossvit_kernels/_cuda.so")[1] or _load_cuda("_cuda.so")):
        return []
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.partition("::")[2] for name in names if name.startswith("crossvit_kernels_cuda::"))


def devices(name: str) -> tuple[str, ...]:
    """The types of device whose tensors the backend `name` takes."""
    if name == "cuda" and emulated():
        return ("cpu",)
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


def _candidates(device: str, op: str) -> tuple[str, ...]:
    """What kernels="auto" takes for an op, in the order of preference."""
    others = _FASTEST.get(device, ())
    return (_MEASURED[op][0], *others) if device == "cuda" and op in _MEASURED else others


_resolved: dict[tuple[str, torch.device, torch.dtype, str], str] = {}


def _resolve(kernels: str, device: torch.device, dtype: torch.dtype, op: str) -> str:
    name = _environment() if kernels == "auto" else kernels
    if name == "auto":
        name = next(filter(available, _candidates(device.type, op)), "reference")
        if device.type == "cpu" and name == "reference":
            _fallback_warning()
    elif (why := reason(name)) is not None:
        raise RuntimeError(f"kernels={name!r} is not there: {why}")
    elif device.type == "meta":  # where only shapes are asked for, every backend's are the reference's
        name = "reference"
    elif name != "reference" and device.type not in devices(name):
        if kernels == "auto":  # CROSSVIT_KERNELS speaks of its own kind of device, not of every tensor
            name = "reference"
        else:
            raise ValueError(f"kernels={name!r} takes tensors on {devices(name)[-1]}, got tensors on {device}")
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
    if _cuda_missing() is None and emulated():
        lines[3] += ", emulated on CPU tensors"
    if ops := _cuda_ops():
        cuda = _read_record("crossvit_kernels/_cuda.so")[0]["cuda"]
        built_for = f"{', '.join(cuda['architectures'])} by nvcc {cuda['nvcc']}" if cuda["architectures"] else "no GPU"
        lines[3] += f" (built for {built_for}: {', '.join(ops)})"
    default = _environment()
    lines.append(f"kernels='auto' means {default}" + ("" if default == "auto" else ", from CROSSVIT_KERNELS"))
    for op in ops if default == "auto" else ():
        choice = _candidates("cuda", op)[0]
        lines.append(
            f"  on a GPU, {op}: {choice}, {_MEASURED[op][1] if op in _MEASURED else 'unmeasured against cuda'}"
        )
    text = "\n".join(lines)
    print(text)
    return text
