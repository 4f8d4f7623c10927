"""Weights: timm's files and the authors', other sizes, channels and classes, and what happens with a file that does not
fit.
"""

import argparse
import copy
import json
import math
import os
from collections import OrderedDict
from pathlib import Path
from typing import IO

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import crossvit
from benchmarks.photographs import photographs
from crossvit.models.positions import resample_positions
from crossvit.models.variants import VARIANTS
from crossvit.weights.checkpoint import read_checkpoint
from crossvit.weights.identify import identify
from crossvit.weights.notes import notes
from weights import our_model, perturb, relative, timm_model

TINY = "crossvit_tiny_240"
TOLERANCE = 5e-6


def authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's state dict under the authors' names."""
    return {
        key.replace("pos_embed_", "pos_embed.").replace("cls_token_", "cls_token."): value
        for key, value in state.items()
    }


def training_checkpoint(state: dict[str, Tensor]) -> dict[str, object]:
    """What the authors' main.py writes after an epoch."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(3))])
    arguments = argparse.Namespace(model="crossvit_tiny_224", batch_size=64, lr=5e-4, output_dir="", no_amp=False)
    return dict(
        model=OrderedDict(state),
        optimizer=optimizer.state_dict(),
        lr_scheduler={"t_initial": 300, "noise_range_t": None},
        epoch=7,
        args=arguments,
        scaler={"scale": 65536.0},
        max_accuracy=73.4,
    )


FILES = {
    "timm.safetensors": lambda state, path: save_file(state, path),
    "timm.pth": lambda state, path: torch.save(state, path),
    "timm-training.pth.tar": lambda state, path: torch.save({"epoch": 3, "arch": TINY, "state_dict": state}, path),
    "authors.pth": lambda state, path: torch.save(authors(state), path),
    "authors.safetensors": lambda state, path: save_file(authors(state), path),
    "authors-training.pth": lambda state, path: torch.save(training_checkpoint(authors(state)), path),
    "legacy.pth": lambda state, path: torch.save(authors(state), path, _use_new_zipfile_serialization=False),
    "compiled.pth": lambda state, path: torch.save({f"_orig_mod.{key}": value for key, value in state.items()}, path),
    "parallel.pth": lambda state, path: torch.save({f"module.{key}": value for key, value in state.items()}, path),
}


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    """timm's tiny model."""
    return timm_model(TINY)


@pytest.fixture(scope="module")
def file(theirs: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its state dict in a file."""
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(theirs.state_dict(), path)
    return path


def blank(**arguments: object) -> crossvit.CrossViT:
    """A model for files to be loaded into."""
    return our_model(TINY, seed=99, **arguments)


def unchanged(model: nn.Module) -> bool:
    """Whether the model is as `blank` made it."""
    before = perturb(copy.deepcopy(model), seed=99).state_dict()
    return all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", FILES)
def test_formats(name: str, theirs: nn.Module, tmp_path: Path) -> None:
    """Every kind of file gives the same weights, bit for bit."""
    FILES[name](theirs.state_dict(), tmp_path / name)
    model = blank()
    crossvit.load_checkpoint(model, tmp_path / name)
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["crossvit_9_dagger_240", "crossvit_15_dagger_408"])
def test_logits_from_an_authors_file(name: str, tmp_path: Path) -> None:
    """A model created by the authors' name from a file in their layout has timm's logits."""
    theirs = timm_model(name)
    torch.save(authors(theirs.state_dict()), tmp_path / "authors.pth")
    own_name = name.replace("240", "224").replace("408", "384")
    model = crossvit.create_model(own_name, checkpoint=tmp_path / "authors.pth").eval()
    images = photographs(1, model.image_size)
    with torch.no_grad():
        assert relative(model(images), theirs(images)) < TOLERANCE


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("layout", ["timm", "authors"])
def test_round_trip(layout: str, suffix: str, tmp_path: Path) -> None:
    """What is saved loads again, in either layout, with exactly that layout's names; timm's own model takes timm's. No
    other file is left.
    """
    model = our_model(TINY, seed=3)
    path = tmp_path / f"weights{suffix}"
    path.write_text("an older file")
    crossvit.save_checkpoint(model, path, layout)
    assert os.listdir(tmp_path) == [path.name]
    stored = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert list(stored) == list(model.state_dict()) or layout == "authors" or suffix == ".safetensors"
    assert set(stored) == set(authors(model.state_dict()) if layout == "authors" else model.state_dict())
    other = blank()
    crossvit.load_checkpoint(other, path)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    if layout == "timm":
        from timm.models import load_checkpoint

        load_checkpoint(timm_model(TINY, seed=4), str(path))


def test_interrupted_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that fails half-way leaves the file that was there, and nothing beside it."""

    def fail(state: object, file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    path = tmp_path / "weights.pth"
    path.write_text("an older file")
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        crossvit.save_checkpoint(blank(), path)
    assert path.read_text() == "an older file"
    assert os.listdir(tmp_path) == [path.name]


def test_wrapped_models(file: Path, tmp_path: Path, theirs: nn.Module) -> None:
    """A compiled model loads and saves as the model inside it; another kind of model is refused."""
    model = blank()
    compiled = torch.compile(model, backend="eager")
    crossvit.load_checkpoint(compiled, file)
    assert torch.equal(model.norm[0].weight, theirs.norm[0].weight)
    crossvit.save_checkpoint(compiled, tmp_path / "compiled.pth")
    assert list(torch.load(tmp_path / "compiled.pth")) == list(model.state_dict())
    with pytest.raises(TypeError, match="create_model's, got a Linear"):
        crossvit.load_checkpoint(nn.Linear(3, 3), file)
    with pytest.raises(ValueError, match=r"layout must be one of \('timm', 'authors'\), got 'keras'"):
        crossvit.save_checkpoint(model, tmp_path / "x.pth", "keras")


def test_a_checkpoint_keeps_dtype_and_training_mode(file: Path) -> None:
    """Loading casts to the model's dtype and touches neither its mode nor what requires gradients."""
    model = blank().to(torch.bfloat16).train()
    model.patch_embed.requires_grad_(False)
    crossvit.load_checkpoint(model, file)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.training
    assert not any(p.requires_grad for p in model.patch_embed.parameters())


@pytest.mark.parametrize("size", [384, (384, 288), 96])
def test_other_image_sizes(size: int | tuple[int, int], file: Path, theirs: nn.Module) -> None:
    """Weights of 240 load into other sizes: positions are resampled bicubically, the CLS slot and all else stays, and
    the model runs.
    """
    model = crossvit.create_model(TINY, checkpoint=file, image_size=size).eval()
    state = theirs.state_dict()
    for key, value in model.state_dict().items():
        if not key.startswith("pos_embed"):
            assert torch.equal(value, state[key]), key
    for b, (old, embed) in enumerate(zip(((20, 20), (14, 14)), model.patch_embed)):
        mine, want = getattr(model, f"pos_embed_{b}"), state[f"pos_embed_{b}"]
        assert torch.equal(mine[:, 0], want[:, 0])
        grid = want[:, 1:].reshape(1, *old, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, embed.grid_size, mode="bicubic", align_corners=False)
        assert relative(mine[:, 1:].transpose(1, 2).unflatten(2, embed.grid_size), grid) < 1e-6
    with torch.no_grad():
        assert model(photographs(1, model.image_size)).isfinite().all()


def test_resampled_weights_see_the_same_image(file: Path, theirs: nn.Module) -> None:
    """At 1.5 times the size the logits of an enlarged photograph stay close to those of the small one: positions went
    where they belong.
    """
    large = crossvit.create_model(TINY, checkpoint=file, image_size=360).eval()
    ramps = [torch.linspace(-1, 1, 20)[:, None].expand(20, 20), torch.linspace(-1, 1, 20)[None].expand(20, 20)]
    positions = torch.cat((torch.zeros(1, 1, 2), torch.stack(ramps, -1).reshape(1, 400, 2)), 1)
    found = resample_positions(positions, (20, 20), (30, 10))[0, 1:].reshape(30, 10, 2)
    assert found[..., 0].std(1).max() < 1e-6
    assert found[..., 1].std(0).max() < 1e-6
    assert (found[1:, 0, 0] > found[:-1, 0, 0]).all()
    assert (found[0, 1:, 1] > found[0, :-1, 1]).all()
    assert large.pos_embed_0.shape[1] == 901
    with pytest.raises(ValueError, match=r"pos_embed must be \(1, 101, D\) for a grid of 10×10, got \(1, 401, 2\)"):
        resample_positions(positions, (10, 10), (5, 5))


def test_sizes_that_are_not_square(tmp_path: Path) -> None:
    """A .safetensors file knows the size it was made for; for others it can be told; a wrong or missing size raises;
    transposed is not the same.
    """
    model = our_model(TINY, seed=5, image_size=(384, 288))
    for name in ("weights.safetensors", "weights.pth"):
        crossvit.save_checkpoint(model, tmp_path / name)
        same = blank(image_size=(384, 288))
        crossvit.load_checkpoint(same, tmp_path / name)
        assert torch.equal(same.pos_embed_0, model.pos_embed_0)
    upright, told = blank(image_size=(288, 384)), blank(image_size=(288, 384))
    crossvit.load_checkpoint(upright, tmp_path / "weights.safetensors")
    assert torch.equal(upright.pos_embed_0, resample_positions(model.pos_embed_0, (32, 24), (24, 32)))
    crossvit.load_checkpoint(told, tmp_path / "weights.pth", image_size=(384, 288))
    assert torch.equal(told.pos_embed_0, upright.pos_embed_0)
    square = blank()
    with pytest.raises(ValueError, match=r"not square \(.*768.*\): give load_checkpoint their image_size"):
        crossvit.load_checkpoint(square, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"not made for image_size=\(240, 240\): pos_embed_0: 768 patches, not 400"):
        crossvit.load_checkpoint(square, tmp_path / "weights.pth", image_size=240)
    assert unchanged(square)


@pytest.mark.parametrize("in_chans", [1, 2, 4, 7])
@pytest.mark.parametrize("name", [TINY, "crossvit_9_dagger_240"])
def test_input_channels(in_chans: int, name: str, theirs: nn.Module, tmp_path: Path) -> None:
    """First convolutions of both branches are adapted to other channels as timm adapts them."""
    from timm.models._manipulate import adapt_input_conv

    state = theirs.state_dict() if name == TINY else timm_model(name).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    model = crossvit.create_model(name, checkpoint=tmp_path / "weights.pth", in_chans=in_chans)
    for b in range(2):
        key = f"patch_embed.{b}.proj{'.0' if 'dagger' in name else ''}.weight"
        torch.testing.assert_close(model.state_dict()[key], adapt_input_conv(in_chans, state[key]))
    assert model.eval()(photographs(1, 240)[:, :1].expand(-1, in_chans, -1, -1)).isfinite().all()


def test_number_of_classes(file: Path, theirs: nn.Module) -> None:
    """Another number of classes keeps everything but the head, which starts anew, and says so; without a head nothing
    needs to be said.
    """
    with pytest.warns(UserWarning, match="has a head of 1000 classes; the model's, of 7, starts from initial weights"):
        model = crossvit.create_model(TINY, checkpoint=file, num_classes=7)
    state = theirs.state_dict()
    for key, value in model.state_dict().items():
        if key.startswith("head."):
            assert value.shape[0] == 7
            assert value.std() < 0.03
        else:
            assert torch.equal(value, state[key]), key
    features = crossvit.create_model(TINY, checkpoint=file, num_classes=0).eval()
    images = photographs(1, 240)
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
        assert relative(features(images), expected) < TOLERANCE


def test_headless_file(theirs: nn.Module, tmp_path: Path) -> None:
    """A file without a head gives a model with a new one, and says so."""
    torch.save(
        {key: value for key, value in theirs.state_dict().items() if not key.startswith("head")}, tmp_path / "x.pth"
    )
    with pytest.warns(UserWarning, match="has no head; the model's, of 1000, starts from initial weights"):
        crossvit.create_model(TINY, checkpoint=tmp_path / "x.pth")


def test_mismatches_are_listed(theirs: nn.Module, tmp_path: Path) -> None:
    """One error lists all that is missing, unexpected or of another shape or kind, and nothing has been copied."""
    state = dict(theirs.state_dict())
    del state["blocks.1.projs.0.2.weight"], state["norm.1.bias"]
    state["extra.weight"] = torch.zeros(3)
    state["head.1.bias"] = torch.zeros(9)
    state["norm.0.weight"] = torch.zeros(96, dtype=torch.int64)
    torch.save(state, tmp_path / "x.pth")
    model = blank()
    with pytest.raises(ValueError) as error:
        crossvit.load_checkpoint(model, tmp_path / "x.pth")
    text = str(error.value)
    for fragment in (
        "holds crossvit_tiny_240, which does not fit crossvit_tiny_240; the model is as it was",
        "2 missing: blocks.1.projs.0.2.weight, norm.1.bias",
        "1 unexpected: extra.weight",
        "1 of another shape: head.1.bias (9,) instead of (1000,)",
        "1 not of floating point: norm.0.weight a tensor of torch.int64",
    ):
        assert fragment in text
    assert unchanged(model)


def test_other_classes_and_channels_are_errors_without_adapt(file: Path) -> None:
    """load_checkpoint itself is strict: it says how to adapt instead."""
    for arguments in ({"num_classes": 7}, {"in_chans": 1}):
        model = blank(**arguments)
        with pytest.raises(
            ValueError, match=r"of another shape: .*\n.*create_model\(\.\.\., checkpoint=…\) starts a new head"
        ):
            crossvit.load_checkpoint(model, file)
        assert unchanged(model)


@pytest.mark.parametrize("name", ["crossvit_9_240", "crossvit_15_dagger_240", "deit_tiny_patch16_224"])
def test_another_variants_file(name: str, tmp_path: Path) -> None:
    """A file of another model is recognised and named, by create_model too."""
    torch.save(our_model(name).state_dict(), tmp_path / "x.pth")
    model = blank()
    with pytest.raises(ValueError, match=f"holds {name}, which does not fit crossvit_tiny_240; the model is as it was"):
        crossvit.load_checkpoint(model, tmp_path / "x.pth")
    assert unchanged(model)
    with pytest.raises(ValueError, match=f"holds {name}"):
        crossvit.create_model(TINY, checkpoint=tmp_path / "x.pth", num_classes=3)


def test_every_variant_is_identified() -> None:
    """From names and shapes alone, also at another image size or with another number of classes; other weights are not
    mistaken.
    """
    for name in VARIANTS:
        with torch.device("meta"):
            assert identify(crossvit.create_model(name, num_classes=3).state_dict()) == name
            state = crossvit.create_model(name, image_size=120, in_chans=1).state_dict()
            ours = crossvit.create_model(TINY, embed_dim=(32, 64), num_heads=(2, 2)).state_dict()
        assert identify(state).endswith("for images of another size")
    assert "embed_dim=(32, 64)" in identify(ours)
    assert identify({"conv1.weight": torch.zeros(1)}) == "weights of some other kind of model"
    assert identify({"cls_token": torch.zeros(1, 1, 8)}) == "weights of some other kind of model"


@pytest.mark.parametrize("kept", [0, 1, 10, 1000, 0.3, 0.99])
@pytest.mark.parametrize("name", ["timm.safetensors", "timm.pth", "legacy.pth"])
def test_truncated_files(name: str, kept: float, theirs: nn.Module, tmp_path: Path) -> None:
    """A file cut off anywhere raises a clear error and changes nothing."""
    state = {key: value for key, value in theirs.state_dict().items() if "norm" in key}
    FILES[name](state, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    model = blank()
    with pytest.raises(ValueError, match=f"{name} is truncated, no checkpoint"):
        crossvit.load_checkpoint(model, tmp_path / name)
    assert unchanged(model)


class Payload:
    """An object whose unpickling would run code."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch /tmp/unpickled",)


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "holds no state dict but a list"),
        ({}, "holds no state dict but a dict"),
        (torch.zeros(3), "holds no state dict but a tensor of torch.float32"),
        ({"epoch": 3, "loss": 0.1}, "holds no state dict of tensors: 'epoch': a int, 'loss': a float"),
        ({"conv1.weight": torch.zeros(3)}, "holds weights of some other kind of model, which does not fit"),
        ({"model": Payload()}, "objects that are not loaded for safety"),
    ],
)
def test_other_content(content: object, message: str, tmp_path: Path) -> None:
    """A file of torch's that is no checkpoint says what it holds, and no code of it runs."""
    torch.save(content, tmp_path / "x.pth")
    model = blank()
    with pytest.raises(ValueError, match=message):
        crossvit.load_checkpoint(model, tmp_path / "x.pth")
    assert unchanged(model)


def test_paths(tmp_path: Path) -> None:
    """A missing file, a directory and a text file raise what they should."""
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*nowhere.pth: neither a file nor a hub name"):
        crossvit.load_checkpoint(blank(), tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="is a directory"):
        crossvit.load_checkpoint(blank(), tmp_path)
    (tmp_path / "notes.txt").write_text("not weights")
    with pytest.raises(ValueError, match="no checkpoint"):
        crossvit.load_checkpoint(blank(), tmp_path / "notes.txt")


def test_hub_names(theirs: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's hub names go to the hub's client, with or without hf_hub:; where it gives nothing the error says so."""
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for name in (
        "timm/crossvit_tiny_240.in1k",
        "hf_hub:timm/crossvit_tiny_240.in1k",
        "hf-hub:timm/crossvit_tiny_240.in1k",
    ):
        state, _ = read_checkpoint(name)
        assert torch.equal(state["norm.0.weight"], theirs.norm[0].weight)
    assert asked == [("timm/crossvit_tiny_240.in1k", "model.safetensors")] * 3

    def offline(repository: str, name: str) -> str:
        raise ConnectionError("network is unreachable")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        FileNotFoundError, match=r"timm/x is no file here, and the hub gave none \(no network\?\): network is"
    ):
        crossvit.load_checkpoint(blank(), "timm/x")


def test_metadata_of_safetensors(tmp_path: Path) -> None:
    """The file names its model and image size, for whoever looks into it."""
    crossvit.save_checkpoint(blank(image_size=(48, 96)), tmp_path / "x.safetensors")
    state, metadata = read_checkpoint(tmp_path / "x.safetensors")
    arguments = json.loads(metadata.pop("arguments"))
    assert metadata == {"format": "pt", "variant": TINY, "image_size": "48x96"}
    assert arguments == dict(in_chans=3, fusion="cross_attention", num_classes=1000, global_pool="token")
    assert math.prod(state["pos_embed_0"].shape) == 33 * 96


SMALL = dict(num_classes=3, image_size=(48, 60), embed_dim=[16, 32], depth=[[1, 1, 2]], num_heads=[2, 2], in_chans=1)


@pytest.mark.parametrize("kind", ["safetensors", "training"])
def test_load_model_builds_what_the_file_says(kind: str, tmp_path: Path) -> None:
    """A model of no paper's sizes comes back from its file alone, with the names of its classes."""
    model = crossvit.create_model(TINY, fusion="all_attention", **SMALL)
    model.reset_classifier(2, global_pool="avg")
    path = tmp_path / "x.safetensors"
    if kind == "safetensors":
        crossvit.save_checkpoint(model, path, classes=["cat", "dog"], crop_ratio=1.0)
    else:
        path = path.with_suffix(".pth")
        torch.save({"model": model.state_dict(), "epoch": 3} | notes(model, ["cat", "dog"], 1.0), path)
    again, said = crossvit.load_model(path, kernels="reference")
    assert (said["classes"], said["crop_ratio"], "multi_label" in said) == (["cat", "dog"], 1.0, False)
    assert (again.global_pool, again.image_size, again.kernels) == ("avg", (48, 60), "reference")
    images = torch.rand(2, 1, 48, 60)
    model.set_kernels("reference")
    assert torch.equal(again.eval()(images), model.eval()(images))
    other, _ = crossvit.load_model(path, image_size=72)
    assert other.image_size == (72, 72)


def test_load_model_recognises_a_bare_state_dict(tmp_path: Path) -> None:
    model = blank(num_classes=5)
    crossvit.save_checkpoint(model, tmp_path / "x.pth", layout="authors")
    again, said = crossvit.load_model(tmp_path / "x.pth")
    assert (again.variant, again.num_classes, said) == (TINY, 5, {})
    torch.save({"weight": torch.zeros(3)}, tmp_path / "y.pth")
    with pytest.raises(ValueError, match=r"y\.pth holds weights of some other kind of model: say which model"):
        crossvit.load_model(tmp_path / "y.pth")


def test_class_names_are_counted() -> None:
    with pytest.raises(ValueError, match="classes must name the model's 1000 classes, got 2 names"):
        notes(blank(), ["cat", "dog"])
