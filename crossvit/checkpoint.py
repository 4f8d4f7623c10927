"""Weights in and out: timm's and the authors' files, `.safetensors` or torch's, checked as a whole before a single
tensor is copied.

timm's state dicts and the authors' differ in two names per branch (pos_embed_0 there is pos_embed.0 here, likewise
cls_token). The authors' training checkpoints hold the state dict under "model", beside the command line's
argparse.Namespace under "args".
"""

import logging
import math
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint_file import kind, read_checkpoint, some
from .classifier import Classifier, to_size
from .files import replacing
from .identify import identify
from .model import branch_size
from .notes import hidden_settings, notes, read_notes, whole_arguments
from .positions import resample_positions

LAYOUTS = ("timm", "authors")
_log = logging.getLogger(__name__)


def load_checkpoint(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    adapt: bool = False,
    image_size: int | tuple[int, int] | None = None,
) -> None:
    """Copies the weights of a file into `model`, all of them or, if anything is wrong, none.

    path: a file of timm's or the authors' (raw state dict or training checkpoint), `.safetensors` or torch's own, read
    with weights_only=True; or a name on timm's hub, such as "timm/crossvit_9_240.in1k", which needs huggingface_hub and
    a network. Positions of another image size are resampled. The file's grid is taken to be square unless it says
    otherwise or `image_size`, the input (height, width) it was made for, is given. adapt: first convolutions of another
    channel count are adapted too, as timm does it, and a head of another number of classes is left out, which a warning
    says; without it both are errors.

    Of a training checkpoint the averaged weights are taken where it has them, as timm's own loader does. Where the
    file's notes name another fusion, number of heads, patch size, crop_scale or pooling than the model's, it does not
    fit: the same weights would compute another function. Pooling goes with the head: where `adapt` leaves that out,
    another pooling is only said. A model on the meta device has no values to copy into: the file is
    checked, and a warning says that nothing was loaded.

    Raises FileNotFoundError (no such file, or the hub gave none), ValueError (truncated, no checkpoint, with objects
    that are not loaded for safety, or of another model: the message lists what is missing, unexpected, of another shape
    or setting, and names what was found) and TypeError (`model` is not one of this package).
    """
    load_state(model, *read_checkpoint(path), path, adapt=adapt, image_size=image_size)


def load_state(
    model: nn.Module,
    state: dict[str, Tensor],
    metadata: Mapping[str, str],
    path: str | PathLike[str],
    *,
    adapt: bool = False,
    image_size: int | tuple[int, int] | None = None,
    asked: Collection[str] = (),
) -> None:
    """`load_checkpoint` of what `read_checkpoint` has read from `path`; `state` is changed. asked: arguments that the
    model was given on purpose, which are only said where the file's notes have others.
    """
    target, noted = _unwrap(model), read_notes(metadata)
    if image_size is None and "image_size" in noted:
        height, width = map(int, noted["image_size"].split("x"))
        image_size = (height, width)
    expected = target.state_dict()
    found = identify(state)
    told: list[str] = []
    size = None if image_size is None else to_size(image_size)
    _fit_positions(state, target, size, None if size is None else _grids(noted, size, target), path)
    _fit_ties(state, expected)
    asked = set(asked)
    if adapt:
        _fit_channels(state, target)
        told = _fit_head(state, target, expected)
        if told or target.num_classes == 0:
            asked.add("global_pool")
    others = _other_settings(noted, target)
    told += [
        f"it was made with {name}={theirs!r}, the model has {own!r}" for name, theirs, own in others if name in asked
    ]
    settings = [f"{name} {theirs!r} instead of {own!r}" for name, theirs, own in others if name not in asked]
    what = f"{path} holds {found}, which does not fit {target.variant or type(target).__name__}"
    _check(state, expected, settings, what)
    if any(value.is_meta for value in expected.values()):
        told = [
            "its weights fit, but none was loaded: the model is on the meta device, which holds no values "
            "(model.to_empty(device=…), then load_checkpoint)"
        ]
    else:
        target.load_state_dict(state)
    for note in told:
        warnings.warn(f"{path}: {note}", stacklevel=3)


def save_checkpoint(
    model: nn.Module,
    path: str | PathLike[str],
    layout: str = "timm",
    *,
    classes: Sequence[str] | None = None,
    crop_ratio: float | None = None,
    multi_label: bool | None = None,
) -> None:
    """Writes the model's state dict with timm's keys or, layout="authors", the authors': `.safetensors` by that suffix,
    else torch's format.

    A `.safetensors` file also holds the model's `notes`, from which `load_model` builds it again. The file appears
    under its name only when it is complete. A tensor that the model has under several names is in it under each.
    Raises ValueError for another layout or number of classes and a model without values (on the meta device), TypeError
    for another kind of model.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    target, path = _unwrap(model), Path(path)
    metadata = {"format": "pt"} | notes(target, classes, crop_ratio, multi_label)
    if empty := [key for key, value in target.state_dict().items() if value.is_meta]:
        raise ValueError(f"model has no values to save on the meta device: {some(empty)}")
    state = {key: value.detach().cpu().contiguous() for key, value in target.state_dict().items()}
    if layout == "authors":
        state = {re.sub(r"^(pos_embed|cls_token)_(\d+)$", r"\1.\2", key): value for key, value in state.items()}
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(_apart(state), temporary, metadata)
        else:
            torch.save(state, temporary)


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor with memory of its own, which `.safetensors` files need."""
    apart, taken = {}, set()
    for key, value in state.items():
        storage = value.untyped_storage()
        shared = storage.data_ptr() in taken or storage.nbytes() != value.nbytes
        taken.add(storage.data_ptr())
        apart[key] = value.clone() if shared else value
    return apart


def _grids(noted: Mapping[str, Any], image_size: tuple[int, int], model: Classifier) -> dict[str, tuple[int, int]]:
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


def _fit_positions(
    state: dict[str, Tensor],
    model: Classifier,
    image_size: tuple[int, int] | None,
    grids: dict[str, tuple[int, int]] | None,
    path: str | PathLike[str],
) -> None:
    """Resamples the positions in `state` to the model's grids, where they are of another and of the right width. grids:
    those that they are of, where `image_size` says it.
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


def _fit_channels(state: dict[str, Tensor], model: Classifier) -> None:
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


def _fit_head(state: dict[str, Tensor], model: Classifier, expected: Mapping[str, Tensor]) -> list[str]:
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


def _fit_ties(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
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


def _other_settings(noted: Mapping[str, Any], model: Classifier) -> list[tuple[str, Any, Any]]:
    """(name, the file's value, the model's) of what a file's notes have otherwise than the model and shapes do not
    show.
    """
    theirs = whole_arguments(noted)
    own = hidden_settings(model).items()
    return [(name, theirs[name], value) for name, value in own if name in theirs and theirs[name] != value]


def _check(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], settings: list[str], what: str) -> None:
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


def _unwrap(model: nn.Module) -> Classifier:
    """The model inside torch.compile's or DistributedDataParallel's wrapper."""
    while not isinstance(model, Classifier):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            raise TypeError(f"model must be one of crossvit.create_model's, got a {type(model).__name__}")
        model = inner
    return model
