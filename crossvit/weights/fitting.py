"""A file's weights made to fit a model: positions of another size, other channels, another head, tensors of several
names; and the check that the whole fits, before a single tensor is copied.
"""

import logging
import math
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ..models.branch_images import branch_size
from ..models.classifier import Classifier
from ..models.positions import resample_positions
from .notes import hidden_settings, whole_arguments
from .wording import kind, some

_log = logging.getLogger(__name__)


def noted_grids(noted: Mapping[str, Any], image_size: tuple[int, int], model: Classifier) -> dict[str, tuple[int, int]]:
    """Rows and columns of the patches that a file's positions are of, by name, with the size of the patches and the
    scales of the branches that its notes have.
    """
    theirs, grids = whole_arguments(noted), model.position_grids(image_size)
    patches, scales = theirs.get("patch_size"), theirs.get("img_scale", [1.0])
    if isinstance(patches, int):
        patches = [patches]
    if not isinstance(patches, list) or not isinstance(scales, list) or not len(patches) == len(scales) == len(grids):
        return grids
    if not all(isinstance(value, int | float) and 0 < value < 1e6 for value in patches + scales):
        return grids
    for name, scale, patch in zip(grids, scales, patches):
        height, width = branch_size(image_size, scale, patch)
        grids[name] = (int(height // patch), int(width // patch))
    return grids


def fit_positions(
    state: dict[str, Tensor],
    model: Classifier,
    image_size: tuple[int, int] | None,
    grids: dict[str, tuple[int, int]] | None,
    path: str | PathLike[str],
) -> None:
    """Resamples the positions in `state` to the model's grids, where they are of another and of the right width. grids:
    those that they are of, where `image_size` says it. Raises ValueError where they are not of `grids`, or, without
    `grids`, of no square.
    """
    own = model.position_grids()
    widths = {name: model.get_parameter(name).shape[-1] for name in own}
    names = [name for name in own if name in state and state[name].shape[::2] == (1, widths[name])]
    counts = {name: state[name].shape[1] - 1 for name in names}
    if grids is not None:
        if wrong := [
            f"{name}: {counts[name]} patches, not {math.prod(grids[name])}"
            for name in names
            if math.prod(grids[name]) != counts[name]
        ]:
            raise ValueError(f"{path} was not made for image_size={image_size}: {', '.join(wrong)}")
    elif all(counts[name] == math.prod(own[name]) for name in names):
        return
    else:
        sides = {name: math.isqrt(max(0, count)) for name, count in counts.items()}
        if any(sides[name] ** 2 != count for name, count in counts.items()):
            raise ValueError(
                f"{path} was made for images that are not square ({counts} patches): give load_checkpoint their "
                "image_size=(height, width)"
            )
        grids = {name: (side, side) for name, side in sides.items()}
    for name in names:
        if grids[name] != own[name]:
            _log.info("%s: %s resampled from %s to %s patches", path, name, grids[name], own[name])
            state[name] = resample_positions(state[name], grids[name], own[name])


def fit_channels(state: dict[str, Tensor], model: Classifier) -> None:
    """Adapts the first convolution of every branch to the model's channels, as timm: summed for one, else repeated and
    scaled.
    """
    for name in model.first_convolutions():
        weight = state.get(f"{name}.weight")
        if weight is None or weight.dim() != 4 or weight.shape[1] == model.in_chans:
            continue
        channels, wanted = weight.shape[1], model.in_chans
        adapted = weight.float()
        if wanted == 1:
            adapted = adapted.sum(dim=1, keepdim=True)
        else:
            adapted = adapted.repeat(1, -(-wanted // channels), 1, 1)[:, :wanted] * (channels / wanted)
        state[f"{name}.weight"] = adapted.to(weight.dtype)


def fit_head(state: dict[str, Tensor], model: Classifier, expected: Mapping[str, Tensor]) -> list[str]:
    """Leaves a head out of `state` that the model has not, or in another size; returns what to tell about it."""
    own = {key: value for key, value in expected.items() if key.startswith("head.")}
    theirs = {key: value for key, value in state.items() if key.startswith("head.")}
    classes = {value.shape[0] for value in theirs.values()}
    if not own or not theirs or classes != {model.num_classes}:
        for key in theirs:
            del state[key]
        state.update(own)
        if own:
            held = f"a head of {', '.join(map(str, sorted(classes)))} classes" if theirs else "no head"
            return [f"it has {held}; the model's, of {model.num_classes}, starts from initial weights"]
    return []


def fit_ties(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Gives each name of a tensor that the model has under several what the file has under one of them."""
    for names in _ties(expected):
        if held := [name for name in names if name in state]:
            state |= {name: state[held[0]] for name in names if name not in state}


def _ties(expected: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of every tensor of a model's state dict that has more than one."""
    places: dict[tuple[Any, ...], list[str]] = {}
    for key, value in expected.items():
        if type(value) is Tensor and not value.is_meta and value.numel():
            place = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
            places.setdefault(place, []).append(key)
    return [names for names in places.values() if len(names) > 1]


def other_settings(noted: Mapping[str, Any], model: Classifier) -> list[tuple[str, Any, Any]]:
    """(name, the file's value, the model's) of what a file's notes have otherwise than the model and shapes do not
    show.
    """
    theirs = whole_arguments(noted)
    own = hidden_settings(model).items()
    return [(name, theirs[name], value) for name, value in own if name in theirs and theirs[name] != value]


def check(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], settings: list[str], what: str) -> None:
    """Raises ValueError, which begins with `what` and lists all that is wrong, unless `state` has the names and shapes
    that are `expected`, in tensors that can be copied, and there are no other `settings`.
    """
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    known = [(key, state[key]) for key in expected if key in state]
    dtypes = [f"{key} {kind(value)}" for key, value in known if not value.is_floating_point()]
    kinds = [f"{key} {kind(value)}" for key, value in known if value.is_floating_point() and not _readable(value)]
    apart = [
        " and ".join(names)
        for names in _ties(expected)
        if all(name in state and state[name].shape == state[names[0]].shape for name in names)
        and not all(torch.equal(state[name], state[names[0]]) for name in names)
    ]
    faults = [
        f"\n  {len(names)} {kind}: {some(names)}"
        for kind, names in [
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
            ("not of floating point", dtypes),
            ("that cannot be copied", kinds),
            ("one tensor in the model, but different ones in the file", apart),
            ("of another setting", settings),
        ]
        if names
    ]
    if not faults:
        return
    hint = ""
    if shapes and all(key.startswith(("head.", "patch_embed.")) for key in (s.split()[0] for s in shapes)):
        hint = "\n  create_model(..., checkpoint=…) starts a new head and adapts the input channels"
    raise ValueError(f"{what}; the model is as it was:{''.join(faults)}{hint}")


def _readable(value: Tensor) -> bool:
    """Whether numbers of floating point can be copied into a parameter."""
    if value.layout != torch.strided or value.is_meta:
        return False
    try:
        value.flatten()[:1].float()
    except (RuntimeError, NotImplementedError):  # packed numbers
        return False
    return True
