"""The curves of one or several runs, as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..system.files import replacing
from .files import read_lines


def draw_curves(logs: Mapping[str, Path], path: Path) -> None:
    """Writes loss, accuracy and learning rate over the steps as PNG, the runs on one another.

    logs: each run's metrics.jsonl by its name. Nothing is written where none holds a line yet.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = {name: read_lines(log) for name, log in logs.items() if log.exists()}
    if not any(runs.values()):
        return
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    loss, score, rate = figure.subplots(1, 3)
    colours = matplotlib.colormaps["tab10"]
    for k, (name, lines) in enumerate(runs.items()):
        label = f"{name} " if len(runs) > 1 else ""
        training = [line for line in lines if line["kind"] == "train"]
        evaluations = [line for line in lines if line["kind"] == "eval"]
        style: dict[str, Any] = dict(color=colours(k), alpha=0.8, lw=1.2)
        _plot(loss, training, "loss", label=f"{label}training", **style)
        _plot(loss, evaluations, "loss", label=f"{label}validation", marker=".", ls="--", **style)
        for metric, mark in (("top1", "-"), ("top5", ":"), ("map", "-")):
            _plot(score, evaluations, metric, label=f"{label}{metric}", marker=".", ls=mark, **style)
        _plot(rate, training, "lr", label=label or None, **style)
    for axes, title in ((loss, "loss"), (score, "validation, %"), (rate, "learning rate")):
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _plot(axes: Any, lines: list[dict[str, Any]], key: str, **style: Any) -> None:
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    if points:
        axes.plot(*zip(*points), **style)
