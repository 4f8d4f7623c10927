"""Files that are no checkpoints, or broken ones: each gives one sentence that says what it is, runs no code, and leaves
the model as it was.
"""

import argparse
import json
import os
import pathlib
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import crossvit
from commands import SMALL, command, small_model
from crossvit.training.files import load

NAME = "crossvit_tiny_240"
MARK = "ran"  # what the objects below would leave if their code ran


class Payload:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Own:
    """An object of a class that is somebody's own."""


REFUSED = {
    "builtins.eval": Payload(eval, f"open({MARK!r}, 'w')"),
    "builtins.getattr": Payload(getattr, "x", "upper"),
    f"{os.system.__module__}.system": Payload(os.system, f"touch {MARK}"),
    f"{__name__}.Own": Own(),
    f"{type(pathlib.PurePosixPath()).__module__}.PurePosixPath": pathlib.PurePosixPath("x"),
    "torch.nn.modules.linear.Linear": torch.nn.Linear(3, 3),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_object_is_named(name: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In either of torch's formats, to load_checkpoint, to the commands and to --resume; its code does not run."""
    monkeypatch.chdir(tmp_path)
    torch.save(
        {"model": dict(small_model().state_dict()), "extra": REFUSED[name]},
        "x.pth",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(ValueError, match="holds objects that are not loaded for safety") as error:
        crossvit.load_model("x.pth")
    assert str(error.value).endswith(f": {name}")
    with pytest.raises(ValueError, match=r"x\.pth holds objects that are not loaded for safety") as error:
        load(Path("x.pth"))
    assert str(error.value).endswith(f": {name}")
    done = command("info", "--checkpoint", "x.pth")
    assert done.status == 2
    assert done.err.startswith("crossvit info: error: x.pth holds objects that are not loaded for safety")
    assert done.err.count("\n") == 1
    assert not Path(MARK).exists()


def test_several_refused_objects_are_all_named(tmp_path: Path) -> None:
    torch.save({"a": Own(), "b": Payload(eval, "1"), "args": argparse.Namespace(lr=1)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=f"plain values: builtins.eval, {__name__}.Own$"):
        crossvit.load_model(tmp_path / "x.pth")


def _safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _entry(**changes: object) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}).encode()


BYTES = {
    "empty.pth": (b"", "no checkpoint, or one of another kind: it is empty"),
    "empty.safetensors": (b"", "it is empty"),
    "zeros.pth": (bytes(100), "its bytes are not what torch.save writes"),
    "text.pth": (b"no weights here\n", "its bytes are not what torch.save writes"),
    "json.pth": (b'{"a": 1}', "its bytes are not what torch.save writes"),
    "zip-start.pth": (b"PK\3\4" + bytes(60), "is truncated, no checkpoint"),
    "pickle.pth": (pickle.dumps({"a": 1}, protocol=2), "is truncated, no checkpoint"),
    "pickle-4.pth": (pickle.dumps({"a": 1}, protocol=4), "its bytes are not what torch.save writes"),
    "random.safetensors": (b"\xff" * 100, "is truncated, no checkpoint"),
    "long-header.safetensors": (struct.pack("<Q", 1 << 40) + b"{}", "is truncated, no checkpoint"),
    "cut-header.safetensors": (_safetensors(_entry())[:40], "is truncated, no checkpoint"),
    "no-data.safetensors": (_safetensors(_entry()), "is truncated, no checkpoint"),
    "no-json.safetensors": (_safetensors(b'{"a": nonsense}', bytes(8)), "is truncated, no checkpoint"),
    "offsets.safetensors": (_safetensors(_entry(data_offsets=[0, 4]), bytes(8)), "is truncated, no checkpoint"),
    "dtype.safetensors": (_safetensors(_entry(dtype="F9"), bytes(8)), "is truncated, no checkpoint"),
    "nothing.safetensors": (_safetensors(b"{}"), "holds no state dict: there is no tensor in it"),
    "model.safetensors.index.json": (
        json.dumps({"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}).encode(),
        r"is the index of a checkpoint in parts \(model-00001-of-00002.safetensors\), expected one file",
    ),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_that_are_no_checkpoint(name: str, tmp_path: Path) -> None:
    """One sentence names the file and what is wrong, here and from the command line, without a warning of torch's."""
    content, message = BYTES[name]
    (tmp_path / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=message) as error:
            crossvit.load_model(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    done = command("predict", tmp_path / "x.png", "--checkpoint", tmp_path / name)
    assert done.status == 2
    assert done.err == f"crossvit predict: error: {error.value}\n"


def test_archives_of_others(tmp_path: Path) -> None:
    """Zip files that torch.save did not write, and programs."""
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("notes/text.txt", "hello")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    for name in ("other.pth", "arrays.npz"):
        with pytest.raises(ValueError, match=f"{name} is truncated, no checkpoint.*a zip file, but not of torch.save"):
            crossvit.load_model(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "hollow.pth", "w") as archive:  # its pickle, and none of its tensors
        torch.save({"a": torch.zeros(3)}, tmp_path / "whole.pth")
        with zipfile.ZipFile(tmp_path / "whole.pth") as whole:
            for entry in whole.namelist():
                if "/data/" not in entry:
                    archive.writestr(entry, whole.read(entry))
    with pytest.raises(ValueError, match=r"hollow.pth is truncated, no checkpoint"):
        crossvit.load_model(tmp_path / "hollow.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit's own, that it is deprecated
        torch.jit.save(torch.jit.script(torch.nn.Linear(3, 3)), tmp_path / "program.pt")
    with pytest.raises(ValueError, match=r"program\.pt is a TorchScript program, expected a state dict"):
        crossvit.load_model(tmp_path / "program.pt")


def test_a_format_under_the_others_name(tmp_path: Path) -> None:
    """What a file is its bytes say, not its suffix."""
    state = dict(small_model().state_dict())
    save_file(state, tmp_path / "x.pth")
    torch.save(state, tmp_path / "x.safetensors")
    torch.save(state, tmp_path / "y.safetensors", _use_new_zipfile_serialization=False)
    for name in ("x.pth", "x.safetensors", "y.safetensors"):
        model = crossvit.create_model(NAME, **SMALL)
        crossvit.load_checkpoint(model, tmp_path / name)
        assert torch.equal(model.norm[0].weight, state["norm.0.weight"])


def test_a_folder(tmp_path: Path) -> None:
    """A run's folder is not its checkpoint: what could be meant is named."""
    (tmp_path / "run").mkdir()
    for name in ("last.pth", "best.pth", "metrics.jsonl"):
        (tmp_path / "run" / name).touch()
    done = command("evaluate", tmp_path, "--checkpoint", tmp_path / "run")
    assert done.status == 2
    assert done.err.endswith("run is a directory, expected a checkpoint file: it holds best.pth, last.pth\n")


def entry(state: dict[str, Tensor], value: object) -> dict[str, Any]:
    return state | {"norm.0.weight": value}


def test_values_that_are_no_weights(tmp_path: Path) -> None:
    """Each is named with what it is; the model is as it was."""
    made = small_model()
    state = dict(made.state_dict())
    model = crossvit.create_model(NAME, **SMALL)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for content, message in (
        (entry(state, 3), "holds no state dict of tensors: 'norm.0.weight': a int"),
        (entry(state, None), "holds no state dict of tensors: 'norm.0.weight': a NoneType"),
        (entry(state, [1.0] * 48), "holds no state dict of tensors: 'norm.0.weight': a list"),
        (state | {7: torch.zeros(3)}, "holds no state dict of tensors: 7: a tensor of torch.float32"),
        (entry(state, torch.zeros(48, dtype=torch.complex64)), "1 not of floating point: norm.0.weight a tensor of"),
        (
            entry(state, torch.zeros(48, dtype=torch.bool)),
            "1 not of floating point: norm.0.weight a tensor of torch.bool",
        ),
        (
            entry(state, torch.zeros(48).to_sparse()),
            "1 that cannot be copied: norm.0.weight a tensor of torch.float32, in layout torch.sparse_coo",
        ),
        (
            {key: value.to("meta") for key, value in state.items()},
            f"{len(state)} that cannot be copied: pos_embed_0 a tensor of torch.float32, without values",
        ),
        (
            {"optimizer": {"state": {}}, "epoch": 3},
            "holds no state dict of tensors: 'optimizer': a dict, 'epoch': a int",
        ),
        ({"model": {}, "epoch": 3}, "holds no state dict of tensors: 'model': a dict, 'epoch': a int"),
        (3, "holds no state dict but a int"),
    ):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(ValueError) as error:
            crossvit.load_checkpoint(model, tmp_path / "x.pth")
        assert message in str(error.value)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kept", range(0, 100, 7))
def test_cut_off_anywhere(kept: int, tmp_path: Path) -> None:
    """A training checkpoint cut off at a share of its length, in each format: one sentence, for --resume too."""
    content = {"model": {f"norm.{k}.weight": torch.randn(300) for k in range(4)}, "position": {"steps": 3}}
    torch.save(content, tmp_path / "zip.pth")
    torch.save(content, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(content["model"], tmp_path / "x.safetensors")
    for path in list(tmp_path.iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * kept // 100])
        with pytest.raises(ValueError, match=f"{path.name} is truncated, no checkpoint") as error:
            crossvit.load_model(path)
        assert "\n" not in str(error.value)
        with pytest.raises(
            ValueError, match=f"{path.name} (is truncated, or no checkpoint|holds weights alone)"
        ) as error:
            load(path)
        assert "\n" not in str(error.value)
