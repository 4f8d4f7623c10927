"""Datasets from folders and CIFAR's files, and the transforms: timm's evaluation, and training by its augmentation."""

import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from commands import command
from crossvit.data.datasets import open_dataset
from crossvit.data.images import ImageError
from crossvit.data.transforms import evaluation_transform, training_transform
from training_runs import train


def picture(seed: int = 0, size: tuple[int, int] = (60, 45)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def test_folder_by_class(tmp_path: Path) -> None:
    for split, names in {"train": ("b", "a", "c"), "validation": ("c", "a")}.items():
        for k, name in enumerate(names):
            (tmp_path / split / name).mkdir(parents=True)
            picture(k).save(tmp_path / split / name / "x.PNG", format="png")
            (tmp_path / split / name / "notes.txt").write_text("no image")
    train = open_dataset(tmp_path, "train")
    assert (train.classes, list(train.targets), train.multi_label) == (["a", "b", "c"], [0, 1, 2], False)
    assert train.paths[1] == tmp_path / "train" / "b" / "x.PNG"
    np.testing.assert_array_equal(np.asarray(train[1][0]), np.asarray(picture(0)))
    val = open_dataset(tmp_path, "val", train.classes)  # b has no images there
    assert list(val.targets) == [0, 2]
    with pytest.raises(ValueError, match="classes that the model was not made for: c"):
        open_dataset(tmp_path, "val", ["a", "b"])


def test_several_labels(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for k in range(3):
        picture(k).save(tmp_path / "train" / f"{k}.png")
    (tmp_path / "train" / "labels.csv").write_text("image,labels\n0.png,dog; cat\n1.png,\n2.png,cat\n")
    dataset = open_dataset(tmp_path, "train")
    assert dataset.multi_label
    assert dataset.classes == ["cat", "dog"]
    assert torch.stack([dataset[k][1] for k in range(3)]).tolist() == [[1, 1], [0, 0], [1, 0]]
    with pytest.raises(ValueError, match="labels that the model was not made for: dog"):
        open_dataset(tmp_path, "train", ["cat"])
    (tmp_path / "train" / "labels.csv").write_text("0.png,dog\n")
    with pytest.raises(ValueError, match="must have a line 'image,labels'"):
        open_dataset(tmp_path, "train")


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    """torchvision's files, with its check of their contents left out."""
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = {10: CIFAR10, 100: CIFAR100}[classes]
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    names = [f"class{k}" for k in range(classes)]
    data = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    for name, _ in kind.train_list + kind.test_list:
        (folder / name).write_bytes(
            pickle.dumps({"data": data, "labels" if classes == 10 else "fine_labels": [3, 1, 2, 0]})
        )
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))
    dataset = open_dataset(f"cifar{classes}:{tmp_path}", "val")
    assert dataset.classes == names
    assert list(dataset.targets) == [3, 1, 2, 0]
    assert dataset[0][0].size == (32, 32)
    # And through the commands.
    where, run = f"cifar{classes}:{tmp_path}", tmp_path / "run"
    status, printed = train(where, run, "--epochs", "1", "--batch-size", "4")
    assert status == 0, printed
    assert f"images of {classes} classes, 4 to validate" in printed
    found = command("evaluate", where, "--checkpoint", run / "best.pth", "--json", "-", "--workers", "0")
    assert (found.status, json.loads(found.out)["images"]) == (0, 4)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="data must be a folder"):
        open_dataset(tmp_path / "none", "train")
    with pytest.raises(FileNotFoundError, match="no folder val or"):
        open_dataset(tmp_path, "val")
    with pytest.raises(FileNotFoundError, match="does not hold cifar10"):
        open_dataset(f"cifar10:{tmp_path}", "train")
    with pytest.raises(ValueError, match="split must be one of train, val, got 'all'"):
        open_dataset(tmp_path, "all")
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no images"):
        open_dataset(tmp_path, "train")
    (tmp_path / "train" / "a" / "x.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"x.png: the file is empty"):
        open_dataset(tmp_path, "train")[0]


@pytest.mark.parametrize("image_size", [240, 96, (48, 80)])
@pytest.mark.parametrize("crop_ratio", [0.875, 1.0])
@pytest.mark.parametrize("size", [(60, 45), (45, 60), (300, 301), (500, 40)])
def test_evaluation_transform(image_size: int | tuple[int, int], crop_ratio: float, size: tuple[int, int]) -> None:
    """A square input is timm's evaluation transform of it; any input is covered whole."""
    image = picture(size=size)
    found = evaluation_transform(image_size, crop_ratio)(image)
    assert found.shape == (3, *((image_size,) * 2 if isinstance(image_size, int) else image_size))
    if isinstance(image_size, int):
        timms = create_transform(image_size, interpolation="bicubic", crop_pct=crop_ratio)(image)
        torch.testing.assert_close(found, timms)
    white = evaluation_transform(image_size, crop_ratio)(Image.new("RGB", size, "white"))
    assert (white > 2).all()  # no border was filled up


def test_evaluation_transform_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="crop_ratio must be above 0 and at most 1, got 0"):
        evaluation_transform(48, 0)
    with pytest.raises(ValueError, match="image_size must be positive"):
        evaluation_transform(0)


def test_training_transform() -> None:
    """Random, and again the same from the same generators; other policies are refused."""
    image, transform = picture(), training_transform((48, 80))

    def drawn() -> torch.Tensor:
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        return transform(image)

    first = drawn()
    assert first.shape == (3, 48, 80)
    assert torch.equal(first, drawn())
    assert not torch.equal(first, transform(image))
    plain = training_transform(48, auto_augment="none", color_jitter=0, flip=0, erasing=0)
    assert plain(image).shape == (3, 48, 48)
    with pytest.raises(ValueError, match="auto_augment must be 'none' or a policy"):
        training_transform(48, auto_augment="rnad-m9")


@pytest.mark.parametrize("policy", ["rand-m10-n15-inc1", "original", "augmix-m10"])
def test_every_operation_of_a_policy(policy: str) -> None:
    """Also at the magnitudes where timm's posterize asks for no bits at all."""
    transform = training_transform(24, auto_augment=policy)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    for k in range(60):
        assert transform(picture(k)).isfinite().all()
