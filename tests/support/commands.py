"""What the tests of the commands share: a small model in a file, photographs in folders, and the command line."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import skimage.data
from PIL import Image

import crossvit
from crossvit.cli.main import main
from weights import our_model

CLASSES = ["animals", "people", "things"]
PHOTOGRAPHS = {
    "astronaut": "people",
    "camera": "people",
    "cat": "animals",
    "coffee": "things",
    "coins": "things",
    "page": "things",
    "rocket": "things",
}
SMALL: dict[str, Any] = dict(num_classes=3, image_size=72, embed_dim=(48, 96), depth=((1, 1, 0),) * 2)


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    status: int
    out: str
    err: str


def command(*arguments: str | Path) -> Finished:
    """Runs `crossvit` in this process, on the CPU."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as ended:  # argparse's
            status = int(ended.code or 0)
    return Finished(status, out.getvalue(), err.getvalue())


def small_model(**overrides: Any) -> crossvit.CrossViT:
    """A CrossViT of two stages with weights that all matter."""
    return our_model("crossvit_tiny_240", **(SMALL | overrides))


def save_small(folder: Path, name: str = "small.safetensors", **overrides: Any) -> Path:
    """`small_model` in a file that says what it is."""
    path = folder / name
    crossvit.save_checkpoint(small_model(**overrides), path, classes=CLASSES)
    return path


def photograph(name: str) -> Image.Image:
    """One of scikit-image's."""
    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


def photographs_by_class(folder: Path, names: Sequence[str] = tuple(PHOTOGRAPHS)) -> Path:
    """A folder with one folder of photographs per class."""
    for name in names:
        (folder / PHOTOGRAPHS[name]).mkdir(parents=True, exist_ok=True)
        picture = photograph(name)
        picture.thumbnail((160, 160))
        picture.save(folder / PHOTOGRAPHS[name] / f"{name}.png")
    return folder
