"""Launching kernels: by which configuration, and, instead of a run, a record of what would run.

A configuration is a dict of a kernel's constexpr block sizes with num_warps and num_stages. `configuration` takes it
from tuned.json beside this file, keyed by architecture, kernel and "<width>/<bits of the dtype>", else the launcher's
safe default. Nothing is tuned unless `benchmarks.tune` is asked to.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton.language as tl

from .. import backends
from . import direct

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}  # as kernels take them

TABLE = Path(__file__).with_name("tuned.json")

INTERPRETED = backends.triton_interprets()  # as triton.jit, which reads it where the kernels are defined

Configuration = dict[str, int]


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its grid and all its arguments by name, constexpr ones and blocks included."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


_records: list[list[Launch]] = []
_targets: list[str] = []
_requests: list[dict[tuple[str, str], Configuration]] = []
_overrides: dict[str, Configuration] = {}


@contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Launches inside are not run but collected, as `architecture` ("sm_90") would get them; tensors may be on
    "meta"."""
    launches: list[Launch] = []
    _records.append(launches)
    _targets.append(architecture)
    try:
        yield launches
    finally:
        _records.pop()
        _targets.pop()


@contextmanager
def requests() -> Iterator[dict[tuple[str, str], Configuration]]:
    """Collects, by name and "<width>/<bits>", the configurations that launches inside take."""
    taken: dict[tuple[str, str], Configuration] = {}
    _requests.append(taken)
    try:
        yield taken
    finally:
        _requests.pop()


@contextmanager
def overriding(kernel: str, configuration: Configuration) -> Iterator[None]:
    """Inside, this kernel is launched with this configuration, whatever the table says."""
    before = _overrides.get(kernel)
    _overrides[kernel] = configuration
    try:
        yield
    finally:
        if before is None:
            del _overrides[kernel]
        else:
            _overrides[kernel] = before


@functools.cache
def table() -> Mapping[str, Mapping[str, Mapping[str, Configuration]]]:
    """{architecture: {kernel: {"<width>/<bits>": configuration}}}, as measured."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def architecture() -> str:
    """The architecture that is launched on: "sm_90", or "interpreter"."""
    if _targets:
        return _targets[-1]
    return "interpreter" if INTERPRETED else _of_device(torch.cuda.current_device())


@functools.cache
def _of_device(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def multiprocessors() -> int:
    """Multiprocessors of the current device; an H200's 132 while recording; 1 in the interpreter."""
    if _targets:
        return 132
    return 1 if INTERPRETED else _multiprocessors_of(torch.cuda.current_device())


@functools.cache
def _multiprocessors_of(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def configuration(kernel: str, width: int, dtype: torch.dtype, default: Configuration) -> Configuration:
    """The configuration of `kernel` for rows of this width: the tuned one of this architecture, else `default`.

    `kernel` is the name of the jitted function, or of one of several ways to launch it. `default` has to fit every
    architecture from sm_80 on.
    """
    bits = dtype.itemsize * 8
    chosen = _overrides.get(kernel) or _tuned(architecture(), kernel, width, bits) or default
    for taken in _requests:
        taken[kernel, f"{width}/{bits}"] = chosen
    return chosen


@functools.cache
def _tuned(architecture: str, kernel: str, width: int, bits: int) -> Configuration | None:
    return table().get(architecture, {}).get(kernel, {}).get(f"{width}/{bits}")


def launch(kernel: Any, grid: tuple[int, ...], configuration: Configuration, **arguments: Any) -> None:
    """Runs `kernel` over `grid`; `configuration` gives its block sizes, num_warps and num_stages."""
    if 0 in grid:
        return
    arguments.update(configuration)
    num_warps, num_stages = arguments.pop("num_warps"), arguments.pop("num_stages")
    if _records:
        _records[-1].append(Launch(kernel, grid, arguments, num_warps, num_stages))
    else:
        direct.run(kernel, grid, arguments, num_warps, num_stages)


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot: for float32 what torch's own matrix products are set to, TF32 or IEEE."""
    return "tf32" if dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; Triton's own function takes microseconds."""
    return -(-a // b)
