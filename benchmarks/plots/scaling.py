"""The plot of `benchmarks.scaling`: how images per second change with batch and image size, and peaks of memory."""

from pathlib import Path
from typing import Any

from ..labels import labels
from .bars import COLOURS, save

Row = dict[str, Any]
LINES = ("-", "--", ":", "-.")


def scaling(rows: list[Row], path: Path) -> None:
    """Write rows of `benchmarks.scaling` as a PNG: a line of panels per model and dtype.

    Left images per second over batches, in the middle milliseconds over the sides of one image, a line per
    implementation and number of threads, axes logarithmic; right bars of peak memory. Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("rows is empty, expected at least one")
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys((row["model"], row["dtype"]) for row in rows))
    figure = Figure(figsize=(13, 0.9 + 3.6 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), 3, squeeze=False)
    for line, (model, dtype) in zip(axes, groups):
        here = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
        timed = [row for row in here if "images_per_second" in row]
        side = min((row["image_size"] for row in timed), default=0)
        _lines(line[0], [row for row in timed if row["image_size"] == side], "batch", "images / s")
        _lines(line[1], [row for row in timed if row["batch"] == 1], "image_size", "ms / image")
        _memory(line[2], [row for row in here if "peak_bytes" in row])
        line[0].set_title(f"{model}, {dtype}, {side}² pixels", fontsize=10)
        line[1].set_title("one image, by its side", fontsize=10)
        line[2].set_title("peak memory over the weights", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    versions = rows[0]["versions"]
    figure.suptitle(f"{rows[0]['device']}, torch {versions.get('torch', '')}", fontsize=11)
    save(figure, path)


def _lines(axis: Any, rows: list[Row], key: str, label: str) -> None:
    threads, called = sorted({row["threads"] for row in rows}, reverse=True), labels(rows)
    for name, count in dict.fromkeys((row["implementation"], row["threads"]) for row in rows):
        points = sorted(
            (row[key], row["images_per_second"])
            for row in rows
            if (row["implementation"], row["threads"]) == (name, count)
        )
        middle, low, high = (
            [spread[part] if key == "batch" else 1e3 / spread[part] for _, spread in points]
            for part in ("median", "min", "max")
        )
        places = [place for place, _ in points]
        style: dict[str, Any] = {"color": COLOURS.get(name, "#000000"), "ls": LINES[threads.index(count) % len(LINES)]}
        axis.plot(places, middle, marker="o", ms=4, label=f"{called[name]}, {count} thread{'s' * (count > 1)}", **style)
        axis.fill_between(places, low, high, color=style["color"], alpha=0.15, lw=0)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted({row[key] for row in rows})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    figures = sorted(y for drawn in axis.get_lines() for y in drawn.get_ydata())
    if figures:
        steps = [m * 10.0**e for e in range(-3, 6) for m in (1, 2, 5)]
        near = [s for s in steps if figures[0] / 1.6 <= s <= figures[-1] * 1.6]
        axis.set_yticks(near, [f"{s:g}" for s in near])
    axis.set_xlabel("batch" if key == "batch" else "side of the image")
    axis.set_ylabel(label)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(lw=0.4, alpha=0.6)


def _memory(axis: Any, rows: list[Row]) -> None:
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    cells = list(dict.fromkeys((row["mode"], row["batch"], row["image_size"]) for row in rows))
    for row in rows:
        index = names.index(row["implementation"])
        place = cells.index((row["mode"], row["batch"], row["image_size"]))
        place += (index - (len(names) - 1) / 2) * 0.84 / len(names)
        megabytes = row["peak_bytes"] / 1e6
        axis.bar(place, megabytes, 0.8 / len(names), color=COLOURS.get(row["implementation"], "#000000"))
        axis.annotate(
            f"{megabytes:,.0f}",
            (place, megabytes),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
        )
    axis.set_xticks(range(len(cells)), [f"{mode}\nbatch {batch}\n{side}²" for mode, batch, side in cells], fontsize=8)
    axis.set_yscale("log")
    axis.margins(y=0.15)
    axis.set_ylabel("MB")
    axis.spines[["top", "right"]].set_visible(False)
