"""Bar charts of benchmark rows."""

import os
from pathlib import Path
from typing import Any

from ..labels import labels

Row = dict[str, Any]

# Ours in warm colours, torch's in greys, other engines in blues; the same in every chart.
COLOURS = {
    "reference": "#f2b134",
    "auto": "#d1495b",
    "cpu": "#a4243b",
    "triton": "#e07a5f",
    "cuda": "#81171b",
    "reference-graph": "#c98a12",
    "triton-graph": "#d1495b",
    "cuda-graph": "#5b0f13",
    "timm-eager": "#8d99ae",
    "timm-compiled": "#5c677d",
    "timm-eager-graph": "#6d7a91",
    "timm-compiled-graph": "#343a46",
    "onnxruntime": "#48a9a6",
    "openvino": "#2d6a8e",
    "reference-compiled": "#8d99ae",
    "sdpa": "#5c677d",
}
WHISKERS = {"lw": 0.8, "ecolor": "#333333"}


def throughput(rows: list[Row], path: Path) -> None:
    """Write rows of `benchmarks.throughput` as a PNG: a panel per model and dtype, a group of bars per batch.

    Bars are medians of images per second, whiskers minimum and maximum. Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("rows is empty, expected at least one")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    models, dtypes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "dtype"))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    several_threads = len({row["threads"] for row in rows}) > 1
    figure = Figure(figsize=(max(1 + 5.2 * len(dtypes), 8), 0.8 + 3.1 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), len(dtypes), squeeze=False)
    for line, model in enumerate(models):
        for column, dtype in enumerate(dtypes):
            panel = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
            _panel(axes[line][column], panel, names, several_threads)
            axes[line][column].set_title(f"{model}, {dtype}", fontsize=10)
        axes[line][0].set_ylabel("images / s")
    handles = [Patch(color=COLOURS.get(name, "#000000"), label=label) for name, label in labels(rows).items()]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(names), 3 * len(dtypes)), frameon=False, fontsize=9
    )
    first = rows[0]
    mode = "Training step" if first["mode"] == "train" else "Inference"
    threads = "" if several_threads or "driver" in first else f", {first['threads']} threads"
    torch_version = first["versions"].get("torch", "")
    figure.suptitle(f"{mode}: {first['device']}{threads}, torch {torch_version}", fontsize=11)
    save(figure, path)


def ops(rows: list[Row], path: Path) -> None:
    """Write rows of `benchmarks.ops` as a PNG: a panel per dtype, a group of bars per op, branch and batch.

    Bars are median times over the op's floor, on a log axis that starts at the floor, whiskers minimum and maximum.
    Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("rows is empty, expected at least one")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    group_of = "{op}\n{tokens}×{width}, batch {batch}".format_map
    groups = list(dict.fromkeys(map(group_of, rows)))
    figure = Figure(figsize=(1.5 + 5 * len(dtypes), 1.2 + 0.55 * len(groups)), layout="constrained")
    height = 0.84 / len(names)
    for axis, dtype in zip(figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0], dtypes):
        for row in rows:
            if row["dtype"] != dtype:
                continue
            group, times = groups.index(group_of(row)), row["microseconds"]
            place = group + (names.index(row["implementation"]) - (len(names) - 1) / 2) * height
            low, middle, high = (times[key] / row["floor_microseconds"] for key in ("min", "median", "max"))
            colour, whiskers = COLOURS.get(row["implementation"], "#000000"), [[middle - low], [high - middle]]
            axis.barh(place, middle - 1, 0.92 * height, 1, color=colour, xerr=whiskers, error_kw=WHISKERS)
            axis.annotate(
                _duration(times["median"]),
                (max(high, 1), place),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
        axis.set_xscale("log")
        axis.margins(x=0.15)
        axis.set_xlim(1, max(2, axis.get_xlim()[1]))
        axis.set_title(f"{dtype}, {rows[0]['mode']}", fontsize=10)
        axis.set_xlabel("time over the floor")
        axis.set_yticks(range(len(groups)), groups, fontsize=8)
        axis.set_ylim(len(groups) - 0.5, -0.5)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", lw=0.4, alpha=0.6)
        axis.set_axisbelow(True)
    handles = [Patch(color=COLOURS.get(name, "#000000"), label=label) for name, label in labels(rows).items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3 * len(dtypes), frameon=False, fontsize=9)
    figure.suptitle(f"Ops: {rows[0]['device']}, torch {rows[0]['versions'].get('torch', '')}", fontsize=11)
    save(figure, path)


def _duration(microseconds: float) -> str:
    return f"{microseconds:.3g} µs" if microseconds < 1000 else f"{microseconds / 1000:.3g} ms"


def _count(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{float(f'{value:.3g}'):,.0f}"


def save(figure: Any, path: Path) -> None:
    """Under a temporary name first, so that a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(temporary, format="png", dpi=140)
    os.replace(temporary, path)


def _panel(axis: Any, rows: list[Row], names: list[str], several_threads: bool) -> None:
    groups = sorted({(row["batch"], row["threads"]) for row in rows})
    for row in rows:
        figures = row["images_per_second"]
        here = [
            other["implementation"]
            for other in rows
            if (other["batch"], other["threads"]) == (row["batch"], row["threads"])
        ]
        here.sort(key=names.index)
        width = 0.84 / len(names)
        place = (
            groups.index((row["batch"], row["threads"]))
            + (here.index(row["implementation"]) - (len(here) - 1) / 2) * width
        )
        whiskers = [[figures["median"] - figures["min"]], [figures["max"] - figures["median"]]]
        colour = COLOURS.get(row["implementation"], "#000000")
        axis.bar(
            place,
            figures["median"],
            0.92 * width,
            color=colour,
            yerr=whiskers,
            error_kw=WHISKERS,
        )
        axis.annotate(
            _count(figures["median"]),
            (place, figures["max"]),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
        )
    labels = [f"batch {batch}" + (f"\n{threads} threads" if several_threads else "") for batch, threads in groups]
    axis.set_xticks(range(len(groups)), labels)
    medians = [row["images_per_second"]["median"] for row in rows]
    if rows and max(medians) > 30 * min(medians):  # one image and many, on a GPU
        axis.set_yscale("log")
    axis.margins(y=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", lw=0.4, alpha=0.6)
    axis.set_axisbelow(True)
