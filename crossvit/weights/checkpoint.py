"""Weights in and out: timm's and the authors' files, `.safetensors` or torch's, checked as a whole before a single
tensor is copied.

timm's state dicts and the authors' differ in two names per branch (pos_embed_0 there is pos_embed.0 here, likewise
cls_token). The authors' training checkpoints hold the state dict under "model", beside the command line's
argparse.Namespace under "args".
"""

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.classifier import Classifier, to_size
from ..system.files import patient_file, replacing
from .checkpoint_file import read_checkpoint
from .fitting import check, fit_channels, fit_head, fit_positions, fit_ties, noted_grids, other_settings
from .identify import identify
from .notes import notes, read_notes
from .wording import some

LAYOUTS = ("timm", "authors")


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

    A training checkpoint's averaged weights are taken where it has them, as timm's own loader does. Where the
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
    fit_positions(state, target, size, None if size is None else noted_grids(noted, size, target), path)
    fit_ties(state, expected)
    asked = set(asked)
    if adapt:
        fit_channels(state, target)
        told = fit_head(state, target, expected)
        if told or target.num_classes == 0:
            asked.add("global_pool")
    others = other_settings(noted, target)
    told += [
        f"it was made with {name}={theirs!r}, the model has {own!r}" for name, theirs, own in others if name in asked
    ]
    settings = [f"{name} {theirs!r} instead of {own!r}" for name, theirs, own in others if name not in asked]
    what = f"{path} holds {found}, which does not fit {target.variant or type(target).__name__}"
    check(state, expected, settings, what)
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
            with patient_file(temporary) as file:
                torch.save(state, file)


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor with memory of its own, which `.safetensors` files need."""
    apart, taken = {}, set()
    for key, value in state.items():
        storage = value.untyped_storage()
        shared = storage.data_ptr() in taken or storage.nbytes() != value.nbytes
        taken.add(storage.data_ptr())
        apart[key] = value.clone() if shared else value
    return apart


def _unwrap(model: nn.Module) -> Classifier:
    """The model inside torch.compile's or DistributedDataParallel's wrapper."""
    while not isinstance(model, Classifier):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            raise TypeError(f"model must be one of crossvit.create_model's, got a {type(model).__name__}")
        model = inner
    return model
