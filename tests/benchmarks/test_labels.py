"""In tables and plots ours are called by the backend that ran, not by what was asked for."""

from typing import Any

import pytest
import torch

from benchmarks.labels import WORDS, backend, labels
from benchmarks.plots import bars
from benchmarks.plots import scaling as plot_scaling
from crossvit_kernels import backends

ROW: dict[str, Any] = {
    "model": "crossvit_x",
    "batch": 1,
    "image_size": 240,
    "dtype": "float32",
    "mode": "inference",
    "images_per_second": {"median": 2.0, "min": 1.0, "max": 3.0},
    "threads": 1,
    "device": "a CPU",
    "versions": {},
}
ROWS = [ROW | row for row in ({"implementation": "auto", "backend": "cpu"}, {"implementation": "timm-eager"})]


def test_labels() -> None:
    rows = [
        {"implementation": "auto", "backend": "cpu"},
        {"implementation": "auto", "backend": "reference"},
        {"implementation": "triton-graph", "backend": "triton"},
        {"implementation": "reference"},
        {"implementation": "openvino"},
        {"implementation": "auto-graph"},
    ]
    assert labels(rows) == {
        "auto": "ours (C++ and reference)",
        "triton-graph": "ours (Triton), graph",
        "reference": "ours (reference)",
        "openvino": "openvino",
        "auto-graph": "ours, graph",
    }
    assert set(WORDS) == set(backends.BACKENDS)


def test_what_runs_is_asked_of_the_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "served_by", lambda kernels, device, dtype: (kernels, device, str(dtype)))
    assert backend("auto-graph", "cuda", torch.float16) == {"backend": "auto+cuda+torch.float16"}
    assert backend("timm-eager-graph", "cuda", torch.float16) == {}


@pytest.mark.parametrize("draw", [bars.throughput, plot_scaling.scaling])
def test_legends(draw: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("benchmarks.plots.bars.save", lambda figure, path: drawn.append(figure))
    monkeypatch.setattr("benchmarks.plots.scaling.save", lambda figure, path: drawn.append(figure))
    draw(ROWS, tmp_path / "x.png")
    (legend,) = drawn[0].legends
    said = [text.get_text().removesuffix(", 1 thread") for text in legend.get_texts()]
    assert said == ["ours (C++)", "timm-eager"]
