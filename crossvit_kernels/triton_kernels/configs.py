"""How a kernel is launched: a frozen record, measured (tuned.json) or by default (defaults.py).

tuned.json, beside this file, is keyed by architecture, kernel and "<width>/<bits of the dtype>". Nothing is tuned
unless `benchmarks.tune` is asked to.
"""

import functools
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .target import architecture, pushed

TABLE = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True)
class Config:
    """A kernel's constexpr block sizes by name, its warps and pipeline stages, and the reason where it is no
    measurement."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int
    reason: str = field(default="", compare=False)

    def __getitem__(self, block: str) -> int:
        return self.blocks[block]

    @classmethod
    def of(cls, values: Mapping[str, int]) -> "Config":
        """The record of what tuned.json holds: block sizes, num_warps and num_stages in one mapping."""
        blocks = dict(values)
        return cls(num_warps=blocks.pop("num_warps"), num_stages=blocks.pop("num_stages"), blocks=blocks)

    def values(self) -> dict[str, int]:
        """The record as tuned.json holds it."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


_requests: list[dict[tuple[str, str], Config]] = []
_overrides: list[dict[str, Config]] = [{}]


def requests() -> AbstractContextManager[dict[tuple[str, str], Config]]:
    """Collects, by name and "<width>/<bits>", the configurations that launches inside take."""
    return pushed(_requests, {})


def overriding(kernel: str, config: Config) -> AbstractContextManager[dict[str, Config]]:
    """Inside, this kernel is launched with this configuration, whatever the table says."""
    return pushed(_overrides, {**_overrides[-1], kernel: config})


@functools.cache
def table() -> Mapping[str, Mapping[str, Mapping[str, Mapping[str, int]]]]:
    """{architecture: {kernel: {"<width>/<bits>": block sizes, num_warps and num_stages}}}, as measured."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def configuration(kernel: str, width: int, dtype: torch.dtype, default: Config) -> Config:
    """The configuration of `kernel` for rows of this width: the tuned one of this architecture, else `default`.

    `kernel` is the name of the jitted function, or of one of several ways to launch it. `default` has to fit every
    architecture from sm_80 on.
    """
    bits = dtype.itemsize * 8
    chosen = _overrides[-1].get(kernel) or _tuned(architecture(), kernel, width, bits) or default
    for taken in _requests:
        taken[kernel, f"{width}/{bits}"] = chosen
    return chosen


@functools.cache
def _tuned(architecture: str, kernel: str, width: int, bits: int) -> Config | None:
    values = table().get(architecture, {}).get(kernel, {}).get(f"{width}/{bits}")
    return None if values is None else Config.of(values)
