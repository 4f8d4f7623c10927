"""One way to read a picture, whatever its file holds."""

import io
import os
import re
import stat
import warnings
from os import PathLike

from PIL import Image, UnidentifiedImageError

from ..system.text import printable
from .rgb import RangeError, to_rgb

MAX_PIXELS = 178_956_970  # above it Pillow takes a file for a decompression bomb


class ImageError(ValueError):
    """A file that cannot be read as an image. The message begins with its path."""


def load_image(path: str | PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a file as 8-bit RGB, upright.

    EXIF orientation is applied; grey, palette, CMYK and other colour spaces become RGB; transparent pixels are laid
    over white; 16-bit grey is divided by 257 (0 stays 0, 65535 becomes 255); floating point must lie in 0 … 1 or
    0 … 255. Of an animation the first frame is taken.

    Raises ImageError for a file that is empty, no image, truncated or broken, a device, a name that no file can have,
    or one of no pixels or more than `max_pixels` (refused before it is decoded, with its size); and OSError, as open()
    does, for one that does not exist or cannot be read.
    """
    name = printable(path)
    with _opened(path, name) as file, warnings.catch_warnings():
        # Of bombs, which max_pixels decides on, and of damaged EXIF data, which is passed over.
        warnings.simplefilter("ignore")
        if not file.peek(1):
            raise ImageError(f"{name}: the file is empty")
        try:
            image = Image.open(file)
            _check_size(image, name, max_pixels)
            image.load()
            _check_size(image, name, max_pixels)  # an icon's header need not say what the picture in it is
        except ImageError:
            raise
        except Image.DecompressionBombError as error:  # of Pillow's own limit, which says the size only in words
            pixels = re.search(r"\d+", str(error))
            raise ImageError(_too_large(name, f"{int(pixels[0]):,}" if pixels else "too many", max_pixels)) from error
        except UnidentifiedImageError as error:
            raise ImageError(f"{name}: no image, or one of an unknown format") from error
        except MemoryError as error:
            raise ImageError(f"{name}: there is not enough memory to decode it") from error
        except Exception as error:  # of damaged bytes Pillow's decoders raise whatever comes up
            raise ImageError(f"{name}: truncated or broken: {_in_a_line(error)}") from error
        try:
            return _upright(to_rgb(image), image)
        except MemoryError as error:
            raise ImageError(f"{name}: there is not enough memory for its pixels") from error
        except RangeError as error:
            raise ImageError(f"{name}: {error}") from error
        except Exception as error:
            raise ImageError(f"{name}: mode {image.mode} does not become RGB: {_in_a_line(error)}") from error


def _opened(path: str | PathLike[str], name: str) -> io.BufferedReader:
    try:
        if stat.S_ISCHR(mode := os.stat(path).st_mode) or stat.S_ISBLK(mode):
            raise ImageError(f"{name}: expected a file, it is a device")
        return open(path, "rb")
    except ImageError:
        raise
    except ValueError as error:  # a zero byte, or a character that this system's names cannot have
        raise ImageError(f"{name}: no file can have this name here: {_in_a_line(error)}") from error


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise ImageError(_too_large(name, f"{image.width} × {image.height}", max_pixels))
    if image.width * image.height < 1:
        raise ImageError(f"{name}: a picture without pixels, {image.width} × {image.height}")


def _too_large(name: str, size: str, max_pixels: int) -> str:
    return f"{name}: refused as a decompression bomb: {size} pixels, expected at most {max_pixels:,}"


def _in_a_line(error: Exception) -> str:
    return " ".join(printable(error).split()) or type(error).__name__


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
