"""Inputs of the ops drawn at random: for tests/random_calls.py, each from a seed and an index alone."""

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import inputs
from inputs import KINDS, LAYOUTS, Random
from numerics import AUTOCAST, BFLOAT16, FLOAT32, Precision

# Around the kernels' tiles and vectors, where mistakes are made.
EDGES = (7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192, 193)
STRIDED = {"x", "residual", "qkv", "images", "patches"}
MATRICES = {"weight", "w1", "w2", "q_weight", "k_weight", "v_weight", "proj_weight", "out_weight", "revert_weight"}
SAMPLES = 16  # an rms error over fewer numbers is a matter of luck
Make = Callable[[Random], dict[str, Any]]


@dataclass(frozen=True)
class Draw:
    """A call: the op, its inputs, the precision and threads it runs with, and the inputs of which some gradients are
    asked for."""

    op: str
    description: str
    precision: Precision
    threads: int
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

    def others(self, count: int) -> Iterator["Draw"]:
        """The same with other values."""
        for i in range(1, count + 1):
            make = functools.partial(lambda number, _: self.make(number), i)
            yield Draw(self.op, self.description, self.precision, self.threads, make, self.chosen)

    def __str__(self) -> str:
        return f"{self.op}({self.description}), {self.precision}, {self.threads} threads"


def draw(seed: int, index: int, ops: tuple[str, ...]) -> Draw:
    """The draw of this index among those of these ops."""
    rng = random.Random(f"{seed}/{index}")
    op = rng.choice(ops)
    precision = rng.choice((FLOAT32, FLOAT32, BFLOAT16, AUTOCAST))
    threads = rng.choice((1, 1, 1, 1, 2, 3))
    case, said = CASES[op](rng)
    layouts = {name: rng.choice((None, None, *LAYOUTS)) for name in sorted(STRIDED)}
    turned = {name for name in sorted(MATRICES) if rng.random() < 0.15}

    def make(number: int) -> dict[str, Any]:
        values = case(Random(hash((seed, index, number)) % 2**31))
        for name, value in values.items():
            if not isinstance(value, Tensor):
                continue
            if name in STRIDED and layouts[name] is not None:
                values[name] = inputs.arrange(value, layouts[name])
            elif name in turned and value.dim() == 2:
                values[name] = value.t().contiguous().t()
        return values

    words = {name: layout for name, layout in layouts.items() if layout} | ({"transposed": turned} if turned else {})
    return Draw(op, f"{said} {words}", precision, threads, make, rng)


def calls_each(ops: tuple[str, ...]) -> float:
    """How many calls a draw comes to, about: nine, for cls_fusion, which has no backward, four."""
    return sum(4 if op == "cls_fusion" else 9 for op in ops) / len(ops)


def _width(rng: random.Random, least: int = 4, most: int = 150) -> int:
    if rng.random() < 0.03:
        return rng.randint(150, 400)
    return max(least, rng.choice(EDGES) if rng.random() < 0.4 else rng.randint(least, most))


def _tokens(rng: random.Random, least: int = 1) -> int:
    if rng.random() < 0.03:
        return rng.randint(80, 400)
    return max(least, rng.choice(EDGES[:18]) if rng.random() < 0.3 else rng.randint(least, 50))


def _batch(rng: random.Random) -> int:
    return 0 if rng.random() < 0.01 else rng.choice((1, 1, 2, 3, 5))


def _rows(rng: random.Random, width: int) -> tuple[int, ...]:
    """The shape of tokens (..., width): mostly (batch, tokens, width)."""
    if rng.random() < 0.1:
        return (rng.randint(1, 60), width)
    return (_batch(rng), _tokens(rng), width)


def _bias(rng: random.Random) -> bool:
    return rng.random() < 0.75


def _scale(rng: random.Random, shape: tuple[int, ...]) -> tuple[tuple[int, ...], str | None]:
    """Which factor, and the shape with enough samples for it."""
    scale = rng.choice((None, "sample", "channel"))
    return ((SAMPLES + rng.randint(0, 4), *shape[1:]) if scale == "sample" else shape), scale


def layer_norm_linear(rng: random.Random) -> tuple[Make, str]:
    shape, out, kind, bias = _rows(rng, _width(rng)), _width(rng, 1), rng.choice(KINDS), _bias(rng)
    options = {
        "pre_activation": rng.choice((None, None, "gelu")),
        "activation": rng.choice((None, "gelu")),
        "eps": rng.choice((1e-6, 1e-5, 1e-3)),
    }
    make = lambda values: inputs.layer_norm_linear(values, *shape, out=out, kind=kind, bias=bias) | options  # noqa: E731
    return make, f"{shape} to {out}, {kind}, bias {bias}, {options}"


def linear_residual(rng: random.Random) -> tuple[Make, str]:
    (shape, scale), out, bias = _scale(rng, _rows(rng, _width(rng, 1))), _width(rng, 1), _bias(rng)
    make = lambda values: inputs.linear_residual(values, *shape, out=out, bias=bias, scale=scale)  # noqa: E731
    return make, f"{shape} to {out}, bias {bias}, scale {scale}"


def layer_norm_mlp(rng: random.Random) -> tuple[Make, str]:
    shape, scale = _scale(rng, _rows(rng, _width(rng)))
    hidden, kind, bias, eps = _width(rng, 1), rng.choice(KINDS), _bias(rng), rng.choice((1e-6, 1e-5, 1e-3))

    def make(values: Random) -> dict[str, Any]:
        given = inputs.layer_norm_mlp(values, *shape, hidden=hidden, kind=kind, bias=bias, scale=scale)
        return given | {"eps": eps}

    return make, f"{shape}, hidden {hidden}, {kind}, bias {bias}, scale {scale}, eps {eps}"


def self_attention(rng: random.Random) -> tuple[Make, str]:
    batch, tokens, heads = _batch(rng), _tokens(rng, 2), rng.randint(1, 6)
    width = heads * rng.choice((rng.randint(1, 70), 32, 64))
    make = lambda values: inputs.self_attention(values, batch, tokens, width, heads)  # noqa: E731
    return make, f"{batch} x {tokens} x {width}, {heads} heads"


def bicubic_resize(rng: random.Random) -> tuple[Make, str]:
    sizes = [(rng.randint(1, 70), rng.choice((rng.randint(1, 70), *EDGES))) for _ in range(2)]
    batch, channels = _batch(rng), rng.randint(1, 4)
    make = lambda values: inputs.bicubic_resize(values, batch, *sizes[0], sizes[1], channels=channels)  # noqa: E731
    return make, f"{batch} of {sizes[0]} to {sizes[1]}, {channels} channels"


def patch_embed(rng: random.Random) -> tuple[Make, str]:
    patch = rng.choice((rng.randint(1, 16), 12, 16))
    size = (patch * rng.randint(1, 5), patch * rng.randint(1, 5))
    resized = rng.random() < 0.5
    given = (rng.randint(1, 70), rng.randint(1, 70)) if resized else size
    options: dict[str, Any] = dict(
        patch=patch,
        embed=_width(rng, 2),
        channels=rng.randint(1, 4),
        image_size=size if resized else None,
        bias=_bias(rng),
    )
    batch = _batch(rng)
    make = lambda values: inputs.patch_embed(values, batch, *given, **options)  # noqa: E731
    return make, f"{batch} of {given}, {options}"


def cls_cross_attention(rng: random.Random) -> tuple[Make, str]:
    batch, tokens, heads, kind, bias = _batch(rng), _tokens(rng, 4), rng.randint(1, 6), rng.choice(KINDS), _bias(rng)
    width, eps = heads * rng.randint(4 if heads > 3 else 16, 40), rng.choice((1e-6, 1e-5, 1e-3))

    def make(values: Random) -> dict[str, Any]:
        given = inputs.cls_cross_attention(values, batch, tokens, width, heads, kind=kind, bias=bias)
        return given | {"eps": eps}

    return make, f"{batch} x {tokens} x {width}, {heads} heads, {kind}, bias {bias}, eps {eps}"


def cls_fusion(rng: random.Random) -> tuple[Make, str]:
    batch, tokens, heads, kind, bias = _batch(rng), _tokens(rng), rng.randint(1, 6), rng.choice(KINDS), _bias(rng)
    own, width = _width(rng), heads * rng.randint(4, 40)
    make = lambda values: inputs.cls_fusion(values, batch, tokens, own, width, heads, kind=kind, bias=bias)  # noqa: E731
    return make, f"{batch}, {own} to {tokens} x {width}, {heads} heads, {kind}, bias {bias}"


CASES: dict[str, Callable[[random.Random], tuple[Make, str]]] = {
    f.__name__: f
    for f in (
        layer_norm_linear,
        linear_residual,
        layer_norm_mlp,
        self_attention,
        bicubic_resize,
        patch_embed,
        cls_cross_attention,
        cls_fusion,
    )
}
