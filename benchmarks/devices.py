"""The two kinds of device that benchmarks run on: how time is taken there, what it is called, the most that it does."""

import functools
import re
import statistics
import subprocess
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossvit_kernels import backends

from . import floor, timing

POISON = float("nan")
# Where each backend is timed, on which device; on a GPU the reference is timed as well.
PLACES = {
    "reference": ("cpu", "reference"),
    "cpu": ("cpu", "cpu"),
    "reference-on-gpu": ("cuda", "reference"),
    "triton": ("cuda", "triton"),
    "cuda": ("cuda", "cuda"),
}


class Host:
    """The CPU."""

    warm_up_seconds: float | None = None  # timing's own

    def seconds(self, run: Callable[[], object], calls: int) -> float:
        """Seconds of so many calls."""
        return timing.host_seconds(run, calls)

    def flop_rate(self, dtype: torch.dtype, threads: int) -> tuple[float, str]:
        """The highest rate of floating-point operations per second reached here, and by what."""
        return floor.flop_rate(dtype, threads)

    def bandwidth(self, threads: int) -> float:
        """Bytes per second of a copy larger than the caches, reads plus writes."""
        return floor.bandwidth(threads)

    def cache_bytes(self) -> int:
        """Size of the last cache, which inputs have to exceed."""
        return floor.cache_bytes()

    def facts(self) -> dict[str, Any]:
        """What a row says of the machine."""
        return {"device": timing.device_name()}

    def versions(self) -> dict[str, str]:
        """What a row says of the packages."""
        return timing.versions()

    def environment(self) -> str:
        """All of it in a line."""
        return timing.environment()

    def lost(self) -> str | None:
        """Why nothing more can run on the device in this process, or None."""
        return None


class Cuda(Host):
    """The current NVIDIA GPU."""

    warm_up_seconds = 0.05

    def seconds(self, run: Callable[[], object], calls: int) -> float:
        return event_seconds(run, calls)

    def flop_rate(self, dtype: torch.dtype, threads: int) -> tuple[float, str]:
        return product_rate(dtype)

    def bandwidth(self, threads: int) -> float:
        return copy_rate()

    def cache_bytes(self) -> int:
        return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size

    def facts(self) -> dict[str, Any]:
        return {"device": gpu_name(), "driver": driver(), "date": date.today().isoformat()}

    def versions(self) -> dict[str, str]:
        import triton

        return timing.versions() | {"triton": triton.__version__, "cuda": str(torch.version.cuda)}

    def environment(self) -> str:
        facts = self.facts()
        packages = ", ".join(f"{name} {version}" for name, version in self.versions().items())
        return f"{facts['device']}, driver {facts['driver']}, {facts['date']}; {packages}"

    def lost(self) -> str | None:
        """An illegal access, once made, fails every later call in the process."""
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return str(error).strip().splitlines()[0]
        return None


DEVICES: dict[str, Host] = {"cpu": Host(), "cuda": Cuda()}


def event_seconds(run: Callable[[], object], calls: int) -> float:
    """By events around the calls, on an idle GPU: where the host hands work over too slowly, that counts as well."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.cache
def product_rate(dtype: torch.dtype) -> tuple[float, str]:
    """Floating-point operations per second of a large product of random matrices; float32 without TF32."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _median(lambda: torch.mm(a, b, out=out)), f"{n}³ product"


@functools.cache
def copy_rate() -> float:
    """Bytes per second, read plus written, of a large copy within the GPU's memory."""
    size = min(2**31, torch.cuda.mem_get_info()[0] // 4)
    source = torch.randint(256, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / _median(lambda: target.copy_(source))


def _median(run: Callable[[], object]) -> float:
    event_seconds(run, 3)
    return statistics.median(event_seconds(run, 1) for _ in range(11))


@functools.cache
def gpu_name() -> str:
    """As in "NVIDIA H200"."""
    return torch.cuda.get_device_name()


@functools.cache
def driver() -> str:
    """The version of NVIDIA's driver, or "unknown"."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()
        return found[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        file = Path("/proc/driver/nvidia/version")
        words = file.read_text().split() if file.exists() else []
        return next((word for word in words if re.fullmatch(r"\d+\.[\d.]+", word)), "unknown")


def captured(
    run: Callable[[], Any], given: Sequence[Tensor] = (), warm_up: Callable[[], Any] | None = None
) -> Callable[[], Any]:
    """`run` as a CUDA graph: a call replays what one call launched, into the same memory, and returns its result.

    The tensors of the result hold NaN until a replay writes them, those apart that `run` was `given` and hands on.
    `warm_up` replaces `run` where a part of it is enough to have all kernels compiled and all handles made. Raises
    RuntimeError where `run` cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            (warm_up or run)()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    kept = {tensor.untyped_storage().data_ptr() for tensor in given}
    with torch.inference_mode():
        for tensor in _tensors(result):
            if tensor.untyped_storage().data_ptr() not in kept:
                tensor.fill_(POISON)

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result.detach()] if result.is_floating_point() else []
    return [tensor for part in result for tensor in _tensors(part)] if isinstance(result, (list, tuple)) else []


def no_gpu() -> str | None:
    """Why nothing can run on an NVIDIA GPU here, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return None if torch.cuda.is_available() else "no CUDA device was found"


def why_not(device: str, kernels: str, dtype: torch.dtype) -> str | None:
    """Why a backend has no times of its own on a device and in a dtype, or None. Triton's interpreter and the emulation
    of CUDA have none."""
    if device == "cuda" and (why := no_gpu()) is not None:
        return why
    if kernels == "reference":
        return None
    if (why := backends.reason(kernels)) is not None:
        return why
    if backends.devices(kernels) != (device,):
        return f"kernels={kernels!r} does not run on the device itself here, but on a stand-in"
    return None if dtype in backends.dtypes(kernels) else f"kernels={kernels!r} does not compute in {dtype}"


def use(device: str) -> Host:
    """The device of this name; on a GPU float32 means float32, also in convolutions, where torch's default is TF32."""
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    return DEVICES[device]
