"""`crossvit export`: what is written loads where it is meant to, with the same outputs."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import crossvit
from commands import CLASSES, command, save_small, small_model
from crossvit.cli import export
from crossvit.cli.commands import CommandError

# What a user of timm types to get the same model.
THEIRS: dict[str, Any] = dict(num_classes=3, img_size=120, embed_dim=(48, 96), depth=((1, 1, 0),))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Sizes whose patches timm computes rightly.
    return save_small(tmp_path_factory.mktemp("weights"), image_size=120, depth=THEIRS["depth"])


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 120, 120, generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.eval()(images)


def expected_logits(checkpoint: Path, images: Tensor) -> Tensor:
    return logits(crossvit.load_model(checkpoint, kernels="reference")[0], images)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_loads_the_weights(suffix: str, checkpoint: Path, images: Tensor, tmp_path: Path) -> None:
    """By its own reader, strictly, into its own model: the same logits."""
    timm = pytest.importorskip("timm")
    path = tmp_path / f"x{suffix}"
    done = command("export", path, "--checkpoint", checkpoint)
    assert (done.status, done.err) == (0, "")
    theirs = timm.create_model("crossvit_tiny_240", pretrained=False, **THEIRS)
    timm.models.load_checkpoint(theirs, str(path), strict=True)
    torch.testing.assert_close(logits(theirs, images), expected_logits(checkpoint, images), rtol=1e-4, atol=1e-5)


def test_the_authors_names(checkpoint: Path, images: Tensor, tmp_path: Path) -> None:
    """Theirs are lists of parameters, and a file of theirs comes back."""
    path = tmp_path / "x.safetensors"
    assert command("export", path, "--checkpoint", checkpoint, "--layout", "authors").status == 0
    state = load_file(path)
    assert {"pos_embed.0", "pos_embed.1", "cls_token.0", "cls_token.1"} <= state.keys()
    assert not any(key.startswith(("pos_embed_", "cls_token_")) for key in state)
    model, notes = crossvit.load_model(path)
    assert notes["classes"] == CLASSES
    torch.testing.assert_close(logits(model, images), expected_logits(checkpoint, images), rtol=1e-4, atol=1e-5)


def test_what_a_file_says(checkpoint: Path, tmp_path: Path) -> None:
    """Class names from the command line, weights in another dtype, at another size."""
    (tmp_path / "names.txt").write_text("one\ntwo\nthree\n")
    shared = ("--checkpoint", checkpoint, "--dtype", "bfloat16", "--image-size", "96x120")
    done = command("export", tmp_path / "x.safetensors", *shared, "--classes", tmp_path / "names.txt")
    assert done.status == 0
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        metadata = opened.metadata()
        assert opened.get_tensor("norm.0.weight").dtype == torch.bfloat16
    assert metadata["image_size"] == "96x120"
    assert json.loads(metadata["classes"]) == ["one", "two", "three"]


@pytest.mark.filterwarnings("ignore")
def test_onnx_runtime_gives_the_same_logits(checkpoint: Path, images: Tensor, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "x.onnx"
    done = command("export", path, "--checkpoint", checkpoint)
    assert (done.status, done.err) == (0, "")
    assert "ONNX Runtime's outputs are the model's within" in done.out
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (images, images[:1]):
        (found,) = session.run(["logits"], {"images": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected_logits(checkpoint, batch), rtol=1e-4, atol=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == ["x.onnx"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_torch_export(kernels: str, checkpoint: Path, images: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    done = command("export", path, "--checkpoint", checkpoint, "--kernels", kernels)
    assert (done.status, done.err) == (0, "")
    with open(path, "rb") as file:
        program = torch.export.load(file)
    targets = {str(node.target) for node in program.graph.nodes}
    if kernels == "reference":
        assert not any(target.startswith("crossvit_kernels") for target in targets)
    for batch in (images, images[:1]):
        found = logits_of_program(program, batch)
        torch.testing.assert_close(found, expected_logits(checkpoint, batch), rtol=1e-4, atol=1e-5)


def logits_of_program(program: torch.export.ExportedProgram, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return program.module()(images)


def test_a_wrong_export_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    """Where the outputs differ, or the exporter fails, there is no file, and what was there stays."""
    path = tmp_path / "x.pt2"
    path.write_text("before")
    monkeypatch.setattr(export, "export_program", lambda *rest, **named: Path(rest[2]).write_text("new"))
    monkeypatch.setattr(torch.export, "load", lambda file: _Wrong())
    done = command("export", path, "--checkpoint", checkpoint)
    assert done.status == 2
    assert "of the largest off; nothing was written" in done.err
    assert path.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


class _Wrong:
    def module(self) -> nn.Module:
        return small_model(image_size=120, depth=THEIRS["depth"], seed=5)


def test_what_cannot_be_asked(checkpoint: Path, tmp_path: Path) -> None:
    for arguments, reason in (
        (["x.bin"], "FILE must end in .safetensors, .pth, .onnx, .pt2, got x.bin"),
        ([tmp_path / "x.onnx", "--dtype", "bfloat16"], "ONNX files are written in float32, got --dtype bfloat16"),
        ([tmp_path / "x.onnx", "--layout", "authors"], "--layout is for weights"),
        ([tmp_path / "x.onnx", "--fixed-batch", "0"], "--fixed-batch must be at least 1, got 0"),
        ([tmp_path / "nowhere" / "x.safetensors"], "there is no folder"),
        ([tmp_path / "nowhere" / "x.onnx"], "there is no folder"),
    ):
        done = command("export", *arguments, "--checkpoint", checkpoint)
        assert done.status == 2, arguments
        assert reason in done.err, arguments
    assert not list(tmp_path.iterdir())


def test_onnx_needs_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(CommandError, match=r"an \.onnx file needs onnx and onnxscript"):
        export.export_onnx(small_model(), torch.zeros(1, 3, 72, 72), tmp_path / "x.onnx")
