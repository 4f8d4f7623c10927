"""What names and shapes of weights do not show: a file that says its fusion, heads, patches or pooling fits no model
with others, and a model without values is said to have got none.
"""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import crossvit
from commands import CLASSES, SMALL, command, save_small, small_model
from crossvit.models.positions import resample_positions
from crossvit.weights.notes import hidden_settings, notes, read_notes, whole_arguments

NAME = "crossvit_tiny_240"


def blank(**overrides: Any) -> crossvit.CrossViT:
    """A model for files to be loaded into."""
    return crossvit.create_model(NAME, **(SMALL | overrides))


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


# In the file, in the model, and what is said of it; the weights' names and shapes are the same.
PAIRS = {
    "fusion": (
        dict(fusion="class_token"),
        dict(fusion="pairwise"),
        "1 of another setting: fusion 'class_token' instead of 'pairwise'",
    ),
    "num_heads": (
        dict(num_heads=(6, 6)),
        dict(num_heads=(3, 6)),
        "1 of another setting: num_heads [6, 6] instead of [3, 6]",
    ),
    "the variant's num_heads": (
        {},
        dict(num_heads=(6, 3)),
        "1 of another setting: num_heads [3, 3] instead of [6, 3]",
    ),
    "patch_size": (
        dict(multi_conv=True, patch_size=(12, 16)),
        dict(multi_conv=True, patch_size=(12, 12)),
        "1 of another setting: patch_size [12, 16] instead of [12, 12]",
    ),
    "crop_scale": (
        dict(crop_scale=True),
        dict(),
        "1 of another setting: crop_scale True instead of False",
    ),
    "global_pool": (
        dict(global_pool="avg"),
        dict(),
        "1 of another setting: global_pool 'avg' instead of 'token'",
    ),
    "two": (
        dict(fusion="pairwise", num_heads=(6, 6)),
        dict(fusion="class_token"),
        "2 of another setting: fusion 'pairwise' instead of 'class_token', num_heads [6, 6] instead of [3, 3]",
    ),
}


@pytest.mark.parametrize("kind", ["safetensors", "training"])
@pytest.mark.parametrize("what", PAIRS)
def test_another_setting_does_not_fit(what: str, kind: str, tmp_path: Path) -> None:
    """Both values are named and nothing is copied, by load_checkpoint and by create_model; load_model makes the file's
    model.
    """
    theirs, ours, message = PAIRS[what]
    made = small_model(**theirs)
    path = tmp_path / f"x.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == "safetensors":
        crossvit.save_checkpoint(made, path)
    else:
        torch.save({"model": made.state_dict(), "epoch": 3} | notes(made), path)
    model = blank(**ours)
    before = copy_of(model)
    with pytest.raises(ValueError, match="the model is as it was") as error:
        crossvit.load_checkpoint(model, path)
    assert message in str(error.value)
    assert same(model, before)
    with pytest.raises(ValueError) as error:
        crossvit.create_model(NAME, checkpoint=path, **(SMALL | ours))
    assert message in str(error.value)
    crossvit.load_checkpoint(blank(**theirs), path)
    found, _ = crossvit.load_model(path)
    assert same(found, made.state_dict())
    assert hidden_settings(found) == hidden_settings(made)


def test_a_single_branch_too(tmp_path: Path) -> None:
    sizes = dict(image_size=32, embed_dim=24, depth=1, num_classes=3)
    made = crossvit.create_model("deit_tiny_patch16_224", num_heads=2, **sizes)
    crossvit.save_checkpoint(made, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"1 of another setting: num_heads 2 instead of 3"):
        crossvit.load_checkpoint(crossvit.create_model("deit_tiny_patch16_224", **sizes), tmp_path / "x.safetensors")
    assert crossvit.load_model(tmp_path / "x.safetensors")[0].num_heads == 2


def test_what_does_not_change_the_function_fits(tmp_path: Path) -> None:
    """Rates of dropout, initial deviations, other sizes of the image and of a branch's, and files that say nothing."""
    made = small_model(proj_drop_rate=0.1, pos_std=0.5, image_size=120)
    crossvit.save_checkpoint(made, tmp_path / "x.safetensors")
    model = blank(image_size=120, img_scale=(1.0, 1.0), drop_rate=0.3, drop_path_rate=0.2)
    crossvit.load_checkpoint(model, tmp_path / "x.safetensors")
    assert torch.equal(model.norm[0].weight, made.norm[0].weight)
    assert torch.equal(model.pos_embed_1, resample_positions(made.pos_embed_1, (7, 7), (8, 8)))
    save_file(made.state_dict(), tmp_path / "bare.safetensors")
    crossvit.load_checkpoint(blank(num_heads=(6, 6)), tmp_path / "bare.safetensors")


def test_what_is_asked_for_by_name_is_said(tmp_path: Path) -> None:
    """load_model's overrides stand in place of what the file says, with a warning where that is another function."""
    path = save_small(tmp_path)
    with pytest.warns(UserWarning, match=r"it was made with num_heads=\[3, 3\], the model has \[6, 6\]"):
        model, _ = crossvit.load_model(path, num_heads=(6, 6))
    assert model.num_heads == (6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crossvit.load_model(path, num_heads=(3, 3), name=NAME)  # as the file has it
        crossvit.load_model(path, name="crossvit_tiny_224", image_size=96)  # the authors' name of the same


def test_pooling_goes_with_the_head(tmp_path: Path) -> None:
    """A new head, or none, may read other features than the file's did: that is said."""
    path = save_small(tmp_path, global_pool="avg")
    pool = "it was made with global_pool='avg', the model has 'token'"
    for classes in (5, 0):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            crossvit.create_model(NAME, checkpoint=path, **(SMALL | dict(num_classes=classes)))
        assert [str(warning.message).partition("safetensors: ")[2] for warning in said][-1] == pool
    with pytest.raises(ValueError, match="global_pool 'avg' instead of 'token'"):
        crossvit.create_model(NAME, checkpoint=path, **SMALL)


def test_the_commands_say_it_in_their_error(tmp_path: Path) -> None:
    made = small_model(fusion="pairwise")
    crossvit.save_checkpoint(made, tmp_path / "x.safetensors", classes=CLASSES)
    sizes = ["--set", "embed_dim=[48,96]", "--set", "depth=[[1,1,0],[1,1,0]]", "--image-size", "72"]
    done = command("info", "--checkpoint", tmp_path / "x.safetensors")
    assert (done.status, "fusion: pairwise" in done.out) == (0, True)
    assert command("info", "--checkpoint", tmp_path / "x.safetensors", "--model", NAME).status == 0
    done = command("info", "--checkpoint", tmp_path / "x.safetensors", "--model", "crossvit_9_240", *sizes)
    assert "fusion 'pairwise' instead of 'cross_attention'" in done.out
    assert "Traceback" not in done.out + done.err


def test_whole_arguments_are_what_was_given_and_the_defaults() -> None:
    """Two ways of asking for the same model have the same ones."""
    plain = read_notes(notes(crossvit.create_model(NAME, image_size=96)))
    spelt = read_notes(notes(crossvit.create_model("crossvit_tiny_224", image_size=(96, 96), num_heads=[3, 3])))
    assert whole_arguments(plain) == whole_arguments(spelt)
    assert whole_arguments(plain)["image_size"] == [96, 96]
    assert "kernels" not in whole_arguments(plain)
    assert whole_arguments({}) == {}
    assert whole_arguments({"variant": "of a later version", "arguments": {"gates": (1, 2)}}) == {"gates": [1, 2]}


@pytest.mark.parametrize(
    "metadata",
    [
        {"arguments": "[1]"},
        {"arguments": '{"depth": '},
        {"classes": '{"0": "cat"}'},
        {"classes": "[1, 2, 3]"},
        {"crop_ratio": '"wide"'},
        {"crop_ratio": "NaN"},
        {"crop_ratio": "-1"},
        {"multi_label": "3"},
        {"image_size": "0x72"},
        {"image_size": "72"},
        {"arguments": "[" * 100_000},
    ],
    ids=lambda value: str(value)[:40],
)
def test_damaged_notes_are_left_out(metadata: dict[str, str], tmp_path: Path) -> None:
    """The weights are recognised, or the model named, without them; no command ends in a traceback."""
    made = crossvit.create_model(NAME, num_classes=3)
    save_file(made.state_dict(), tmp_path / "x.safetensors", metadata)
    model, said = crossvit.load_model(tmp_path / "x.safetensors")
    assert said == {}
    assert same(model, made.state_dict())


@pytest.mark.parametrize(
    "arguments",
    [
        {"img_scale": [1.0, float("inf")]},
        {"depth": [[1, 1]]},
        {"depth": {"a": 1}},
        {"embed_dim": [[], 3]},
        {"gates": 3},
    ],
    ids=str,
)
def test_arguments_that_no_model_has(arguments: dict[str, Any], tmp_path: Path) -> None:
    """Odd values in a file's notes end no command in a traceback."""
    path = save_small(tmp_path)
    noted = notes(small_model())
    noted["arguments"] = json.dumps(json.loads(noted["arguments"]) | arguments)
    save_file(load_file(path), path, noted)
    done = command("predict", tmp_path / "x.png", "--checkpoint", path)
    assert done.status == 2
    assert done.err.startswith("crossvit predict: error: ")
    with pytest.raises(ValueError, match="the model is as it was"):  # its own arguments are not the file's
        crossvit.load_checkpoint(blank(num_heads=(6, 6)), path)


def test_notes_give_no_other_file(tmp_path: Path) -> None:
    """A file's notes cannot have another one loaded, or name a backend."""
    path = save_small(tmp_path)
    noted = notes(small_model())
    noted["arguments"] = json.dumps(
        json.loads(noted["arguments"]) | {"checkpoint": str(tmp_path / "other.pth"), "kernels": "cuda", "name": "x"}
    )
    save_file(load_file(path), path, noted)
    model, _ = crossvit.load_model(path, kernels="reference")
    assert model.kernels == "reference"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_model_without_values(suffix: str, tmp_path: Path) -> None:
    """On the meta device a file is checked, and one warning says that nothing was loaded and what to do; saving is
    refused.
    """
    made, path = small_model(), tmp_path / f"x{suffix}"
    crossvit.save_checkpoint(made, path)
    with torch.device("meta"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = crossvit.create_model(NAME, checkpoint=path, **(SMALL | dict(image_size=96)))
    (warning,) = said
    assert "its weights fit, but none was loaded: the model is on the meta device" in str(warning.message)
    assert all(parameter.is_meta for parameter in model.parameters())
    with torch.device("meta"), pytest.raises(ValueError, match="which does not fit"):
        crossvit.create_model(NAME, checkpoint=path, **(SMALL | dict(depth=((1, 2, 0),))))
    with pytest.raises(ValueError, match="model has no values to save on the meta device: pos_embed_0"):
        crossvit.save_checkpoint(model, tmp_path / f"y{suffix}")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    model = model.to_empty(device="cpu")
    crossvit.load_checkpoint(model, path)
    assert torch.equal(model.head[0].weight, made.head[0].weight)
