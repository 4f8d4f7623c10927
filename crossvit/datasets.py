"""Datasets: folders of images, one folder per class; folders with several labels per image; CIFAR."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets

from .data import load_image

SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}
CIFAR = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
LABELS = "labels.csv"


class Images(Dataset):
    """Images with targets: item i is (picture as `transform` leaves it, target).

    The target is a class index, or with several labels per image a float32 (classes,) of zeros and ones. `classes` are
    the names, `multi_label` says which, `paths` are the files or `pixels` the images themselves, (N, H, W, 3) of uint8.
    Raises ImageError where the file is broken.
    """

    def __init__(
        self,
        targets: Sequence[int] | Tensor,
        classes: Sequence[str],
        *,
        paths: Sequence[Path] = (),
        pixels: np.ndarray | None = None,
    ) -> None:
        self.targets, self.classes, self.paths, self.pixels = targets, list(classes), list(paths), pixels
        self.multi_label = isinstance(targets, Tensor)
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = load_image(self.paths[index]) if self.pixels is None else Image.fromarray(self.pixels[index])
        return (self.transform(image) if self.transform else image), self.targets[index]


def open_dataset(where: str | Path, split: str, classes: Sequence[str] | None = None) -> Images:
    """The training ("train") or validation ("val") images of a dataset.

    where: a folder that holds train/ and val/ (or validation/, test/), each with one folder of images per class, or
    with a labels.csv of lines `file,label;label;…` under a line `image,labels`; or "cifar10:FOLDER", "cifar100:FOLDER"
    as torchvision stores them. classes: names in the order of a model's logits, for which the images must then be; by
    default those found, sorted.

    Raises FileNotFoundError for what is not there, ValueError for a split or label that is unknown, or without images.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    name, _, folder = str(where).partition(":")
    if name in CIFAR and folder:
        return _cifar(name, folder, split, classes)
    root = Path(where)
    if not root.is_dir():
        raise FileNotFoundError(f"data must be a folder, or cifar10:FOLDER or cifar100:FOLDER, got {where}")
    found = [root / candidate for candidate in SPLITS[split] if (root / candidate).is_dir()]
    if not found:
        raise FileNotFoundError(f"{root} has no folder {' or '.join(SPLITS[split])}")
    return open_folder(found[0], classes)


def open_folder(root: Path, classes: Sequence[str] | None = None) -> Images:
    """The images of one folder that has a folder per class or a labels.csv in it; raises as `open_dataset`."""
    return _labelled(root, classes) if (root / LABELS).is_file() else _folder(root, classes)


def _folder(root: Path, classes: Sequence[str] | None) -> Images:
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not folders:
        raise ValueError(f"{root} has no folders of images, one per class")
    names = folders if classes is None else list(classes)
    if unknown := [folder for folder in folders if folder not in names]:
        raise ValueError(f"{root} has classes that the model was not made for: {', '.join(unknown[:8])}")
    samples = datasets.folder.make_dataset(
        root,
        {name: names.index(name) for name in folders},
        extensions=datasets.folder.IMG_EXTENSIONS,
        allow_empty=True,
    )
    if not samples:
        raise ValueError(f"{root} has no images ({', '.join(datasets.folder.IMG_EXTENSIONS)}) in folders by class")
    return Images([target for _, target in samples], names, paths=[Path(path) for path, _ in samples])


def _labelled(root: Path, classes: Sequence[str] | None) -> Images:
    with open(root / LABELS, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"image", "labels"} <= rows[0].keys():
        raise ValueError(f"{root / LABELS} must have a line 'image,labels' and one line per image below")
    labels = [[label.strip() for label in (row["labels"] or "").split(";") if label.strip()] for row in rows]
    names = sorted({label for several in labels for label in several}) if classes is None else list(classes)
    index = {name: i for i, name in enumerate(names)}
    if unknown := sorted({label for several in labels for label in several} - index.keys()):
        raise ValueError(f"{root / LABELS} has labels that the model was not made for: {', '.join(unknown[:8])}")
    targets = torch.zeros(len(rows), len(names))
    for row, several in zip(targets, labels):
        row[[index[label] for label in several]] = 1
    return Images(targets, names, paths=[root / row["image"] for row in rows])


def _cifar(name: str, folder: str, split: str, classes: Sequence[str] | None) -> Images:
    try:
        stored = CIFAR[name](folder, train=split == "train")
    except RuntimeError as error:
        raise FileNotFoundError(f"{folder} does not hold {name} as torchvision stores it") from error
    if classes is not None and list(classes) != stored.classes:
        raise ValueError(f"the model's classes are not those of {name}: {', '.join(classes[:8])}, …")
    return Images(stored.targets, stored.classes, pixels=stored.data)
