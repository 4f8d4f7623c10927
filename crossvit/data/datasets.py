"""Datasets: folders of images, one folder per class; folders with several labels per image; CIFAR."""

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets

from ..system.text import printable
from .folders import files_below, subfolders
from .images import ImageError, load_image
from .label_files import read_labels

SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}
CIFAR = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
LABELS = "labels.csv"
SUFFIXES = datasets.folder.IMG_EXTENSIONS
# What is wrong with this process, not with the file that it met
_OUR_OWN = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class Images(Dataset):
    """Images with targets: item i is (picture as `transform` leaves it, target).

    The target is a class index, or with several labels per image a float32 (classes,) of zeros and ones. `classes` are
    the names, `multi_label` says which, `paths` are the files or `pixels` the images themselves, (N, H, W, 3) of uint8.
    Raises ImageError where the file is broken, not there or not readable.
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
        image = self._load(self.paths[index]) if self.pixels is None else Image.fromarray(self.pixels[index])
        return (self.transform(image) if self.transform else image), self.targets[index]

    def _load(self, path: Path) -> Image.Image:
        try:
            return load_image(path)
        except OSError as error:
            if error.errno in _OUR_OWN:
                raise
            raise ImageError(f"{printable(path)}: {error.strerror or error}") from error


def open_dataset(
    where: str | Path, split: str, classes: Sequence[str] | None = None, *, allow_empty: bool = False
) -> Images:
    """The training ("train") or validation ("val") images of a dataset.

    where: a folder that holds train/ and val/ (or validation/, test/), each with one folder of images per class, or
    with a labels.csv of lines `file,label;label;…` under a line `image,labels`; or "cifar10:FOLDER", "cifar100:FOLDER"
    as torchvision stores them. classes: names in the order of a model's logits, for which the images must then be; by
    default those found, sorted. allow_empty: a class of which there is a folder, but no image, is one too. Hidden files
    and folders, and what other systems leave behind, are passed over.

    Raises FileNotFoundError for what does not exist, ValueError for a split, class or label that is unknown or without
    images, OSError for a folder that cannot be read.
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
    return open_folder(found[0], classes, allow_empty=allow_empty)


def open_folder(root: Path, classes: Sequence[str] | None = None, *, allow_empty: bool = False) -> Images:
    """The images of one folder that has a folder per class or a labels.csv in it; raises as `open_dataset`."""
    return _labelled(root, classes) if (root / LABELS).is_file() else _folder(root, classes, allow_empty)


def _folder(root: Path, classes: Sequence[str] | None, allow_empty: bool) -> Images:
    folders = subfolders(root)
    if not folders:
        raise ValueError(f"{root} has no folders of images, one per class")
    names = folders if classes is None else list(classes)
    if unknown := [folder for folder in folders if folder not in names]:
        raise ValueError(f"{root} has classes that the model was not made for: {_listed(unknown)}")
    if twice := [folder for folder in folders if names.count(folder) > 1]:
        raise ValueError(f"{root} has classes of which the model has several by that name: {_listed(twice)}")
    found = {name: [path for path in files_below(root / name) if _is_image(path)] for name in folders}
    if not any(found.values()):
        raise ValueError(f"{root} has no images ({', '.join(SUFFIXES)}) in folders by class")
    empty = [name for name in folders if not found[name]]
    if empty and classes is None and not allow_empty:
        raise ValueError(
            f"{root} has no images ({', '.join(SUFFIXES)}) in the folders of these classes: {_listed(empty)} (remove "
            "them, or have classes without images by --allow-empty-classes)"
        )
    samples = [(path, names.index(name)) for name in folders for path in found[name]]
    return Images([target for _, target in samples], names, paths=[path for path, _ in samples])


def _is_image(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:8])) + (f", … ({len(names)})" if len(names) > 8 else "")


def _labelled(root: Path, classes: Sequence[str] | None) -> Images:
    rows = read_labels(root / LABELS)
    labels = [row.labels for row in rows]
    names = sorted({label for several in labels for label in several}) if classes is None else list(classes)
    index = {name: i for i, name in enumerate(names)}
    if unknown := sorted({label for several in labels for label in several} - index.keys()):
        raise ValueError(f"{root / LABELS} has labels that the model was not made for: {_listed(unknown)}")
    if not names:
        raise ValueError(f"{root / LABELS} has no label in any of its {len(rows)} rows")
    targets = torch.zeros(len(rows), len(names))
    for row, several in zip(targets, labels):
        row[[index[label] for label in several]] = 1
    return Images(targets, names, paths=[root / row.image for row in rows])


def _cifar(name: str, folder: str, split: str, classes: Sequence[str] | None) -> Images:
    try:
        stored = CIFAR[name](folder, train=split == "train")
    except RuntimeError as error:
        raise FileNotFoundError(f"{folder} does not hold {name} as torchvision stores it") from error
    if classes is not None and list(classes) != stored.classes:
        raise ValueError(f"the model's classes are not those of {name}: {', '.join(classes[:8])}, …")
    return Images(stored.targets, stored.classes, pixels=stored.data)
