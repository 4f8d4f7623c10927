"""What `make gpu` prints and draws of the rows and outcomes of its stages."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..plots import bars as plot
from .stages import Outcome

Row = dict[str, Any]

CELL = {"model": ("model", "batch", "dtype", "mode"), "op": ("op", "branch", "batch", "dtype", "mode")}
TAIL = 1500  # characters of a failed stage's output that are shown
OURS = ("triton", "triton-graph", "cuda", "cuda-graph", "auto", "auto-graph")


def _cell(row: Row) -> tuple:
    return tuple(row[key] for key in CELL["model" if "model" in row else "op"])


def merged(runs: Iterable[Sequence[Row]]) -> list[Row]:
    """The rows of all runs; of a cell that was timed in several those of one run, with the most implementations, since
    times of different runs do not compare."""
    cells: dict[tuple, list[Row]] = {}
    for run in runs:
        for cell, group in itertools.groupby(run, key=_cell):
            rows = list(group)
            if len(rows) >= len(cells.get(cell, [])):
                cells[cell] = rows
    return [row for rows in cells.values() for row in rows]


def failures(outcomes: Sequence[Outcome]) -> str:
    """The end of what each failed stage printed."""
    return "\n".join(
        f"--- {outcome.stage.name}: {outcome.status}\n{outcome.output[-TAIL:].strip()}\n"
        for outcome in outcomes
        if outcome.failed and outcome.output.strip()
    )


def models(rows: Sequence[Row]) -> str:
    """Medians of images per second, a line per cell, and the best of ours over the best of the peers."""
    rows = [row for row in rows if "model" in row]
    if not rows:
        return ""
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    widths = [max(9, len(name)) for name in names]
    cells = {cell: list(group) for cell, group in itertools.groupby(rows, key=_cell)}
    label = max(len(cell[0]) for cell in cells)
    lines = [
        "images per second (median); ratio: the fastest of our kernels over the fastest of timm",
        f"{'':{label}} batch {'dtype':9} {'mode':9} " + " ".join(map(str.rjust, names, widths)) + "  ratio",
    ]
    for (model, batch, dtype, mode), group in cells.items():
        medians = {row["implementation"]: row["images_per_second"]["median"] for row in group}
        figures = [f"{medians[n]:{w}.5g}" if n in medians else " " * w for n, w in zip(names, widths)]
        ratio = _ratio([medians[n] for n in OURS if n in medians], [v for n, v in medians.items() if "timm" in n])
        lines.append(f"{model:{label}} {batch:5d} {dtype:9} {mode:9} {' '.join(figures)}  {ratio:>5}")
    return "\n".join([*lines, ""])


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    return f"{max(ours) / max(theirs):.2f}" if ours and theirs else ""


def ops(rows: Sequence[Row]) -> str:
    """A line per op, branch and mode; per batch the time of our kernels and how it compares."""
    rows = [row for row in rows if "op" in row]
    if not rows:
        return ""
    batches = sorted({row["batch"] for row in rows}, reverse=True)
    lines = [
        "ops: µs of our kernels (of the reference, where they have no row); that over its floor;"
        " times as fast as the reference, the compiled reference, SDPA",
        f"{'':20} {'branch':6} {'mode':8} {'dtype':8}" + "".join(f"{f'batch {batch}':^35}" for batch in batches),
    ]
    cells = {cell: list(group) for cell, group in itertools.groupby(rows, key=_cell)}
    for op, branch, dtype, mode in dict.fromkeys((c[0], c[1], c[3], c[4]) for c in cells):
        figures = [_op_figures(cells.get((op, branch, batch, dtype, mode), [])) for batch in batches]
        mode = mode.replace("forward+backward", "fwd+bwd")
        lines.append(f"{op:20} {branch:6} {mode:8} {dtype:8}" + "".join(f"{figure:35}" for figure in figures).rstrip())
    return "\n".join([*lines, ""])


def _op_figures(rows: Sequence[Row]) -> str:
    medians = {row["implementation"]: row["microseconds"]["median"] for row in rows}
    if not medians:
        return ""
    own = next((medians[name] for name in OURS if name in medians), None)
    shown = own or next(iter(medians.values()))
    text = f"{shown:9.1f}{'' if own else ' (ref)'} {shown / rows[0]['floor_microseconds']:5.1f}"
    for name in ("reference", "reference-compiled", "sdpa"):
        text += f" {medians[name] / own:5.2f}" if own and name in medians else "     –" if own else ""
    return text


def stages(outcomes: Sequence[Outcome]) -> str:
    """What became of every stage."""
    width = max((len(outcome.stage.name) for outcome in outcomes), default=0)
    return "\n".join(
        f"{o.stage.name:{width}}  {o.status:11} {o.seconds:5.0f} of {o.limit:4.0f} s  {o.note[:110]}".rstrip()
        for o in outcomes
    )


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """The plots that there are rows for: models in inference, ops forward."""
    inference = [row for row in rows if row.get("mode") == "inference"]
    forward = [row for row in rows if row.get("mode") == "forward"]
    written = []
    for drawing, chosen, name in ((plot.throughput, inference, "gpu_models.png"), (plot.ops, forward, "gpu_ops.png")):
        if chosen:
            drawing(chosen, folder / name)
            written.append(folder / name)
    return written
