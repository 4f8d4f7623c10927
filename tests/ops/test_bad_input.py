"""A wrong shape, dtype, device, type or value raises an error that names the argument, what came, what was expected."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import crossvit_kernels
from inputs import EXAMPLES

Change = Callable[[Any], Any]


def wider(t: Tensor) -> Tensor:
    return torch.cat([t, t], dim=-1)


def bare(t: Tensor) -> Tensor:
    return t.reshape(-1)[0]


def to_list(t: Tensor) -> Any:
    return t.tolist()


def integer(t: Tensor) -> Tensor:
    return t.int()


def double(t: Tensor) -> Tensor:
    return t.double()


def half(t: Tensor) -> Tensor:
    return t.half()


def meta(t: Tensor) -> Tensor:
    return t.to("meta")


def sparse(t: Tensor) -> Tensor:
    return t.to_sparse()


CHANGES: list[tuple[Change, type[Exception]]] = [
    (wider, ValueError),
    (bare, ValueError),
    (to_list, TypeError),
    (integer, TypeError),
    (sparse, TypeError),
]
# Changes that are wrong beside the other arguments only.
MIXED: list[tuple[Change, type[Exception]]] = [(double, TypeError), (half, TypeError), (meta, ValueError)]
ANY_DTYPE = {
    ("linear_residual", "residual"),
    ("linear_residual", "scale"),
    ("layer_norm_mlp", "scale"),
    ("patch_embed", "cls_token"),
    ("patch_embed", "pos_embed"),
    ("cls_cross_attention", "cls"),
}
FIRST = {"x", "images", "qkv", "patches"}  # what the others are compared with: the error may name one of those


def cases() -> list[Any]:
    found = []
    for op, example in EXAMPLES.items():
        tensors = [name for name, value in example().items() if isinstance(value, Tensor)]
        for name in tensors:
            changes = CHANGES + (MIXED if name not in FIRST else [])
            for change, error in changes:
                if change is half and (op, name) in ANY_DTYPE:
                    continue
                if change is wider and name in ("qkv", "images"):  # six parts of a qkv are three; images are resized
                    continue
                found.append(pytest.param(op, name, change, error, id=f"{op}-{name}-{change.__name__}"))
    return found


@pytest.mark.parametrize("op, name, change, error", cases())
def test_a_wrong_tensor_is_named(op: str, name: str, change: Change, error: type[Exception]) -> None:
    given = EXAMPLES[op]()
    given[name] = change(given[name])
    with pytest.raises(error) as raised:
        getattr(crossvit_kernels, op)(**given)
    message = str(raised.value)
    assert "expected" in message
    assert "got" in message
    if name not in FIRST:
        assert message.startswith(f"{name}:") or (op, name) == ("cls_fusion", "cls"), message


@pytest.mark.parametrize("op", [op for op in EXAMPLES if "num_heads" in EXAMPLES[op]()])
@pytest.mark.parametrize(
    "heads, error", [(3, ValueError), (0, ValueError), (-2, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_a_wrong_head_count_is_named(op: str, heads: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^num_heads: expected .* got"):
        getattr(crossvit_kernels, op)(**(EXAMPLES[op]() | {"num_heads": heads}))


@pytest.mark.parametrize("op", ["layer_norm_linear", "layer_norm_mlp", "cls_cross_attention", "cls_fusion"])
@pytest.mark.parametrize(
    "eps, error", [(-1e-6, ValueError), (float("nan"), ValueError), ("1e-6", TypeError), (None, TypeError)]
)
def test_a_wrong_eps_is_named(op: str, eps: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^eps: expected .* got"):
        getattr(crossvit_kernels, op)(**(EXAMPLES[op]() | {"eps": eps}))


@pytest.mark.parametrize("name", ["activation", "pre_activation"])
def test_an_unknown_activation_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected None or 'gelu', got 'relu'"):
        crossvit_kernels.layer_norm_linear(**(EXAMPLES["layer_norm_linear"]() | {name: "relu"}))


@pytest.mark.parametrize(
    "image_size, error",
    [
        ((8, 10), ValueError),
        (0, ValueError),
        ((8, -4), ValueError),
        ((8,), TypeError),
        ("8", TypeError),
        (8.0, TypeError),
    ],
)
def test_a_wrong_image_size_is_named(image_size: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^image_size.*: expected .* got"):
        crossvit_kernels.patch_embed(**(EXAMPLES["patch_embed"]() | {"image_size": image_size}))


def test_images_that_the_patches_do_not_tile_are_named() -> None:
    with pytest.raises(ValueError, match=r"^images: expected .*multiples of the patch's 4, got 10 x 14"):
        crossvit_kernels.patch_embed(**(EXAMPLES["patch_embed"]() | {"image_size": None}))


def test_another_number_of_positions_is_named() -> None:
    given = EXAMPLES["patch_embed"]()
    with pytest.raises(ValueError, match=r"^pos_embed: expected shape \(1, 7, 16\), got \(1, 6, 16\)"):
        crossvit_kernels.patch_embed(**(given | {"pos_embed": given["pos_embed"][:, 1:]}))


@pytest.mark.parametrize(
    "scale", [torch.ones(3, 1, 1), torch.ones(2, 1), torch.ones(1), torch.ones(2, 5, 1), torch.ones(())]
)
@pytest.mark.parametrize("op", ["linear_residual", "layer_norm_mlp"])
def test_a_scale_of_another_shape_is_named(op: str, scale: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^scale: expected shape .* got"):
        getattr(crossvit_kernels, op)(**(EXAMPLES[op]() | {"scale": scale}))


def test_a_width_of_zero_is_named() -> None:
    empty = torch.empty(2, 3, 0)
    with pytest.raises(ValueError, match="width: expected at least 1, got 0"):
        crossvit_kernels.layer_norm_linear(empty, empty[0, 0], None, torch.empty(4, 0))
    with pytest.raises(ValueError, match=r"^qkv: expected"):
        crossvit_kernels.self_attention(empty, 1)


def test_three_parts_that_are_not_equal_are_named() -> None:
    with pytest.raises(ValueError, match=r"^qkv: expected three equal parts"):
        crossvit_kernels.self_attention(torch.ones(2, 3, 13), 1)


def test_float64_mixes_with_nothing_under_autocast_either() -> None:
    given = EXAMPLES["linear_residual"]()
    for context in (torch.autocast("cpu", torch.bfloat16), torch.no_grad()):
        with context, pytest.raises(TypeError, match=r"^residual: expected torch.float32 as x is, got torch.float64"):
            crossvit_kernels.linear_residual(**(given | {"residual": given["residual"].double()}))
