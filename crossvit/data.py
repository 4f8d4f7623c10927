"""Images and datasets: one way to read a picture, whatever its file holds, and folders of them as datasets."""

import re
import warnings
from os import PathLike

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 178_956_970  # above it Pillow takes a file for a decompression bomb


class ImageError(ValueError):
    """A file that cannot be read as an image. The message begins with its path."""


def load_image(path: str | PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a file as 8-bit RGB, upright.

    EXIF orientation is applied; grey, palette, CMYK and other colour spaces become RGB; transparent pixels are laid
    over white; 16-bit grey is divided by 257 (0 stays 0, 65535 becomes 255); floating point must lie in 0 … 1 or
    0 … 255. Of an animation the first frame is taken.

    Raises ImageError for a file that is empty, no image, truncated or broken, or one of more than `max_pixels` (refused
    before it is decoded, with its size); and OSError, as open() does, for one that is not there or not readable.
    """
    with open(path, "rb") as file, warnings.catch_warnings():
        # Of bombs, which max_pixels decides on, and of damaged EXIF data, which is passed over.
        warnings.simplefilter("ignore")
        if not file.peek(1):
            raise ImageError(f"{path}: the file is empty")
        try:
            image = Image.open(file)
            if image.width * image.height > max_pixels:
                raise ImageError(_too_large(path, f"{image.width} × {image.height}", max_pixels))
            image.load()
        except ImageError:
            raise
        except Image.DecompressionBombError as error:  # of Pillow's own limit, which says the size only in words
            pixels = re.search(r"\d+", str(error))
            raise ImageError(_too_large(path, f"{int(pixels[0]):,}" if pixels else "too many", max_pixels)) from error
        except UnidentifiedImageError as error:
            raise ImageError(f"{path}: no image, or one of an unknown format") from error
        except Exception as error:  # of damaged bytes Pillow's decoders raise whatever comes up
            raise ImageError(f"{path}: truncated or broken: {str(error) or type(error).__name__}") from error
        try:
            return _upright(_to_rgb(image, path), image)
        except ImageError:
            raise
        except Exception as error:
            raise ImageError(f"{path}: mode {image.mode} does not become RGB: {error}") from error


def _too_large(path: str | PathLike[str], size: str, max_pixels: int) -> str:
    return f"{path}: refused as a decompression bomb: {size} pixels, expected at most {max_pixels:,}"


def _to_rgb(image: Image.Image, path: str | PathLike[str]) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _from_grey(_sixteen_bits(np.asarray(image), path))
    if image.mode == "F":
        return _from_grey(_floats(np.asarray(image), path))
    if image.has_transparency_data:
        alpha = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), alpha).convert("RGB")
    return image.convert("RGB")


def _sixteen_bits(values: np.ndarray, path: str | PathLike[str]) -> np.ndarray:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(f"{path}: grey values from {low} to {high}, expected 0 to 65535")
    return (values.astype(np.uint32) + 128) // 257


def _floats(values: np.ndarray, path: str | PathLike[str]) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):  # NaN is refused too
        raise ImageError(f"{path}: floating point values from {low:g} to {high:g}, expected 0 to 1 or 0 to 255")
    return np.rint(values * (255 if high <= 1 else 1))


def _from_grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8), "L").convert("RGB")


def _upright(rgb: Image.Image, source: Image.Image) -> Image.Image:
    """`rgb` turned as the EXIF data of `source` says; damaged data says nothing."""
    try:
        orientation = source.getexif().get(0x0112, 1)
    except Exception:
        return rgb
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return rgb.transpose(turns[orientation]) if orientation in turns else rgb
