"""Inputs of the ops drawn at random: for random_calls.py, each from a seed, an index and a backend alone."""

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import inputs
from crossvit_kernels import backends
from draw_cases import CASES, Sizes
from inputs import LAYOUTS, Random
from numerics import AUTOCAST, AUTOCAST16, BFLOAT16, DEVICES, FLOAT16, FLOAT32, Precision

ACTIVATIONS = ("cls", "images", "patches", "qkv", "residual", "x")
# Which inputs may be float32 where the others have 16 bits; those in one group together.
WIDE: dict[str, tuple[tuple[str, ...], ...]] = {
    "layer_norm_linear": (("norm_weight", "norm_bias"),),
    "linear_residual": (("residual",), ("scale",)),
    "layer_norm_mlp": (("norm_weight", "norm_bias"), ("scale",)),
    "patch_embed": (("cls_token",), ("pos_embed",)),
    "cls_cross_attention": (("norm_weight", "norm_bias"),),
    "cls_fusion": tuple((f"{name}norm_weight", f"{name}norm_bias") for name in ("proj_", "", "revert_")),
}
# What each backend is drawn in, as far as it computes in that here.
PRECISIONS = {
    "cpu": (FLOAT32, FLOAT32, BFLOAT16, AUTOCAST),
    "triton": (FLOAT32, FLOAT16, AUTOCAST16),
    "cuda": (FLOAT32, BFLOAT16, FLOAT16, AUTOCAST, AUTOCAST16),
}


def slow(backend: str) -> bool:
    """Whether the backend's kernels run here without the GPU that they are written for."""
    return backend != "cpu" and DEVICES[backend] == "cpu"


@dataclass(frozen=True)
class Draw:
    """A call: the op, the backend, its inputs, the precision and threads it runs with, the inputs that stay float32
    where the others have 16 bits, and the inputs of which some gradients are asked for."""

    op: str
    backend: str
    description: str
    precision: Precision
    threads: int
    wide: frozenset[str]
    make: Callable[[int], dict[str, Any]] = field(repr=False)
    chosen: random.Random = field(repr=False)

    @functools.cached_property
    def values(self) -> dict[str, Any]:
        return self.make(0)

    @functools.cached_property
    def some(self) -> list[str]:
        """A part of the tensors, at least one."""
        tensors = [name for name, v in self.values.items() if isinstance(v, Tensor)]
        return self.chosen.sample(tensors, self.chosen.randint(1, len(tensors)))

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of this input."""
        return torch.float32 if name in self.wide else self.precision.inputs

    def others(self, count: int) -> Iterator["Draw"]:
        """The same with other values."""
        for i in range(1, count + 1):
            make = functools.partial(lambda number, _: self.make(number), i)
            yield Draw(
                self.op, self.backend, self.description, self.precision, self.threads, self.wide, make, self.chosen
            )

    def __str__(self) -> str:
        wide = f", {sorted(self.wide)} in float32" if self.wide else ""
        return f"{self.op}({self.description}){wide}, {self.backend}, {self.precision}, {self.threads} threads"


def ops_of(backend: str, ops: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the ops that the backend has kernels for; of the others the reference would be held to itself."""
    return tuple(op for op in ops if backends.serves(backend, op))


def draw(seed: int, index: int, ops: tuple[str, ...], backend: str = "cpu") -> Draw:
    """The draw of this index among those of these ops."""
    rng = random.Random(f"{seed}/{index}" if backend == "cpu" else f"{seed}/{index}/{backend}")
    op = rng.choice(ops)
    known = [p for p in PRECISIONS[backend] if (p.autocast or p.inputs) in backends.dtypes(backend)]
    precision, threads = rng.choice(known), rng.choice((1, 1, 1, 1, 2, 3))
    case, said = CASES[op](Sizes(rng, small=slow(backend)))
    layouts = {name: rng.choice((None, None, *LAYOUTS, *MORE)) for name in ACTIVATIONS}
    parameters = rng.randint(0, 2**31)
    wide = {name for group in WIDE.get(op, ()) if rng.random() < 0.3 for name in group}

    def make(number: int) -> dict[str, Any]:
        values, turns = case(Random(hash((seed, index, number)) % 2**31)), random.Random(parameters)
        eps = values.get("eps", 1.0)
        for name, value in values.items():
            if not isinstance(value, Tensor):
                continue
            if name not in ACTIVATIONS:
                values[name] = _parameter(turns, value)
            elif (layout := layouts[name]) is not None and _possible(layout, value, eps):
                values[name] = MORE[layout](value) if layout in MORE else inputs.arrange(value, layout)
        return values

    first = make(0)
    words = {n: layout for n, layout in layouts.items() if layout and n in first and _possible(layout, first[n], 1.0)}
    narrow = precision.inputs.itemsize == 2
    return Draw(
        op,
        backend,
        f"{said} {words}",
        precision,
        threads,
        frozenset(wide if narrow else ()) & first.keys(),
        make,
        rng,
    )


def _columns(x: Tensor) -> Tensor:
    """Some of the columns of wider memory."""
    memory = x.new_full((*x.shape[:-1], x.shape[-1] + 5), torch.nan)
    memory[..., 2:-3] = x
    return memory[..., 2:-3]


def _reversed(x: Tensor) -> Tensor:
    """The dimensions in the other order in memory."""
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


MORE: dict[str, Callable[[Tensor], Tensor]] = {
    "columns": _columns,
    "reversed": _reversed,
    "expanded tokens": lambda x: x[:, :1].expand_as(x),
    "one value a row": lambda x: x[..., :1].expand_as(x),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
}


def _possible(layout: str, x: Tensor, eps: float) -> bool:
    """Whether x has the dimensions that the layout speaks of. A token of one value has no variance."""
    if layout == "one value a row" or (x.dim() == 1 and layout == "expanded"):
        return eps > 0
    if layout == "channels last":
        return x.dim() == 4
    if layout == "expanded tokens":
        return x.dim() > 2
    return x.dim() > 1 or layout in ("every other element", "columns", "reversed")


def _parameter(rng: random.Random, value: Tensor) -> Tensor:
    """A parameter, mostly as it is; else transposed in memory, a part of larger memory, or, where it is no matrix, one
    number for all."""
    kind = rng.random()
    if kind < 0.1:
        return _reversed(value)
    if kind < 0.2:
        return inputs.arrange(value, "every other element")
    if kind < 0.23 and sum(size > 1 for size in value.shape) < 2:
        return value.flatten()[:1].view([1] * value.dim()).expand_as(value)
    return value


def calls_each(ops: tuple[str, ...]) -> float:
    """About how many calls a draw makes: nine, or four for cls_fusion, which has no backward."""
    return sum(4 if op == "cls_fusion" else 9 for op in ops) / len(ops)
