"""Weights in and out: timm's and the authors' files, `.safetensors` or torch's, checked as a whole before a single
tensor is copied.

timm's state dicts and the authors' differ in two names per branch (pos_embed_0 there is pos_embed.0 here, likewise
cls_token). The authors' training checkpoints hold the state dict under "model", beside the command line's
argparse.Namespace under "args".
"""

import argparse
import json
import logging
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .classifier import Classifier, to_size
from .files import replacing
from .identify import identify
from .notes import NOTES, notes
from .positions import resample_positions

LAYOUTS = ("timm", "authors")
_WRAPPERS = ("model", "state_dict")  # the authors' and timm's training checkpoints
_FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
_LISTED = 16  # names per kind of mismatch that an error spells out
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

    Raises FileNotFoundError (no such file, or the hub gave none), ValueError (truncated, no checkpoint, or one of
    another model: the message lists what is missing, unexpected or of another shape, and names what was found) and
    TypeError (`model` is not one of this package).
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
) -> None:
    """`load_checkpoint` of what `read_checkpoint` has read from `path`; `state` is changed."""
    target = _unwrap(model)
    if image_size is None and re.fullmatch(r"\d+x\d+", metadata.get("image_size", "")):
        height, width = map(int, metadata["image_size"].split("x"))
        image_size = (height, width)
    expected = target.state_dict()
    found = identify(state)
    told: list[str] = []
    _fit_positions(state, target, None if image_size is None else to_size(image_size), path)
    if adapt:
        _fit_channels(state, target)
        told = _fit_head(state, target, expected)
    _check(state, expected, f"{path} holds {found}, which does not fit {target.variant or type(target).__name__}")
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
    under its name only when it is complete. Raises ValueError for another layout or number of classes, TypeError for
    another kind of model.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    target, path = _unwrap(model), Path(path)
    metadata = {"format": "pt"} | notes(target, classes, crop_ratio, multi_label)
    state = {key: value.detach().cpu().contiguous() for key, value in target.state_dict().items()}
    if layout == "authors":
        state = {re.sub(r"^(pos_embed|cls_token)_(\d+)$", r"\1.\2", key): value for key, value in state.items()}
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(state, temporary, metadata)
        else:
            torch.save(state, temporary)


def read_checkpoint(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict of a file or hub name, with timm's keys, on the CPU, and the file's own notes on it: a
    `.safetensors` file's metadata, of a training checkpoint what it holds of `notes` beside the weights. Raises as
    `load_checkpoint`.
    """
    file = _locate(path)
    metadata: dict[str, str] = {}
    try:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, "pt") as opened:
                metadata = opened.metadata() or {}
                content: Any = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(file, map_location="cpu", weights_only=True)
            if isinstance(content, Mapping) and any(isinstance(content.get(key), Mapping) for key in _WRAPPERS):
                held = {key: content[key] for key in NOTES if key in content}
                metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in held.items()}
    except (ImportError, PermissionError):
        raise
    except Exception as error:  # of damaged bytes the readers raise whatever comes up
        reason = str(error).partition(" Please file an issue")[0].strip().rsplit("\n", 1)[-1] or type(error).__name__
        raise ValueError(
            f"{path} is truncated, no checkpoint, or holds objects that are not loaded for safety: {reason}"
        ) from error
    return _clean(content, path), metadata


def _locate(path: str | PathLike[str]) -> Path:
    file = Path(path)
    if file.is_file():
        return file
    if file.is_dir():
        raise ValueError(f"{path} is a directory, expected a checkpoint file")
    name = re.fullmatch(r"(?:hf[-_]hub:)?([\w.-]+/[\w.-]+)", str(path))
    if name is None or file.suffix in _FILE_SUFFIXES:
        raise FileNotFoundError(f"no checkpoint {path}: neither a file nor a hub name such as timm/crossvit_9_240.in1k")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError(f"{path} is no file here; to fetch it from the hub, install huggingface_hub") from error
    try:
        return Path(hf_hub_download(name[1], "model.safetensors"))
    except Exception as error:  # the hub's client lets its HTTP library's errors through
        raise FileNotFoundError(f"{path} is no file here, and the hub gave none (no network?): {error}") from error


def _clean(content: Any, path: str | PathLike[str]) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without wrappers' prefixes, with timm's keys."""
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds no state dict but {_kind(content)}")
    if odd := [f"{key!r}: {_kind(value)}" for key, value in content.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{path} holds no state dict of tensors: {_some(odd)}")
    state = cast(dict[str, Tensor], dict(content))
    for prefix in ("_orig_mod.", "module."):  # left by torch.compile and DistributedDataParallel
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return {re.sub(r"^(pos_embed|cls_token)\.(\d+)$", r"\1_\2", key): value for key, value in state.items()}


def _fit_positions(
    state: dict[str, Tensor], model: Classifier, image_size: tuple[int, int] | None, path: str | PathLike[str]
) -> None:
    """Resamples the positions in `state` to the model's grids, where they are of another and of the right width."""
    own = model.position_grids()
    widths = {name: model.get_parameter(name).shape[-1] for name in own}
    names = [name for name in own if name in state and state[name].shape[::2] == (1, widths[name])]
    counts = {name: state[name].shape[1] - 1 for name in names}
    if image_size is not None:
        grids = model.position_grids(image_size)
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


def _check(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    dtypes = [f"{key} {_kind(state[key])}" for key in expected if key in state and not state[key].is_floating_point()]
    faults = [
        f"\n  {len(names)} {kind}: {_some(names)}"
        for kind, names in [
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
            ("not of floating point", dtypes),
        ]
        if names
    ]
    if not faults:
        return
    hint = ""
    if shapes and all(key.startswith(("head.", "patch_embed.")) for key in (s.split()[0] for s in shapes)):
        hint = "\n  create_model(..., checkpoint=…) starts a new head and adapts the input channels"
    raise ValueError(f"{what}; the model is as it was:{''.join(faults)}{hint}")


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _some(items: list[str]) -> str:
    return ", ".join(items[:_LISTED]) + (f", … ({len(items) - _LISTED} more)" if len(items) > _LISTED else "")


def _unwrap(model: nn.Module) -> Classifier:
    """The model inside torch.compile's or DistributedDataParallel's wrapper."""
    while not isinstance(model, Classifier):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            raise TypeError(f"model must be one of crossvit.create_model's, got a {type(model).__name__}")
        model = inner
    return model
