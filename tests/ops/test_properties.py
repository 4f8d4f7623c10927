"""Over shapes, strides and dtypes of hypothesis' choice every op equals its reference, forward and every gradient."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

import crossvit_kernels
import inputs
from available import computes, interpreted
from inputs import KINDS, LAYOUTS, Random
from numerics import PRECISIONS, check

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]
width, batch, tokens = st.integers(2, 150), st.integers(1, 5), st.integers(1, 80)
samples = st.integers(16, 24)  # an rms error over fewer numbers is a matter of luck
kinds, layouts = st.sampled_from(KINDS), st.sampled_from([None, None, *LAYOUTS])
scales = st.sampled_from([None, "sample", "channel"])
activations = st.sampled_from([None, "gelu"])


def layer_norm_linear(draw: Draw, rng: Random) -> dict[str, Any]:
    shape = draw(batch), draw(tokens), draw(width.filter(lambda d: d > 3))
    given = inputs.layer_norm_linear(rng, *shape, out=draw(width), kind=draw(kinds), bias=draw(st.booleans()))
    return given | {"pre_activation": draw(activations), "activation": draw(activations)}


def linear_residual(draw: Draw, rng: Random) -> dict[str, Any]:
    scale = draw(scales)
    shape = draw(samples if scale == "sample" else batch), draw(tokens), draw(width)
    return inputs.linear_residual(rng, *shape, out=draw(width), bias=draw(st.booleans()), scale=scale)


def layer_norm_mlp(draw: Draw, rng: Random) -> dict[str, Any]:
    scale = draw(scales)
    shape = draw(samples if scale == "sample" else batch), draw(tokens), draw(width.filter(lambda d: d > 3))
    return inputs.layer_norm_mlp(
        rng, *shape, hidden=draw(width), kind=draw(kinds), bias=draw(st.booleans()), scale=scale
    )


def self_attention(draw: Draw, rng: Random) -> dict[str, Any]:
    heads = draw(st.integers(1, 6))
    return inputs.self_attention(
        rng, draw(batch), draw(tokens.filter(lambda n: n > 1)), heads * draw(st.integers(1, 70)), heads
    )


def bicubic_resize(draw: Draw, rng: Random) -> dict[str, Any]:
    (height, width), size = (draw(st.tuples(st.integers(1, 70), st.integers(1, 70))) for _ in range(2))
    return inputs.bicubic_resize(rng, draw(batch), height, width, size, channels=draw(st.integers(1, 4)))


def patch_embed(draw: Draw, rng: Random) -> dict[str, Any]:
    patch, sides = draw(st.integers(1, 16)), st.integers(1, 5)
    size = patch * draw(sides), patch * draw(sides)
    resized = draw(st.booleans())
    given = (draw(st.integers(1, 70)), draw(st.integers(1, 70))) if resized else size
    return inputs.patch_embed(
        rng,
        draw(batch),
        *given,
        patch=patch,
        embed=draw(width),
        channels=draw(st.integers(1, 4)),
        image_size=size if resized else None,
        bias=draw(st.booleans()),
    )


def cls_cross_attention(draw: Draw, rng: Random) -> dict[str, Any]:
    heads = draw(st.integers(1, 6))
    head_width = draw(st.integers(4 if heads > 3 else 16, 40))
    return inputs.cls_cross_attention(
        rng,
        draw(batch),
        draw(tokens.filter(lambda n: n > 3)),
        heads * head_width,
        heads,
        kind=draw(kinds),
        bias=draw(st.booleans()),
    )


def cls_fusion(draw: Draw, rng: Random) -> dict[str, Any]:
    heads = draw(st.integers(1, 6))
    own_width, other = draw(width.filter(lambda d: d > 3)), heads * draw(st.integers(4, 40))
    return inputs.cls_fusion(rng, draw(batch), draw(tokens), own_width, other, heads, bias=draw(st.booleans()))


CASES = {f.__name__: f for f in (
    layer_norm_linear, linear_residual, layer_norm_mlp, self_attention, bicubic_resize, patch_embed,
    cls_cross_attention, cls_fusion
)}  # fmt: skip
STRIDED = {"x", "residual", "qkv", "images", "patches"}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(backend: str, name: str) -> None:
    examples = 2 if interpreted(backend) else 16

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        equals_the_reference(backend, name, data)

    run()


def equals_the_reference(backend: str, name: str, data: st.DataObject) -> None:
    rng = Random(data.draw(st.integers(0, 1000), label="seed"))
    values = CASES[name](data.draw, rng)
    for key in STRIDED & values.keys():
        layout = data.draw(layouts, label=f"layout of {key}")
        if layout is not None and isinstance(values[key], Tensor):
            values[key] = inputs.arrange(values[key], layout)
    own = [p for p in PRECISIONS if computes(backend, p)]
    precision = data.draw(st.sampled_from(own), label="precision")
    check(
        getattr(crossvit_kernels, name),
        values,
        precision,
        backend,
        gradients=name != "cls_fusion",
        zero={"grad k_bias": 0.0},
    )
