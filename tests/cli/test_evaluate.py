"""`crossvit evaluate`: exact counts, on one process and on several, of the model and of each of its branches."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import crossvit
from commands import CLASSES, PHOTOGRAPHS, command, photographs_by_class, save_small
from crossvit.cli.draw_confusion import draw_confusion
from crossvit.cli.metrics import Counts
from crossvit.data.images import load_image
from crossvit.data.transforms import evaluation_transform

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven, which neither two processes nor batches of two divide."""
    return photographs_by_class(tmp_path_factory.mktemp("photographs"))


def evaluate(*arguments: str | Path, status: int = 0) -> dict[str, Any]:
    done = command("evaluate", *arguments, "--json", "-", "--workers", "0")
    assert done.status == status, done.err
    return json.loads(done.out)


def by_hand(checkpoint: Path, folder: Path) -> tuple[Tensor, Tensor]:
    """(1 + branches, images, classes) logits and (images,) targets, image by image."""
    model = crossvit.load_model(checkpoint, kernels="reference")[0].eval()
    files = sorted(folder.rglob("*.png"))
    with torch.inference_mode():
        images = [evaluation_transform(72)(load_image(file))[None] for file in files]
        logits = [[model(image), *model.forward_branches(image)] for image in images]
    return (
        torch.stack([torch.cat(own) for own in zip(*logits)]),
        torch.tensor([CLASSES.index(file.parent.name) for file in files]),
    )


def test_the_counts_are_those_by_hand(checkpoint: Path, photographs: Path) -> None:
    found = evaluate(photographs, "--checkpoint", checkpoint, "--batch-size", "2")
    logits, targets = by_hand(checkpoint, photographs)
    answers = logits.argmax(dim=-1)
    right = (answers == targets).sum(dim=1).tolist()
    assert found["images"] == len(targets) == len(PHOTOGRAPHS)
    assert found["correct"] == {"top1": right[0], "top5": len(targets)}
    assert [own["correct"]["top1"] for own in found["branches"]] == right[1:]
    assert [own["patch_size"] for own in found["branches"]] == [12, 16]
    assert found["top1"] == pytest.approx(100 * right[0] / len(targets))
    confusion = torch.zeros(3, 3, dtype=torch.int64)
    for truth, answer in zip(targets, answers[0]):
        confusion[truth, answer] += 1
    assert found["confusion"] == confusion.tolist()
    assert 0 < right[0] < len(targets)  # else it would show little
    assert len(set(right)) > 1


def test_two_processes_count_what_one_does(checkpoint: Path, photographs: Path, tmp_path: Path) -> None:
    """Under torchrun, with a broken file: every image once, none twice, the same counts."""
    folder = photographs_by_class(tmp_path / "data")
    (folder / "things" / "broken.png").write_text("not a picture")
    shared = ("--checkpoint", checkpoint, "--batch-size", "2", "--device", "cpu")
    one = evaluate(folder, *shared, status=1)
    path = tmp_path / "two.json"
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "crossvit", "evaluate"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(folder), *map(str, shared), "--json", str(path), "--workers", "0"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    two = json.loads(path.read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    for name in ("images", "correct", "branches", "confusion", "classes", "top1", "top5", "failed"):
        assert one[name] == two[name], name
    assert one["images"] == len(PHOTOGRAPHS)
    assert one["failed"] == [[str(folder / "things" / "broken.png"), "no image, or one of an unknown format"]]
    # Only the first process prints, and its status is the command's.
    assert done.stdout.count("top-1") == 1
    assert "broken.png: no image" in done.stderr
    assert done.returncode == 1


def test_the_table_and_the_matrix(checkpoint: Path, photographs: Path, tmp_path: Path) -> None:
    """What is printed and drawn, of a folder with val/ in it; a broken file is named and left out."""
    data = tmp_path / "data"
    photographs_by_class(data / "val")
    (data / "val" / "people" / "empty.png").touch()
    drawn = tmp_path / "confusion.png"
    done = command("evaluate", data, "--checkpoint", checkpoint, "--confusion", drawn, "--workers", "0")
    assert done.status == 1
    assert done.err == f"{data / 'val' / 'people' / 'empty.png'}: the file is empty\n"
    assert "7 images" in done.out
    assert "branch 1 alone, patches 16" in done.out
    assert "1 files could not be read" in done.out
    assert np.asarray(Image.open(drawn).convert("L")).std() > 10


def test_several_labels(tmp_path: Path) -> None:
    """Mean average precision, as scikit-learn counts it, of the model and of each branch."""
    metrics = pytest.importorskip("sklearn.metrics")
    folder = photographs_by_class(tmp_path / "data")
    files = sorted(folder.rglob("*.png"))
    labels = [["animals"], ["people", "things"], ["people"], [], ["things"], ["things", "animals"], ["things"]]
    with open(folder / "labels.csv", "w", newline="") as file:
        rows = [(path.relative_to(folder), ";".join(own)) for path, own in zip(files, labels)]
        csv.writer(file).writerows([("image", "labels"), *rows])
    checkpoint = save_small(tmp_path)
    found = evaluate(folder, "--checkpoint", checkpoint, "--batch-size", "3")
    logits, _ = by_hand(checkpoint, folder)
    truth = np.array([[name in own for name in CLASSES] for own in labels])
    expected = [metrics.average_precision_score(truth, own.numpy(), average=None) for own in logits]
    assert found["images"] == len(files)
    assert list(found["classes"].values()) == pytest.approx((100 * expected[0]).tolist())
    means = [found["mean_average_precision"], *(own["mean_average_precision"] for own in found["branches"])]
    assert means == pytest.approx([100 * own.mean() for own in expected])


def test_folders_are_matched_by_name(tmp_path: Path) -> None:
    """Fewer folders than the model has classes, and the model's order of them."""
    data = photographs_by_class(tmp_path / "data", ["cat", "coffee"])
    model = crossvit.load_model(save_small(tmp_path))[0]
    crossvit.save_checkpoint(model, tmp_path / "x.safetensors", classes=["things", "people", "animals"])
    found = evaluate(data, "--checkpoint", tmp_path / "x.safetensors")
    assert [sum(row) for row in found["confusion"]] == [1, 0, 1]
    assert found["classes"]["people"] is None
    # Without names the folders must be all classes.
    crossvit.save_checkpoint(model, tmp_path / "bare.safetensors")
    done = command("evaluate", data, "--checkpoint", tmp_path / "bare.safetensors")
    assert done.status == 2
    assert "has 2 classes, the model 3: say with --classes" in done.err
    (data / "plants").mkdir()
    Image.new("RGB", (20, 20)).save(data / "plants" / "x.png")
    done = command("evaluate", data, "--checkpoint", tmp_path / "x.safetensors")
    assert done.status == 2
    assert "has classes that the model was not made for: plants" in done.err


def test_a_single_branch(photographs: Path, tmp_path: Path) -> None:
    model = crossvit.create_model("deit_tiny_patch16_224", image_size=32, embed_dim=48, depth=1, num_classes=3)
    crossvit.save_checkpoint(model, tmp_path / "x.safetensors", classes=CLASSES)
    found = evaluate(photographs, "--checkpoint", tmp_path / "x.safetensors")
    assert (found["branches"], found["crop_ratio"], found["images"]) == ([], 0.9, len(PHOTOGRAPHS))


def test_what_cannot_be_evaluated(checkpoint: Path, photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    headless = tmp_path / "headless.safetensors"
    model = crossvit.load_model(checkpoint)[0]
    model.reset_classifier(0)
    crossvit.save_checkpoint(model, headless)
    (tmp_path / "broken" / "people").mkdir(parents=True)
    (tmp_path / "broken" / "people" / "x.png").touch()
    for data, weights, reason in (
        (tmp_path / "broken", checkpoint, "none of the 1 images"),
        (tmp_path / "nowhere", checkpoint, "data must be a folder"),
        (tmp_path / "empty", checkpoint, "has no folders of images, one per class"),
        (photographs, headless, "the model has no head"),
    ):
        done = command("evaluate", data, "--checkpoint", weights)
        assert done.status == 2, data
        assert reason in done.err


def test_counts() -> None:
    """Ranks by hand; NaN is never right."""
    counts = Counts(classes=7, branches=1)
    logits = torch.eye(7)[[0, 1, 2]] * 2 + torch.linspace(1, 0, 7)
    branch = logits.clone()
    branch[0] = torch.nan
    counts.add([logits, branch], torch.tensor([0, 2, 6]))
    assert counts.images == 3
    model, alone = counts.accuracies()
    assert model == pytest.approx((100 / 3, 200 / 3))
    assert alone == pytest.approx((0, 100 / 3))
    assert counts.confusion.nonzero().tolist() == [[0, 0], [2, 1], [6, 2]]


@pytest.mark.parametrize("classes", [2, 12, 45, 100])
def test_matrices_of_any_size_are_drawn(classes: int, tmp_path: Path) -> None:
    confusion = torch.eye(classes, dtype=torch.int64) * 9
    confusion[0, -1] = 3
    names = [f"class number {i}" for i in range(classes)]
    draw_confusion(confusion, names, tmp_path / "x.png")
    assert max(Image.open(tmp_path / "x.png").size) < 3000
