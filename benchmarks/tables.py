"""The tables of figures in README.md and docs/performance.md, out of benchmarks/results.

    python -m benchmarks.tables [--check]

A table stands between `<!-- results: NAME -->` and `<!-- end of results -->`; what is between them is written anew.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .session import RESULTS

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
BLOCK = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)

Row = dict[str, Any]
Cell = tuple[Any, ...]


def figure(value: float | None) -> str:
    """Three significant digits, four from a thousand on."""
    if value is None:
        return "–"
    if value >= 1000:
        return f"{float(f'{value:.4g}'):,.0f}"
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1) if value >= 1 else 3}f}"


def times(ours: float | None, theirs: float | None) -> str:
    """Ours over theirs."""
    return "–" if ours is None or theirs is None else f"{ours / theirs:.2f} ×"


def name_of(model: str) -> str:
    """A model as the paper calls it."""
    found = re.fullmatch(r"crossvit_(\w+?)(_dagger)?_\d+", model)
    if found is None:
        return f"`{model}`"
    size = {"tiny": "Ti", "small": "S", "base": "B"}.get(found[1], found[1])
    return f"CrossViT-{size}{'†' if found[2] else ''}"


def read(name: str) -> list[Row]:
    """The rows of a file of results."""
    rows: list[Row] = json.loads((RESULTS / f"{name}.json").read_text())
    return rows


def cells(
    rows: Iterable[Row],
    keys: Sequence[str],
    value: Callable[[Row], Any] = lambda row: row["images_per_second"]["median"],
) -> dict[Cell, dict[str, Any]]:
    """{what was measured, by `keys`: {implementation: the figure}}, in the order of the rows."""
    found: dict[Cell, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), {})[row["implementation"]] = value(row)
    return found


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown."""
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for line in lines:
        yield f"| {' | '.join(line)} |"


PEERS = {
    "timm-eager": "timm eager",
    "timm-compiled": "timm compiled",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}


def throughput() -> Iterator[str]:
    """Images per second on a CPU beside the peers."""
    head = ["model", "batch", "dtype", "**our kernels**", *PEERS.values(), "ours / timm eager", "ours / OpenVINO"]
    lines = []
    for (model, batch, dtype), by in sorted(cells(read("throughput"), ("model", "batch", "dtype")).items()):
        ours = by.get("auto")
        ratios = [times(ours, by.get("timm-eager")), times(ours, by.get("openvino"))]
        lines.append([name_of(model), str(batch), dtype, *(figure(by.get(k)) for k in ("auto", *PEERS)), *ratios])
    return table(head, lines)


def training() -> Iterator[str]:
    """Images per second of training steps on a CPU."""
    head = ["model", "batch", "dtype", "**our kernels**", "timm eager", "timm compiled", "ours / timm eager"]
    lines = []
    for (model, batch, dtype), by in cells(read("training"), ("model", "batch", "dtype")).items():
        figures = [figure(by.get(key)) for key in ("auto", "timm-eager", "timm-compiled")]
        autocast = "bfloat16 autocast" if dtype == "bfloat16" else dtype
        lines.append([name_of(model), str(batch), autocast, *figures, times(by.get("auto"), by.get("timm-eager"))])
    return table(head, lines)


def scaling() -> Iterator[str]:
    """Images per second at larger batches and images, with the ratio to timm's."""
    wanted = [(1, 240), (16, 240), (64, 240), (1, 480), (1, 816)]
    rows = [row for row in read("scaling") if row["threads"] == 2 and "images_per_second" in row]
    by_cell = cells(rows, ("model", "batch", "image_size"))
    head = ["model", *(f"batch {b}" if s == 240 else f"one image of {s}²" for b, s in wanted)]
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        found = [by_cell[model, *cell] for cell in wanted]
        lines.append([name_of(model), *(f"{figure(f['auto'])} ({f['auto'] / f['timm-eager']:.2f} ×)" for f in found)])
    return table(head, lines)


def memory() -> Iterator[str]:
    """Peak memory over the weights, ours and timm's."""
    rows = [row for row in read("scaling") if "peak_bytes" in row]
    by_cell = cells(rows, ("model", "dtype", "mode", "batch", "image_size"), lambda row: row["peak_bytes"])
    wanted = [("inference", 8, 240), ("inference", 1, 816), ("train", 8, 240)]
    head = ["MB, ours and timm's", "inference, batch 8", "inference, one image of 816²", "training, batch 8"]
    lines = []
    for model, dtype in dict.fromkeys(cell[:2] for cell in by_cell):
        found = [by_cell[model, dtype, *cell] for cell in wanted]
        pairs = [f"{by['auto'] / 1e6:.0f}, {by['timm-eager'] / 1e6:.0f}" for by in found]
        lines.append([f"{name_of(model)}, {dtype}", *pairs])
    return table(head, lines)


def accelerated() -> Iterator[str]:
    """timm's models before and after `accelerate`."""
    by_cell = cells(read("accelerated"), ("model", "batch"))
    batches = list(dict.fromkeys(batch for _, batch in by_cell))
    lines = []
    for model in dict.fromkeys(model for model, _ in by_cell):
        pairs = [(by_cell[model, b]["timm-eager"], by_cell[model, b]["accelerated"]) for b in batches]
        lines.append([f"`{model}`", *(f"{figure(a)} → {figure(b)} ({times(b, a)})" for a, b in pairs)])
    return table(["timm's model", *(f"batch {b}" for b in batches)], lines)


def gpu_models() -> Iterator[str]:
    """Images per second on a GPU."""
    columns = ("reference", "reference-graph", "triton", "triton-graph", "timm-eager", "timm-eager-graph")
    names = ["reference", "reference, graph", "our kernels", "**our kernels, graph**", "timm eager", "timm, graph"]
    rows = [row for row in read("gpu") if row.get("mode") == "inference" and "images_per_second" in row]
    lines = []
    for (model, batch), by in cells(rows, ("model", "batch")).items():
        ratio = times(by.get("triton-graph"), by.get("timm-eager-graph"))
        lines.append([name_of(model), str(batch), *(figure(by.get(key)) for key in columns), ratio])
    return table(["images/s", "batch", *names, "ours / timm, both as graphs"], lines)


def gpu_ops() -> Iterator[str]:
    """Microseconds of ops on a GPU."""
    rows = [row for row in read("gpu") if row.get("mode") == "forward"]
    floors = {row["op"]: row["floor_microseconds"] for row in rows}
    lines = []
    for (op,), by in cells(rows, ("op",), lambda row: row["microseconds"]["median"]).items():
        us = [figure(by.get(key)) for key in ("reference", "sdpa", "triton")]
        lines.append([f"`{op}`", *us, figure(floors[op]), times(by["reference"], by.get("triton"))])
    return table(["µs, forward", "reference", "SDPA", "**our kernels**", "floor", "reference / ours"], lines)


def front() -> Iterator[str]:
    """The README's: what a timm model makes, and the same on our kernels."""
    head = ["machine", "model", "batch", "dtype", "**ours**", *[PEERS[p] for p in ("timm-eager", "timm-compiled")]]
    head += ["OpenVINO", "ours / timm eager"]
    lines = []
    for (model, batch, dtype), by in sorted(cells(read("throughput"), ("model", "batch", "dtype")).items()):
        figures = [figure(by.get(key)) for key in ("auto", "timm-eager", "timm-compiled", "openvino")]
        lines.append(["CPU", name_of(model), str(batch), dtype, *figures, times(by.get("auto"), by.get("timm-eager"))])
    rows = [row for row in read("gpu") if row.get("mode") == "inference" and "images_per_second" in row]
    for (model, batch, dtype), by in cells(rows, ("model", "batch", "dtype")).items():
        ours, theirs = by.get("triton-graph"), by.get("timm-eager-graph")
        last = [figure(ours), figure(theirs), "–", "–", times(ours, theirs)]
        lines.append(["GPU, CUDA graphs", name_of(model), str(batch), dtype, *last])
    return table(head, lines)


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "front": front,
    "throughput": throughput,
    "training": training,
    "scaling": scaling,
    "memory": memory,
    "accelerated": accelerated,
    "gpu-models": gpu_models,
    "gpu-ops": gpu_ops,
}


def written_anew(text: str) -> str:
    """A page with its tables as the results are now. Raises KeyError for a table that is not known."""
    return BLOCK.sub(lambda found: "\n".join([found[1], *TABLES[found[2]](), "", found[3]]), text)


def main(arguments: Sequence[str] | None = None) -> int:
    """0; with --check 1 where a page's tables are not those of the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where something would change")
    options = parser.parse_args(arguments)
    stale = [path for path in PAGES if written_anew(path.read_text()) != path.read_text()]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'its tables are not those of the results' if options.check else 'written'}")
        if not options.check:
            path.write_text(written_anew(path.read_text()))
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
