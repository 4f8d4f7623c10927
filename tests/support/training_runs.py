"""Small runs for the tests of training: a folder of images, a tiny model, and the command called in this process."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crossvit.cli.train import main

TINY = """--model crossvit_tiny_240 --image-size 48 --set embed_dim=[16,32] --set num_heads=[2,2]
    --set depth=[[1,1,0],[1,1,1]] --preset small --epochs 2 --batch-size 8 --workers 0 --log-every 2
    --device cpu""".split()  # noqa: SIM905  as it is typed
CLASSES = 3


def make_images(root: Path, train: int = 24, val: int = 7) -> Path:
    """Folders train/ and val/ of three classes of small noisy pictures, told apart by colour."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for k in range(count):
            folder = root / split / f"class{k % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 200, (20, 24, 3), dtype=np.uint8)
            pixels[..., k % CLASSES] += 55
            Image.fromarray(pixels).save(folder / f"{k:03}.png")
    return root


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these wait for their threads longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`make_images`' folder."""
    return make_images(tmp_path_factory.mktemp("data"))


def train(data: Path | str, out: Path, *options: str) -> tuple[int, str]:
    """The exit status and all that is printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = main([str(data), "--out", str(out), *TINY, *options])
    return status, printed.getvalue()
