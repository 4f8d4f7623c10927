"""What a run may go on as: `--resume` refuses another function and seed, says every other difference, and with --ema
goes on from the weights as they are while the other commands get their average.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import crossvit
import training_runs
from commands import command
from crossvit.models.crossvit import CrossViT
from crossvit.models.variants import VARIANTS
from crossvit.training import files
from crossvit.weights.notes import whole_arguments
from training_runs import train

one_thread, data = training_runs.one_thread, training_runs.data  # fixtures
EMA = ("--ema", "0.5")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one epoch."""
    out = tmp_path_factory.mktemp("resume") / "run"
    status, printed = train(data, out, "--epochs", "1")
    assert status == 0, printed
    return out


def refused(data: Path, run: Path, *options: str) -> str:
    """The one line that is printed where a run may not go on; its files are as they were."""
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    status, printed = train(data, run, "--epochs", "1", "--resume", "auto", *options)
    assert status == 2, printed
    assert printed.count("\n") == 1
    assert printed.startswith(f"crossvit train: error: --resume {run / 'last.pth'}: ")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    return printed.partition("last.pth: ")[2].strip()


OTHER = "the checkpoint's weights are of another model: "
# By the argument of the model: what is typed, and what is said.
ARGUMENTS = {
    "image_size": ("--image-size 60", "image_size is [60, 60], was [48, 48]"),
    "drop_rate": ("--drop 0.25", "drop is 0.25, was 0.0"),
    "drop_path_rate": ("--drop-path 0.25", "drop_path is 0.25, was 0.1"),
    "img_scale": ("--set img_scale=[1,1]", f"img_scale is [1, 1], was [1.0, {224 / 240}]"),
    "patch_size": ("--set patch_size=[16,16]", "patch_size is [16, 16], was [12, 16]"),
    "embed_dim": ("--set embed_dim=[32,32]", "embed_dim is [32, 32], was [16, 32]"),
    "depth": ("--set depth=[[1,1,0]]", "depth is [[1, 1, 0]], was [[1, 1, 0], [1, 1, 1]]"),
    "num_heads": ("--set num_heads=[2,4]", "num_heads is [2, 4], was [2, 2]"),
    "mlp_ratio": ("--set mlp_ratio=[4,2]", "mlp_ratio is [4, 2], was [4.0, 4.0]"),
    "multi_conv": ("--set multi_conv=true", "multi_conv is True, was False"),
    "crop_scale": ("--set crop_scale=true", "crop_scale is True, was False"),
    "qkv_bias": ("--set qkv_bias=false", "qkv_bias is False, was True"),
    "fusion": ("--set fusion=pairwise", "fusion is pairwise, was cross_attention"),
    "global_pool": ("--set global_pool=avg", "global_pool is avg, was token"),
    "pos_drop_rate": ("--set pos_drop_rate=0.1", "pos_drop_rate is 0.1, was 0.0"),
    "proj_drop_rate": ("--set proj_drop_rate=0.1", "proj_drop_rate is 0.1, was 0.0"),
    "attn_drop_rate": ("--set attn_drop_rate=0.1", "attn_drop_rate is 0.1, was 0.0"),
    "pos_std": ("--set pos_std=0.5", "pos_std is 0.5, was 0.02"),
}


def test_every_argument_is_among_them() -> None:
    """But those that a run has from its data, and the kernels, which compute the same."""
    assert ARGUMENTS.keys() == inspect.signature(CrossViT).parameters.keys() - {"num_classes", "in_chans", "kernels"}
    noted = whole_arguments({"variant": "crossvit_tiny_240"})
    assert ARGUMENTS.keys() - {"drop_rate", "drop_path_rate"} == noted.keys() - {"num_classes", "in_chans"}


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_another_function_is_refused(argument: str, data: Path, run: Path) -> None:
    """Any argument of the model, with its value here and the checkpoint's, whether the weights' shapes show it or
    not.
    """
    typed, message = ARGUMENTS[argument]
    assert refused(data, run, *typed.split()) == OTHER + message


def test_another_seed_and_another_model_are_refused(data: Path, run: Path) -> None:
    assert refused(data, run, "--seed", "7") == "the checkpoint is of another run: seed is 7, was 0"
    assert "crossvit_tiny_224" not in VARIANTS  # the authors' name of the same model goes on
    assert train(data, run, "--epochs", "1", "--resume", "auto", "--model", "crossvit_tiny_224")[0] == 0
    assert refused(data, run, "--model", "crossvit_small_240").startswith(
        OTHER + "model is crossvit_small_240, was crossvit_tiny_240"
    )


def test_all_that_differs_is_refused_at_once(data: Path, run: Path) -> None:
    """In one sentence, the optimizer's too."""
    options = "--set num_heads=[1,1] --set fusion=none --drop 0.5 --seed 3 --optimizer sgd --lr 0.1"
    assert refused(data, run, *options.split()) == (
        OTHER + "num_heads is [1, 1], was [2, 2], fusion is none, was cross_attention, drop is 0.5, was 0.0; "
        "the checkpoint is of another run: seed is 3, was 0; "
        "optimizer must stay what it was within a run, adamw, got sgd"
    )


def test_an_option_left_out_has_its_default(data: Path, tmp_path: Path) -> None:
    """A run that was given its pooling and its seed goes on with the same command, and not without them."""
    given = ["--set", "global_pool=avg", "--seed", "5"]
    assert train(data, tmp_path / "run", "--epochs", "1", *given)[0] == 0
    message = OTHER + "global_pool is token, was avg; the checkpoint is of another run: seed is 0, was 5"
    assert refused(data, tmp_path / "run") == message
    status, printed = train(data, tmp_path / "run", "--epochs", "2", "--resume", "auto", *given)
    assert status == 0, printed
    assert "at step 3; epochs is 2, was 1" in printed


def test_what_leaves_the_function_is_said(data: Path, tmp_path: Path) -> None:
    """The recipe and all other options, with both values; the run goes on."""
    out = tmp_path / "run"
    assert train(data, out, "--epochs", "1")[0] == 0
    options = "--epochs 2 --lr 0.01 --batch-size 4 --label-smoothing 0.2 --kernels reference --workers 1 --log-every 1"
    status, printed = train(data, out, "--resume", "auto", *options.split(), "--eval-batch-size", "3")
    assert status == 0, printed
    first = printed.splitlines()[0]
    for said in (
        "epochs is 2, was 1",
        "lr is 0.01, was 0.001",
        "batch_size is 4, was 8",
        "label_smoothing is 0.2, was 0.1",
        "kernels is reference, was auto",
        "workers is 1, was 0",
        "log_every is 1, was 2",
        "eval_batch_size is 3, was None",
    ):
        assert said in first
    assert "seed" not in first


def test_a_run_of_an_earlier_version_goes_on(data: Path, run: Path, tmp_path: Path) -> None:
    """One that did not note its options."""
    content = files.load(run / "last.pth")
    del content["settings"]
    files.save(content, tmp_path / "last.pth")
    status, printed = train(
        data, tmp_path / "on", "--epochs", "1", "--resume", str(tmp_path / "last.pth"), "--seed", "9"
    )
    assert status == 0, printed


def test_what_is_no_whole_run(data: Path, run: Path, tmp_path: Path) -> None:
    """One line each, whatever is missing or odd in the file."""
    whole = files.load(run / "last.pth")

    def tried(path: Path) -> str:
        status, printed = train(data, tmp_path / "out", "--epochs", "1", "--resume", str(path))
        assert (status, printed.count("\n")) == (2, 1), printed
        return printed

    for name in ("recipe", "model", "optimizer", "generators", "classes", "images"):
        files.save({key: value for key, value in whole.items() if key != name}, tmp_path / "x.pth")
        assert f"the checkpoint is not a whole run of this program's: it lacks {name}\n" in tried(tmp_path / "x.pth")
    for changes in (
        {"position": {"epoch": 0, "planet": 3}},
        {"optimizer": {"state": {}}},
        {"generators": [{}]},
        {"recipe": {}},
        {"settings": 3},
    ):
        files.save(whole | changes, tmp_path / "x.pth")
        assert "holds a damaged run, or one of another version" in tried(tmp_path / "x.pth")
    assert f"--resume {run} is a directory, expected a file such as {run / 'last.pth'}" in tried(run)
    assert "best.pth holds weights alone, no training run" in tried(run / "best.pth")
    crossvit.save_checkpoint(crossvit.load_model(run / "best.pth")[0], tmp_path / "x.safetensors")
    assert "x.safetensors holds weights alone, no training run" in tried(tmp_path / "x.safetensors")
    assert "Traceback" not in tried(tmp_path / "nowhere.pth")


def test_averaged_weights_for_the_other_commands(data: Path, tmp_path: Path) -> None:
    """With --ema last.pth gives them the average, as best.pth does: predict, evaluate, export, train --checkpoint. A
    resumed run has both, the weights and their average.
    """
    out = tmp_path / "run"
    assert train(data, out, "--epochs", "1", *EMA)[0] == 0
    last = files.load(out / "last.pth")
    best = torch.load(out / "best.pth", weights_only=True)["model"]
    raw, mean = last["model"], last["ema"]
    assert any(not torch.equal(raw[key], mean[key]) for key in raw)
    assert all(torch.equal(best[key], mean[key]) for key in mean)
    found = crossvit.load_model(out / "last.pth")[0].state_dict()
    assert all(torch.equal(found[key], mean[key]) for key in mean)

    picture = next((data / "val").glob("*/*.png"))
    printed = {
        name: [
            json.loads(command("predict", picture, "--checkpoint", out / name, "--format", "json").out)
            if option == "predict"
            else command("evaluate", data, "--checkpoint", out / name).out.rpartition("\n")[0].rpartition("\n")[0]
            for option in ("predict", "evaluate")
        ]
        for name in ("last.pth", "best.pth")
    }
    assert printed["last.pth"] == printed["best.pth"]
    assert command("export", tmp_path / "x.pth", "--checkpoint", out / "last.pth").status == 0
    exported = torch.load(tmp_path / "x.pth", weights_only=True)
    assert all(torch.equal(exported[key], mean[key]) for key in mean)
    beside = json.loads(command("info", "--checkpoint", out / "last.pth", "--json").out)["checkpoint"]
    assert (beside["weights"], beside["averaged"]) == ("ema", True)
    assert beside["beside"].keys() >= {"model", "optimizer", "position", "recipe", "settings"}

    status, said = train(data, out, "--epochs", "1", "--resume", "auto", *EMA, "--workers", "0")
    assert status == 0, said
    again = files.load(out / "last.pth")
    for name in ("model", "ema"):
        assert all(torch.equal(again[name][key], last[name][key]) for key in raw)


def test_notes_of_a_run(run: Path) -> None:
    """The seed and the other options are in its checkpoints, as plain values."""
    settings: dict[str, Any] = files.load(run / "last.pth")["settings"]
    assert settings["seed"] == 0
    assert settings["device"] == "cpu"
    assert json.loads(json.dumps(settings)) == settings
