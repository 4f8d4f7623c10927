"""Any of Pillow's modes as 8-bit RGB, in bands of rows: however large the picture, no second copy of it is made but the
RGB one.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image

_BAND = 1 << 22  # pixels


class RangeError(ValueError):
    """Values that are no colours."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Transparent pixels are laid over white, 16-bit grey is divided by 257, floating point must lie in 0 … 1 or
    0 … 255. Raises RangeError for other values.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    scale = 1.0
    if image.mode.startswith("I"):
        low, high = _extremes(image)
        if low < 0 or high > 65535:
            raise RangeError(f"grey values from {low:.0f} to {high:.0f}, expected 0 to 65535")
    elif image.mode == "F":
        low, high = _extremes(image)
        if not (low >= 0 and high <= 255):  # NaN is refused too
            raise RangeError(f"floating point values from {low:g} to {high:g}, expected 0 to 1 or 0 to 255")
        scale = 255 if high <= 1 else 1
    if image.width * image.height <= _BAND:
        return _band_to_rgb(image, scale)
    whole = Image.new("RGB", image.size)
    for top, band in _bands(image):
        whole.paste(_band_to_rgb(band, scale), (0, top))
    return whole


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _extremes(image: Image.Image) -> tuple[float, float]:
    found = [(values.min(), values.max()) for values in (np.asarray(band) for _, band in _bands(image))]
    return float(np.min([low for low, _ in found])), float(np.max([high for _, high in found]))


def _band_to_rgb(band: Image.Image, scale: float) -> Image.Image:
    if band.mode.startswith("I"):
        return _from_grey((np.asarray(band).astype(np.uint32) + 128) // 257)
    if band.mode == "F":
        return _from_grey(np.rint(np.asarray(band) * scale))
    if band.has_transparency_data:
        alpha = band.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", band.size, "white"), alpha).convert("RGB")
    return band.convert("RGB")


def _from_grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8), "L").convert("RGB")
