"""Attention maps over the picture that they are of."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

PIXELS, _GAP, _TOP = 320, 9, 44  # across a panel, between two, and above them all
_COLUMNS = 6


@dataclass(frozen=True)
class Panel:
    """A picture with `weights` (rows, columns) over it; without them, the picture alone."""

    title: str
    weights: Tensor | None = None


def panel_size(height: int, width: int) -> tuple[int, int]:
    """(width, height) of a panel for an input of height × width: PIXELS across, but no more than four times as high."""
    return PIXELS, min(4 * PIXELS, max(1, round(PIXELS * height / width)))


def draw_panels(picture: Image.Image, rows: Sequence[Sequence[Panel]], title: str, path: str | Path) -> None:
    """Draws rows of panels over `picture`, which shows what the model saw, as a PNG at `path`.

    Each map is scaled from its smallest weight to its largest: colours say where a map is large, titles how large.
    """
    import matplotlib

    font = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    small, large = ImageFont.truetype(font, 13), ImageFont.truetype(font, 18)
    rows = [row[first : first + _COLUMNS] for row in rows for first in range(0, len(row), _COLUMNS)]
    above = 12 + 17 * (1 + max(panel.title.count("\n") for row in rows for panel in row))
    picture = picture.resize(panel_size(picture.height, picture.width))
    width = _GAP + max(map(len, rows)) * (PIXELS + _GAP)
    canvas = Image.new("RGB", (width, _TOP + len(rows) * (above + picture.height) + _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    while len(title) > 1 and large.getlength(title) > width - 2 * _GAP:
        title = title[:-2] + "…"
    draw.text((width / 2, _TOP / 2), title, "black", large, anchor="mm")
    for i, row in enumerate(rows):
        y = _TOP + i * (above + picture.height) + above
        for j, panel in enumerate(row):
            x = _GAP + j * (PIXELS + _GAP)
            drawn = picture if panel.weights is None else Image.fromarray(overlay(picture, panel.weights))
            canvas.paste(drawn, (x, y))
            place = x + PIXELS / 2, y - 6 - 16 * panel.title.count("\n")
            draw.multiline_text(place, panel.title, "black", small, anchor="ms", align="center")
    canvas.save(path, format="PNG", compress_level=3)


def overlay(picture: Image.Image, weights: Tensor) -> np.ndarray:
    """The RGB picture with weights (rows, columns), (height, width, 3) uint8: grey and dim where they are small, in
    warm colours where they are large.
    """
    import matplotlib

    heat = _enlarge(weights, picture.size)
    grey = 0.8 * np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    levels = np.rint(255 * heat).astype(np.uint8)  # bytes take the colours from a table
    colour = matplotlib.colormaps["inferno"](levels, bytes=True)[..., :3]
    opacity = (0.15 + 0.55 * heat)[..., None]
    mixed: np.ndarray = np.rint((1 - opacity) * grey + opacity * colour).astype(np.uint8)
    return mixed


def _enlarge(weights: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Weights (rows, columns) at (width, height) = `size`, from 0 for the smallest to 1 for the largest; bicubic."""
    weights = weights.float().cpu()
    low, high = weights.min(), weights.max()
    scaled = (weights - low) / (high - low).clamp(min=1e-12)
    # Bilinear shows the patches' centres as stars.
    enlarged = interpolate(scaled[None, None], (size[1], size[0]), mode="bicubic")[0, 0]
    clamped: np.ndarray = enlarged.clamp(0, 1).numpy()
    return clamped
