"""Pictures that are small files and large in memory, of no pixels, or no files: refused, or read within bounds."""

import io
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from commands import command, save_small
from crossvit.data import transforms
from crossvit.data.images import ImageError, load_image
from crossvit.data.transforms import evaluation_transform, training_transform
from untidy import picture, png

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pixels of every picture that is made by resizing."""
    made: list[int] = []
    resize = Image.Image.resize

    def watched(image: Image.Image, size: tuple[int, int], *arguments: Any, **named: Any) -> Image.Image:
        made.append(size[0] * size[1])
        assert made[-1] < 1 << 26, f"{size} is resized to"
        return resize(image, size, *arguments, **named)

    monkeypatch.setattr(Image.Image, "resize", watched)
    return made


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (178_000_000, 1), (1, 2_000_000)])
@pytest.mark.parametrize("crop_ratio", [0.875, 0.01])
def test_long_pictures_are_not_made_longer(size: tuple[int, int], crop_ratio: float, sizes: list[int]) -> None:
    """Only the part is made that the model sees: 240 pixels of a side, not millions."""
    found = evaluation_transform(240, crop_ratio)(Image.new("RGB", size, "white"))
    assert found.shape == (3, 240, 240)
    assert (found > 2).all()  # all of it white
    assert max(sizes) == 240 * 240


@pytest.mark.parametrize("size", [(700, 9), (9, 700), (500, 301), (2000, 2), (64, 64)])
@pytest.mark.parametrize("image_size, crop_ratio", [(48, 0.875), ((24, 60), 0.4), (33, 1.0)])
def test_the_centre_alone_is_the_centre(
    size: tuple[int, int], image_size: Any, crop_ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would be cut out of the whole, but for the rounding of Pillow's coordinates."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    options: dict[str, Any] = dict(mean=(0, 0, 0), std=(1, 1, 1))
    expected = evaluation_transform(image_size, crop_ratio, **options)(image)
    monkeypatch.setattr(transforms, "_RESIZED", 0)
    found = evaluation_transform(image_size, crop_ratio, **options)(image)
    torch.testing.assert_close(found, expected, atol=2.1 / 255, rtol=0)
    assert (found - expected).abs().mean() < 0.02 / 255


def test_predict_and_explain_long_pictures(sizes: list[int], tmp_path: Path) -> None:
    files = [png(tmp_path / "flat.png", 60_000, 1), png(tmp_path / "high.png", 1, 60_000)]
    given = ("--checkpoint", save_small(tmp_path), "--workers", "0")
    assert command("predict", *files, *given).status == 0
    assert command("explain", *files, *given, "--output", tmp_path / "out").status == 0
    assert sizes


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 3), (60_000, 1), (1, 60_000)])
def test_training_takes_any_picture(size: tuple[int, int], sizes: list[int]) -> None:
    transform = training_transform(24, crop_scale=1e-300)
    for _ in range(5):
        assert transform(Image.new("RGB", size)).shape == (3, 24, 24)


def icon(path: Path, content: bytes) -> Path:
    """An icon of 16 × 16 by its header, which holds another picture."""
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(content), 22)
    path.write_bytes(struct.pack("<HHH", 0, 1, 1) + entry + content)
    return path


def gif(path: Path, screen: tuple[int, int], frame: tuple[int, int]) -> Path:
    """A GIF whose screen and only frame say these sizes."""
    content = io.BytesIO()
    Image.new("P", (2, 2)).save(content, "GIF")
    data = bytearray(content.getvalue())
    at = data.index(b",\0\0\0\0")
    data[6:10], data[at + 5 : at + 9] = struct.pack("<HH", *screen), struct.pack("<HH", *frame)
    path.write_bytes(data)
    return path


def test_bombs_of_every_kind_are_refused(tmp_path: Path) -> None:
    """Whatever says the size: the header, a frame, or a picture within."""
    large = png(tmp_path / "large.png", 2000, 2000, colour=0, bits=1)
    bombs = [
        large,
        png(tmp_path / "palette.png", 2000, 2000, colour=3, bits=1, palette=bytes(6)),
        png(tmp_path / "sixteen.png", 2000, 2000, colour=0, bits=16),
        png(tmp_path / "alpha.png", 2000, 2000, colour=6),
        gif(tmp_path / "frame.gif", (2, 2), (2000, 2000)),
        gif(tmp_path / "screen.gif", (2000, 2000), (2, 2)),
        icon(tmp_path / "icon.ico", large.read_bytes()),
    ]
    for bomb in bombs:
        assert bomb.stat().st_size < 70_000
        with pytest.raises(ImageError, match=rf"{bomb.name}: refused as a decompression bomb: 2000 × 2000 pixels"):
            load_image(bomb, max_pixels=1_000_000)


def test_pictures_without_pixels(tmp_path: Path) -> None:
    """Refused as such, whatever Pillow makes of them."""
    (tmp_path / "x.ppm").write_bytes(b"P6 0 5 255\n")
    with pytest.raises(ImageError, match=r"x\.ppm: "):
        load_image(tmp_path / "x.ppm")
    Image.new("RGB", (2, 2)).save(tmp_path / "x.tif")
    data = bytearray((tmp_path / "x.tif").read_bytes())
    for tag in (256, 257):  # width and height
        at = next(
            i
            for i in range(8, len(data))
            if data[i : i + 4] == struct.pack("<HH", tag, 4) or data[i : i + 4] == struct.pack("<HH", tag, 3)
        )
        data[at + 8 : at + 12] = bytes(4)
    (tmp_path / "x.tif").write_bytes(data)
    with pytest.raises(ImageError, match=r"x\.tif: "):
        load_image(tmp_path / "x.tif")


MEMORY = """
import resource, sys
from pathlib import Path
from crossvit.data.images import load_image
load_image(sys.argv[2])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[3]), resource.RLIM_INFINITY))
print(load_image(sys.argv[1]).size)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("colour, bits", [(6, 8), (0, 16), (4, 8), (0, 8)])
def test_no_copies_are_made_of_large_pictures(colour: int, bits: int, tmp_path: Path) -> None:
    """25 million pixels of whatever kind take those, and the RGB picture: 4 bytes each, and some bands of rows."""
    path, small = png(tmp_path / "x.png", 5000, 5000, colour, bits), picture(tmp_path / "small.png")
    limit = 2 * 4 * 5000 * 5000 + (120 << 20)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, path, small, str(limit)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("(5000, 5000)\n", 0), done.stderr[-800:]


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="there are no such devices")
def test_what_is_no_file(tmp_path: Path) -> None:
    """Devices are not read, and what stands in a folder's place is said."""
    for device in ("/dev/zero", "/dev/null"):
        with pytest.raises(ImageError, match=f"{device}: expected a file, it is a device"):
            load_image(device)
    picture(tmp_path / "a.png")
    files = ["/dev/zero", tmp_path / "a.png" / "b.png", tmp_path / "a.png", "n" * 300]
    done = command("predict", *files, "--checkpoint", save_small(tmp_path), "--workers", "0")
    assert done.status == 1
    assert len(done.out.splitlines()) == 1
    assert [line.split("error: ")[-1] for line in done.err.splitlines()[:3]] == [
        "expected a file, it is a device",
        "Not a directory",
        "File name too long",
    ]
