"""A confusion matrix as a picture."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..system.text import printable

_NAMED, _NUMBERED = 60, 20  # more classes than that: no names; no numbers


def draw_confusion(confusion: Tensor, classes: Sequence[str], path: str | Path) -> None:
    """Draws confusion (classes, classes), rows the truth, columns the answers, as a PNG at `path`: colours are shares
    of a row, numbers are images.
    """
    import matplotlib.colors
    from matplotlib.figure import Figure

    classes, count = [printable(name) for name in classes], len(classes)
    shares = confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    cell = 0.42 if count <= _NUMBERED else max(0.19, 12 / count) if count <= _NAMED else 10 / count
    side = max(3.2, cell * count)
    figure = Figure(figsize=(side + 2.4, side + 1.6), layout="constrained")
    axes = figure.add_subplot()
    # Most of the rest lies far below the diagonal: the square root of the share makes it visible.
    scale = matplotlib.colors.PowerNorm(0.5, 0, 1)
    image = axes.imshow(shares.numpy(), cmap="Blues", norm=scale, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    bar.ax.set_yticklabels(["0", "1 %", "5 %", "20 %", "50 %", "100 %"])
    bar.outline.set_visible(False)
    bar.set_label("share of the true class")
    right = float(confusion.diagonal().sum()) / max(1, int(confusion.sum()))
    axes.set_title(f"{int(confusion.sum()):,} images, {right:.1%} right", pad=12)
    axes.set_xlabel("answer")
    axes.set_ylabel("truth")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if count <= _NAMED:
        size = 9 if count <= _NUMBERED else 7
        flat = max(map(len, classes)) <= 2
        axes.set_xticks(range(count), classes, fontsize=size, rotation=0 if flat else 90)
        axes.set_yticks(range(count), classes, fontsize=size)
        axes.set_xticks([i - 0.5 for i in range(1, count)], minor=True)
        axes.set_yticks([i - 0.5 for i in range(1, count)], minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="minor", length=0)
    if count <= _NUMBERED:
        for i, row in enumerate(confusion.tolist()):
            for j, images in enumerate(row):
                if images:
                    axes.text(
                        j,
                        i,
                        images,
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if shares[i, j] > 0.4 else "black",
                    )
    figure.savefig(path, format="png", dpi=150)
