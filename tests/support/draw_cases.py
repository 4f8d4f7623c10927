"""What random calls draw of each op: shapes, optional arguments in each of their legal forms, kinds of tokens."""

import random
from collections.abc import Callable
from typing import Any

import inputs
from inputs import KINDS, Random

# Around the kernels' tiles and vectors, where mistakes are made.
EDGES = (7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192, 193)
NARROW = (1, 2, 3, 17)
SAMPLES = 16  # an rms error over fewer numbers is a matter of luck
EPSILONS = (0.0, 1e-6, 1e-6, 1e-5, 1e-3)
Make = Callable[[Random], dict[str, Any]]


class Sizes:
    """Random sizes; small ones for backends that run in an interpreter or an emulation."""

    def __init__(self, rng: random.Random, *, small: bool) -> None:
        self.rng, self.small = rng, small
        self.edges = [size for size in EDGES if size <= (65 if small else 193)]

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def width(self) -> int:
        if self.chance(0.2):
            return self.rng.choice(NARROW)
        if self.chance(0.03):
            return self.rng.randint(66, 130) if self.small else self.rng.randint(150, 400)
        return self.rng.choice(self.edges) if self.chance(0.4) else self.rng.randint(4, 40 if self.small else 150)

    def tokens(self) -> int:
        if self.chance(0.03):
            return self.rng.randint(50, 80) if self.small else self.rng.randint(80, 400)
        most = 20 if self.small else 50
        return self.rng.choice([e for e in self.edges if e <= most]) if self.chance(0.3) else self.rng.randint(1, most)

    def batch(self) -> int:
        return 0 if self.chance(0.03) else self.rng.choice((1, 1, 2, 3) if self.small else (1, 1, 2, 3, 5))

    def heads(self) -> tuple[int, int]:
        """(number of heads, width of all); now and then as many heads as columns."""
        heads = self.rng.randint(1, 4 if self.small else 6)
        if self.chance(0.15):
            return (heads := self.rng.choice((*NARROW, heads))), heads
        return heads, heads * self.rng.randint(1, 16 if self.small else 40)

    def rows(self, width: int) -> tuple[int, ...]:
        """The shape of tokens (..., width), of one to five dimensions: mostly (batch, tokens, width)."""
        rank = self.rng.choice((1, 2, 2, 3, 3, 3, 3, 3, 4, 5))
        if rank == 1:
            return (width,)
        if rank == 2:
            return (self.batch() if self.chance(0.3) else self.rng.randint(1, 40 if self.small else 60), width)
        if rank == 3:
            return (self.batch(), self.tokens(), width)
        return (self.batch(), *(self.rng.randint(1, 4) for _ in range(rank - 3)), min(self.tokens(), 20), width)


def _epsilon(rng: random.Random, kind: str, width: int) -> float:
    """Zero only where a token has a variance: without one both are NaN there, which says nothing."""
    eps = rng.choice(EPSILONS)
    return eps if eps or (kind != "constant tokens" and width > 3) else 1e-6


def _without_some_biases(rng: random.Random, names: tuple[str, ...]) -> tuple[str, ...]:
    """The biases that are to be None: all, none, or each by chance."""
    least = rng.choice((-1.0, -1.0, 0.5, 2.0))
    return tuple(name for name in names if rng.random() < least)


def _scale(sizes: Sizes, shape: tuple[int, ...]) -> tuple[tuple[int, ...], str | None]:
    """Which factor, and the shape with enough samples for it; a single token has no samples."""
    scale = sizes.rng.choice((None, "channel") if len(shape) == 1 else (None, "sample", "channel"))
    if scale == "sample" and shape[0]:
        shape = (SAMPLES + sizes.rng.randint(0, 4), *(min(n, 9) if sizes.small else n for n in shape[1:]))
    return shape, scale


def _without(given: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return given | dict.fromkeys(names)


def layer_norm_linear(sizes: Sizes) -> tuple[Make, str]:
    rng, shape = sizes.rng, sizes.rows(sizes.width())
    out, kind, none = sizes.width(), rng.choice(KINDS), _without_some_biases(rng, ("norm_bias", "bias"))
    options = {
        "pre_activation": rng.choice((None, None, "gelu")),
        "activation": rng.choice((None, "gelu")),
        "eps": _epsilon(rng, kind, shape[-1]),
    }

    def make(values: Random) -> dict[str, Any]:
        return _without(inputs.layer_norm_linear(values, *shape, out=out, kind=kind), none) | options

    return make, f"{shape} to {out}, {kind}, without {none}, {options}"


def linear_residual(sizes: Sizes) -> tuple[Make, str]:
    (shape, scale), out = _scale(sizes, sizes.rows(sizes.width())), sizes.width()
    none = _without_some_biases(sizes.rng, ("bias",))

    def make(values: Random) -> dict[str, Any]:
        return _without(inputs.linear_residual(values, *shape, out=out, scale=scale), none)

    return make, f"{shape} to {out}, scale {scale}, without {none}"


def layer_norm_mlp(sizes: Sizes) -> tuple[Make, str]:
    rng, (shape, scale) = sizes.rng, _scale(sizes, sizes.rows(sizes.width()))
    hidden, kind, none = sizes.width(), rng.choice(KINDS), _without_some_biases(rng, ("norm_bias", "b1", "b2"))
    eps = _epsilon(rng, kind, shape[-1])

    def make(values: Random) -> dict[str, Any]:
        given = inputs.layer_norm_mlp(values, *shape, hidden=hidden, kind=kind, scale=scale)
        return _without(given, none) | {"eps": eps}

    return make, f"{shape}, hidden {hidden}, {kind}, scale {scale}, eps {eps}, without {none}"


def self_attention(sizes: Sizes) -> tuple[Make, str]:
    batch, tokens, (heads, width) = sizes.batch(), sizes.tokens(), sizes.heads()
    make = lambda values: inputs.self_attention(values, batch, tokens, width, heads)  # noqa: E731
    return make, f"{batch} x {tokens} x {width}, {heads} heads"


def bicubic_resize(sizes: Sizes) -> tuple[Make, str]:
    rng = sizes.rng
    given, wanted = [(rng.randint(1, 70), rng.choice((rng.randint(1, 70), *EDGES))) for _ in range(2)]
    size: Any = rng.choice((wanted, wanted, wanted[0], list(wanted), given))
    batch, channels = sizes.batch(), rng.randint(1, 4)
    make = lambda values: inputs.bicubic_resize(values, batch, *given, size, channels=channels)  # noqa: E731
    return make, f"{batch} of {given} to {size}, {channels} channels"


def patch_embed(sizes: Sizes) -> tuple[Make, str]:
    rng = sizes.rng
    patch = rng.choice((rng.randint(1, 16), 1, 4, 12, 16))
    most, pixels = (3, 24) if sizes.small else (5, 70)
    if sizes.small:
        patch = min(patch, 8)
    rows, columns = rng.randint(1, most), rng.randint(1, most)
    form = rng.choice(("as they come", "a pair", "a pair", "an int", "their own size"))
    if form == "an int":
        columns = rows
    size = (patch * rows, patch * columns)
    given = size if form in ("as they come", "their own size") else (rng.randint(1, pixels), rng.randint(1, pixels))
    image_size = {"as they come": None, "an int": size[0]}.get(form, size)
    options: dict[str, Any] = dict(
        patch=patch, embed=sizes.width(), channels=rng.randint(1, 4), image_size=image_size, bias=not sizes.chance(0.25)
    )
    batch = sizes.batch()
    make = lambda values: inputs.patch_embed(values, batch, *given, **options)  # noqa: E731
    return make, f"{batch} of {given}, {options}"


def cls_cross_attention(sizes: Sizes) -> tuple[Make, str]:
    rng, batch, tokens, (heads, width) = sizes.rng, sizes.batch(), sizes.tokens(), sizes.heads()
    kind, none = rng.choice(KINDS), _without_some_biases(rng, ("norm_bias", "q_bias", "k_bias", "v_bias"))
    eps = _epsilon(rng, kind, width)

    def make(values: Random) -> dict[str, Any]:
        given = inputs.cls_cross_attention(values, batch, tokens, width, heads, kind=kind)
        return _without(given, none) | {"eps": eps}

    return make, f"{batch} x {tokens} x {width}, {heads} heads, {kind}, eps {eps}, without {none}"


def cls_fusion(sizes: Sizes) -> tuple[Make, str]:
    rng, batch, tokens, (heads, width), own = sizes.rng, sizes.batch(), sizes.tokens(), sizes.heads(), sizes.width()
    parts = ("proj_norm", "proj", "norm", "q", "k", "v", "out", "revert_norm", "revert")
    kind, none = rng.choice(KINDS), _without_some_biases(rng, tuple(f"{part}_bias" for part in parts))
    eps = _epsilon(rng, kind, min(width, own))

    def make(values: Random) -> dict[str, Any]:
        given = inputs.cls_fusion(values, batch, tokens, own, width, heads, kind=kind)
        return _without(given, none) | {"eps": eps}

    return make, f"{batch}, {own} to {tokens} x {width}, {heads} heads, {kind}, eps {eps}, without {none}"


CASES: dict[str, Callable[[Sizes], tuple[Make, str]]] = {
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
