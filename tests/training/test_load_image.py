"""load_image: whatever a file holds becomes an upright RGB picture, or an error that names the file and its fault."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossvit.data.images import ImageError, load_image

ARRAY = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
PICTURE = Image.fromarray(ARRAY)


def loaded(path: Path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize(
    "orientation, expected",
    [
        (1, ARRAY),
        (2, ARRAY[:, ::-1]),
        (3, ARRAY[::-1, ::-1]),
        (4, ARRAY[::-1]),
        (5, ARRAY.swapaxes(0, 1)),
        (6, np.rot90(ARRAY, -1)),
        (7, ARRAY[::-1, ::-1].swapaxes(0, 1)),
        (8, np.rot90(ARRAY)),
        (9, ARRAY),
    ],
)
def test_exif_orientation(tmp_path: Path, orientation: int, expected: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    PICTURE.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(loaded(tmp_path / "a.png"), expected)


def test_damaged_exif_is_passed_over(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 30)
    assert loaded(tmp_path / "a.jpg").shape == ARRAY.shape


HAVE = {"png": ("L", "1", "P", "LA"), "tif": ("L", "1", "P", "LA", "CMYK", "YCbCr"), "jpg": ("L", "1", "CMYK", "YCbCr")}


@pytest.mark.parametrize("suffix, mode", [(suffix, mode) for suffix, modes in HAVE.items() for mode in modes])
def test_modes(tmp_path: Path, suffix: str, mode: str) -> None:
    """Every mode that a format has comes out as Pillow's own RGB of it (opaque, so no background shows)."""
    image, path = PICTURE.convert(mode), tmp_path / f"a.{suffix}"
    image.save(path, **({"quality": 100, "subsampling": 0} if suffix == "jpg" else {}))
    np.testing.assert_allclose(loaded(path).astype(int), np.asarray(image.convert("RGB")), atol=12)


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    alpha = np.zeros((6, 8), np.uint8)
    alpha[0], alpha[1] = 255, 128
    Image.fromarray(np.dstack([ARRAY, alpha])).save(tmp_path / "a.png")
    found = loaded(tmp_path / "a.png")
    np.testing.assert_array_equal(found[0], ARRAY[0])
    np.testing.assert_allclose(found[1], (ARRAY[1] + 255.0) / 2, atol=2)
    assert (found[2:] == 255).all()


def test_transparent_palette_and_transparent_colour(tmp_path: Path) -> None:
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette(range(12))
    palette.save(tmp_path / "palette.png", transparency=3)
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "colour.png", transparency=(1, 2, 3))
    for name in ("palette.png", "colour.png"):
        assert (loaded(tmp_path / name) == 255).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(loaded(tmp_path / f"a.{suffix}")[0, :, 0], [0, 0, 1, 128, 255])


def test_floating_point(tmp_path: Path) -> None:
    for name, values in {"one": [0, 0.5, 1], "bytes": [0, 128, 255], "bad": [0, 1, 256], "nan": [0, 1, np.nan]}.items():
        Image.fromarray(np.array([values], np.float32)).save(tmp_path / f"{name}.tif")
    for name in ("one", "bytes"):
        np.testing.assert_array_equal(loaded(tmp_path / f"{name}.tif")[0, :, 0], [0, 128, 255])
    for name in ("bad", "nan"):
        with pytest.raises(ImageError, match=f"{name}.tif: floating point values from"):
            load_image(tmp_path / f"{name}.tif")


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (loaded(tmp_path / "a.gif") == (255, 0, 0)).all()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_bombs_are_refused_with_their_size(tmp_path: Path) -> None:
    """By the size in the header, before a pixel is decoded: the larger one is past Pillow's own limit."""
    for name, side in (("large", 12000), ("huge", 60000)):
        header = _chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        pixels = _chunk(b"IDAT", zlib.compress(bytes(100)))
        (tmp_path / f"{name}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + _chunk(b"IEND", b""))
    with pytest.raises(ImageError, match=r"huge.png: refused as a decompression bomb: 3,600,000,000 pixels"):
        load_image(tmp_path / "huge.png")
    with pytest.raises(ImageError, match=r"large.png: refused .* 12000 × 12000 pixels, expected at most 1,000,000"):
        load_image(tmp_path / "large.png", max_pixels=1_000_000)


def test_broken_files(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "tif", "gif", "bmp", "webp"):
        whole = tmp_path / f"whole.{suffix}"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
        content = whole.read_bytes()
        for keep in (1, 10, len(content) // 2):
            path = tmp_path / f"cut{keep}.{suffix}"
            path.write_bytes(content[:keep])
            with pytest.raises(ImageError, match=path.name):
                load_image(path)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(ImageError, match=r"empty.png: the file is empty"):
        load_image(tmp_path / "empty.png")
    with pytest.raises(ImageError, match=r"text.jpg: no image"):
        load_image(tmp_path / "text.jpg")
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "none.png")
    with pytest.raises(IsADirectoryError):
        load_image(tmp_path)
