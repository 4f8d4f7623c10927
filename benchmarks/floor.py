"""What figures are held against: the operations executed, and the most this machine does, measured in the same run."""

import ctypes
import functools
import math
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class _FlopCount(TorchDispatchMode):
    """torch.utils.flop_counter's formulas without its module tracker, which fails on a module that takes a parameter as
    an argument while gradients are off."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        formula = _FORMULAS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        if formula is None:
            with self:
                result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        result = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> int:
    batch, heads, length, width = query.shape
    return 2 * batch * heads * length * key.shape[-2] * (width + value.shape[-1])


def _attention_backward_flops(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> int:
    """Scores once more, then the gradients of probabilities, values, queries and keys."""
    batch, heads, length, width = query.shape
    return 2 * batch * heads * length * key.shape[-2] * (3 * width + 2 * value.shape[-1])


# torch has none for its CPU attention: a model's whole attention would count as nothing.
_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def executed_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of one call, a multiply-add as two, in matrix products, convolutions and attention."""
    with _FlopCount() as count:
        run()
    return count.total


@functools.cache
def flop_rate(dtype: torch.dtype, threads: int) -> tuple[float, str]:
    """The highest rate of floating-point operations per second (a multiply-add is two) reached here, and by what.

    The better of a loop of multiply-adds in registers, compiled here for this processor, and the best square matrix
    product through torch. The latter alone is a lower bound; it is what is left without a C compiler or with AMX.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rates = {"loop of FMAs": _loop_rate(dtype, threads)}
    for size in (256, 1024, 2048):
        rate = rates[f"{size}³ product"] = _product_rate(dtype, size)
        if rate < 1e10:  # a dtype without a matrix product of its own on this processor: larger ones would take minutes
            break
    torch.set_num_threads(before)
    best = max(rates, key=rates.__getitem__)
    return rates[best], best


@functools.cache
def bandwidth(threads: int) -> float:
    """Bytes per second of a copy larger than the caches, reads plus writes."""
    source = torch.ones(2**28 // 4)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), 8)


def cache_bytes() -> int:
    """Size of the last-level cache that inputs have to exceed: L3 as the system states it for one core, else 32 MiB."""
    found = [2**25]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        size = path.read_text().strip()
        found.append(int(size.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(size[-1], 1))
    return max(found)


def _product_rate(dtype: torch.dtype, size: int) -> float:
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    out = torch.empty(size, size, dtype=dtype)
    return 2 * size**3 / _fastest(lambda: torch.mm(a, b, out=out), 12)


def _fastest(run: Callable[[], object], calls: int) -> float:
    fastest = math.inf
    for _ in range(calls):
        start = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled loops, or None where no C compiler works. Built for this processor alone, so never kept."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "fma_peak.so"
        source = Path(__file__).with_name("fma_peak.c")
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        try:
            subprocess.run(
                [compiler, *flags, str(source), "-o", str(target)], check=True, capture_output=True, timeout=60
            )
            library = ctypes.CDLL(str(target))
        except (subprocess.SubprocessError, OSError):
            return None
    for function in (library.fma_float32, library.fma_bfloat16):
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_long, ctypes.POINTER(ctypes.c_float)]
    return library


def _loop_rate(dtype: torch.dtype, threads: int) -> float:
    library = _library()
    name = str(dtype).removeprefix("torch.")
    if library is None or name not in ("float32", "bfloat16"):
        return 0.0
    function = getattr(library, f"fma_{name}")
    steps = 5_000_000
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(8):
            start = time.perf_counter()
            done = sum(pool.map(lambda _: function(steps, ctypes.byref(ctypes.c_float(0.5))), range(threads)))
            best = max(best, done / (time.perf_counter() - start))
    return best
