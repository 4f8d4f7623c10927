"""What a checkpoint file holds, whatever wrote it: the state dict among the rest, under plain names.

No code in a file is run: torch's are read with weights_only=True, in which beside tensors and plain values only the
argparse.Namespace of timm's and the authors' training checkpoints is let in.
"""

import argparse
import json
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .notes import NOTES
from .wording import kind, some, tensors_of

# Where a training checkpoint has its weights, the first that is there. Averaged ones come before those they are the
# averages of, as in timm's own loader; "ema" is this package's, "module" DeepSpeed's.
AVERAGED = ("state_dict_ema", "model_ema", "ema")
RAW = ("state_dict", "model", "module")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
# What DistributedDataParallel, torch.compile, FSDP, activation checkpointing and Lightning's strategies put before the
# names of the module that they wrap, wherever in a model it is.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
_OUTER = ("model", "net", "network", "backbone")  # attributes by which a training module has the model

UNREADABLE = (FileNotFoundError, IsADirectoryError, PermissionError)  # what is not the fault of a file's bytes


class RefusedError(ValueError):
    """A file holds objects that are more than data."""


@dataclass(frozen=True)
class Contents:
    """A file's `state` dict with timm's names, on the CPU; `metadata`: the file's own notes on it; `source`: the entry
    that the weights are from, as "model" or "ema.module", empty where the file is the state dict; `beside`: what else
    the file holds, by name.
    """

    state: dict[str, Tensor]
    metadata: dict[str, str]
    source: str = ""
    beside: dict[str, Any] = field(default_factory=dict)

    @property
    def averaged(self) -> bool:
        """Whether the weights are the average over a training's steps."""
        return any(key in AVERAGED for key in self.source.split("."))


def read_checkpoint(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict of a file or hub name, with timm's keys, on the CPU, and the file's own notes on it: a
    `.safetensors` file's metadata, of a training checkpoint what it holds of `notes` beside the weights. Raises as
    `read_contents`.
    """
    contents = read_contents(path)
    return contents.state, contents.metadata


def read_contents(path: str | PathLike[str]) -> Contents:
    """All that a checkpoint file, or the one of that name on timm's hub, holds.

    Weights are those of the first entry of `AVERAGED` and `RAW` that a training checkpoint has, at any depth. Prefixes
    that wrappers put before the names are taken off, however many; entries that the file's writer left out because they
    are the same tensor as another are there.

    Raises FileNotFoundError (no such file, or the hub gave none), another OSError (it cannot be read) and ValueError
    (truncated, no checkpoint, or with objects that are not loaded for safety, which the message names).
    """
    file = _locate(path)
    try:
        if _is_safetensors(file):
            return _safetensors(file, path)
        content = unpickle(file, path)
    except (ImportError, RefusedError, *UNREADABLE):
        raise
    except Exception as error:  # of damaged bytes the readers raise whatever comes up
        raise ValueError(f"{path} is truncated, no checkpoint, or one of another kind: {reason(error)}") from error
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds no state dict but {kind(content)}")
    state, source, beside = _find(content) or (content, "", {})
    metadata = _notes(content) if source else {}
    beside = {name: value for name, value in beside.items() if name not in metadata}
    return Contents(_clean(state, path), metadata, source, beside)


def unpickle(file: Path, path: str | PathLike[str]) -> Any:
    """What torch.save wrote to `file`, on the CPU. Raises RefusedError, naming them and `path`, for objects that are
    more than data, and of damaged bytes whatever torch raises.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                names = {name.partition("/")[2] for name in archive.namelist()}
            if "constants.pkl" in names:
                raise RefusedError(f"{path} is a TorchScript program, expected a state dict")
            if "data.pkl" not in names:
                raise ValueError("it is a zip file, but not of torch.save")
        try:
            with open(file, "rb") as opened, warnings.catch_warnings():  # the content is looked at by the caller
                warnings.simplefilter("ignore")
                return torch.load(opened, map_location="cpu", weights_only=True)
        except Exception as error:
            if refused := _refused(file, str(error)):
                raise RefusedError(
                    f"{path} holds objects that are not loaded for safety, as they are more than tensors and plain "
                    f"values: {', '.join(refused)}"
                ) from error
            raise


def reason(error: Exception) -> str:
    """The sentence of a reader's message that says what is wrong."""
    text = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    text = text.partition(" Please file an issue")[0].strip()
    if re.match(r"Unsupported operand|invalid load key|\d*$", text):  # of a program that reads anything
        return "its bytes are not what torch.save writes"
    return re.split(r"\n|(?<=\w)\. (?=[A-Z])", text)[0][:300] or type(error).__name__


def _locate(path: str | PathLike[str]) -> Path:
    file = Path(path)
    if file.is_file():
        return file
    if file.is_dir():
        inside = sorted(entry.name for entry in file.iterdir() if entry.suffix in _SUFFIXES)
        hint = f": it holds {some(inside)}" if inside else ""
        raise ValueError(f"{path} is a directory, expected a checkpoint file{hint}")
    name = re.fullmatch(r"(?:hf[-_]hub:)?([\w.-]+/[\w.-]+)", str(path))
    if name is None or file.suffix in _SUFFIXES:
        raise FileNotFoundError(f"no checkpoint {path}: neither a file nor a hub name such as timm/crossvit_9_240.in1k")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError(f"{path} is no file here; to fetch it from the hub, install huggingface_hub") from error
    try:
        return Path(hf_hub_download(name[1], "model.safetensors"))
    except Exception as error:  # the hub's client lets its HTTP library's errors through
        raise FileNotFoundError(f"{path} is no file here, and the hub gave none (no network?): {error}") from error


def _is_safetensors(file: Path) -> bool:
    """By its first bytes, where they tell, else by its name. Raises ValueError for an empty file and the
    index of one in parts.
    """
    with open(file, "rb") as opened:
        start = opened.read(1 << 16)
    if not start:
        raise ValueError("it is empty")
    if start[8:9] == b"{" and start[4:8] == bytes(4):  # after the header's length
        return True
    if start[:1] in (b"{", b"[") and b'"weight_map"' in start:
        parts = sorted(set(re.findall(r'"([^"/\\]+\.(?:safetensors|bin))"', start.decode("utf-8", "replace"))))
        raise RefusedError(
            f"{file} is the index of a checkpoint in parts ({some(parts)}), expected one file with all weights"
        )
    return file.suffix == ".safetensors" and not start.startswith((b"PK\3\4", b"\x80\2"))


def _safetensors(file: Path, path: str | PathLike[str]) -> Contents:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    if not state:
        raise RefusedError(f"{path} holds no state dict: there is no tensor in it")
    # safetensors.torch.save_model leaves all but one of the names of a tensor out, and notes whose tensor they have.
    same = {name: kept for name, kept in metadata.items() if kept in state and name not in state}
    state |= {name: state[kept] for name, kept in same.items()}
    beside = {name: text for name, text in metadata.items() if name not in (*NOTES, *same, "format")}
    return Contents(_clean(state, path), metadata, beside=beside)


def _find(content: Mapping[Any, Any]) -> tuple[Mapping[Any, Any], str, dict[str, Any]] | None:
    """The mapping that holds the weights, the entries it was found under, joined by dots, and all that is beside it."""
    for key in AVERAGED + RAW:
        inner = content.get(key)
        found = _find(inner) if isinstance(inner, Mapping) else None
        if found is not None:
            state, source, beside = found
            others = {str(name): value for name, value in content.items() if name != key}
            return state, f"{key}.{source}".rstrip("."), others | {f"{key}.{name}": v for name, v in beside.items()}
    return (content, "", {}) if any(isinstance(value, Tensor) for value in content.values()) else None


def _notes(content: Mapping[Any, Any]) -> dict[str, str]:
    """What a training checkpoint holds of `notes`, as a `.safetensors` file's metadata would."""
    found = {}
    for key in NOTES:
        if isinstance(content.get(key), str):
            found[key] = content[key]
        elif content.get(key) is not None and not any(True for _ in tensors_of(content[key])):
            found[key] = json.dumps(content[key], default=str)
    return found


def _clean(content: Mapping[Any, Any], path: str | PathLike[str]) -> dict[str, Tensor]:
    """A state dict without wrappers' prefixes, with timm's keys."""
    if odd := [
        f"{key!r}: {kind(value)}"
        for key, value in content.items()
        if not isinstance(value, Tensor) or not isinstance(key, str)
    ]:
        raise ValueError(f"{path} holds no state dict of tensors: {some(odd)}")
    names = {key: _WRAPPERS.sub("", key) for key in content}
    if "n_averaged" in names and all(key.startswith("module.") for key in content if key != "n_averaged"):
        del names["n_averaged"]  # torch.optim.swa_utils.AveragedModel counts
    while outer := next((prefix for prefix in _OUTER if _shared(f"{prefix}.", names.values())), None):
        names = {key: name.removeprefix(f"{outer}.") for key, name in names.items()}
    names = {key: re.sub(r"^(pos_embed|cls_token)\.(\d+)$", r"\1_\2", name) for key, name in names.items()}
    keys: dict[str, list[str]] = {}
    for key, name in names.items():
        keys.setdefault(name, []).append(key)
    if twice := [f"{name} as {' and '.join(several)}" for name, several in keys.items() if len(several) > 1]:
        raise ValueError(f"{path} holds the same weight more than once: {some(twice)}")
    return {name: cast(Tensor, content[key]) for key, name in names.items()}


def _shared(prefix: str, names: Iterable[str]) -> bool:
    """Whether most names start with it: a loss function beside the model may have buffers of its own."""
    starts = [name.startswith(prefix) for name in names]
    return 2 * sum(starts) > len(starts)


def _refused(file: Path, message: str) -> list[str]:
    """The objects for which torch did not load a file, by module and name; none where that was not the reason."""
    first = re.search(r"GLOBAL (\S+) w", message)
    if first is None:
        other = re.search(r"(?:Can only (?:create new object|build)|Trying to call reduce) .*$", message, re.MULTILINE)
        return [other[0]] if other else []
    name = first[1] if "." in first[1] else f"builtins.{first[1]}"
    try:
        return sorted({name, *torch.serialization.get_unsafe_globals_in_checkpoint(file)})
    except Exception:  # a file of torch's older kind tells the first one alone
        return [name]
