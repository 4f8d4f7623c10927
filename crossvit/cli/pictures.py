"""Pictures by path as batches: what is named on a command line, read and cut as a model was evaluated."""

import argparse
import codecs
import glob
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.datasets import Images
from ..data.folders import files_below
from ..data.images import ImageError
from ..data.transforms import IMAGENET_MEAN, IMAGENET_STD, Transform, evaluation_transform
from ..system.failures import CommandError
from ..system.text import printable
from ..training.loading import start_worker
from .commands import Loaded, check_fits


@dataclass(frozen=True)
class Batch:
    """Some of the pictures asked for: `images` (B, C, H, W), as the model takes them, are those at `indices`;
    `failures` are the others' indices and what is wrong with them.
    """

    indices: list[int]
    images: Tensor
    failures: list[tuple[int, str]]


class Readable(Dataset):
    """Item i is (i, tensor (C, H, W) of image i, or the reason why there is none)."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self.images[index][0]
        except ImageError as error:
            return index, str(error).removeprefix(f"{printable(self.images.paths[index])}: ")


def of_files(paths: Sequence[str]) -> Images:
    """Images without targets."""
    return Images([0] * len(paths), [], paths=[Path(path) for path in paths])


def find_files(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files that `arguments` mean: files as they are, a folder's (sorted, deep, without hidden ones and what other
    systems leave behind), those that a glob matches, and of "-" the lines of standard input, in the order given. What
    does not exist stays, to be reported. And, in words, which folders and globs hold none, or cannot be read.

    Raises CommandError where there is no file at all.
    """
    found: list[str] = []
    without: list[str] = []
    for argument in arguments:
        if argument == "-":
            found += _lines_of_standard_input()
        elif os.path.isdir(argument):
            try:
                here = sorted(files_below(argument))
            except OSError as error:
                without.append(f"the folder {argument} cannot be read: {error.strerror or error}")
                continue
            if not here:
                without.append(f"the folder {argument} holds no files")
            found += map(str, here)
        elif not os.path.lexists(argument) and glob.has_magic(argument):
            matches = sorted(path for path in glob.glob(argument, recursive=True) if not os.path.isdir(path))
            if not matches:
                without.append(f"no file matches {argument}")
            found += matches
        else:
            found.append(argument)
    if not found:
        raise CommandError("; ".join(without) or "no images given")
    return found, without


def _lines_of_standard_input() -> list[str]:
    """Its lines as paths, of whatever bytes, without a byte order mark."""
    if sys.stdin is None:
        raise CommandError("- takes paths from standard input, which is closed")
    buffer = getattr(sys.stdin, "buffer", None)
    lines = sys.stdin.readlines() if buffer is None else [os.fsdecode(line) for line in buffer]
    if lines:
        first = os.fsencode(lines[0]).removeprefix(codecs.BOM_UTF8)
        lines[0] = os.fsdecode(first)
    return [line.rstrip("\r\n") for line in lines if line.strip()]


def transform_of(loaded: Loaded, crop_ratio: float | None = None) -> Transform:
    """The model's evaluation: resize, centre crop, ImageNet's mean and deviation. Raises CommandError for a model that
    does not take RGB.
    """
    if loaded.model.in_chans != 3:
        raise CommandError(f"pictures have 3 channels, but the model takes {loaded.model.in_chans}")
    try:
        ratio = loaded.crop_ratio if crop_ratio is None else crop_ratio
        return evaluation_transform(loaded.model.image_size, ratio, IMAGENET_MEAN, IMAGENET_STD)
    except ValueError as error:
        text = str(error) if crop_ratio is None else str(error).replace("crop_ratio", "--crop-ratio", 1)
        raise CommandError(text) from error


def batches(
    images: Images, loaded: Loaded, options: argparse.Namespace, indices: Sequence[int] | None = None
) -> Iterator[Batch]:
    """The images, or of those the ones at `indices`, in order, on the model's device and in its dtype."""
    on_gpu, workers = loaded.device.type == "cuda", options.workers
    images.transform = transform_of(loaded, options.crop_ratio)
    order = range(len(images)) if indices is None else indices
    batch_size = max(1, min(options.batch_size, len(order)))
    height, width = loaded.model.image_size
    what = f"{batch_size} pictures of {height}×{width} at a time (--batch-size)"
    check_fits(what, 12 * batch_size * height * width)
    loader = DataLoader(
        Readable(images),
        batch_size,
        sampler=order,
        # Starting one takes longer than a batch, and more of them than batches have nothing to do.
        num_workers=min(workers, -(-len(order) // batch_size)) if len(order) > batch_size else 0,
        collate_fn=_collate,
        pin_memory=on_gpu,
        worker_init_fn=start_worker,
    )
    for good, stacked, failures in loader:
        yield Batch(good, stacked.to(loaded.device, loaded.dtype, non_blocking=True), failures)


def add_loading_arguments(parser: argparse.ArgumentParser, batch_size: int = 32) -> None:
    """How pictures are read: the arguments of `batches` and `transform_of`."""
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=_positive,
        default=batch_size,
        help="pictures at a time, in each process (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=_natural,
        default=default_workers(),
        help="processes that decode (default here: %(default)s)",
    )
    parser.add_argument(
        "--crop-ratio",
        type=float,
        metavar="R",
        help="side of the centre crop over the resized picture's (default: the weights', 0.875 for most)",
    )


def default_workers() -> int:
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _collate(items: list[tuple[int, Tensor | str]]) -> tuple[list[int], Tensor, list[tuple[int, str]]]:
    good = [(index, image) for index, image in items if isinstance(image, Tensor)]
    failures = [(index, reason) for index, reason in items if isinstance(reason, str)]
    images = torch.stack([image for _, image in good]) if good else torch.empty(0)
    return [index for index, _ in good], images, failures


def _positive(text: str) -> int:
    return _natural(text, 1)


def _natural(text: str, least: int = 0) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text!r}")
    return value
