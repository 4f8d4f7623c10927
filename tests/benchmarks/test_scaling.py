"""benchmarks.scaling, memory and accelerated: what they write, and that a wrong model has no figures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import accelerated, memory, scaling, timing
from benchmarks.labels import backend, labels

MODEL = "crossvit_tiny_240"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "ROUNDS", (1, 1))
    monkeypatch.setattr(scaling, "TURN_SECONDS", 0.0)


def run(path: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    status = scaling.main(["--model", MODEL, "--threads", "1", "--json", str(path / "rows.json"), *arguments])
    return status, json.loads((path / "rows.json").read_text())


def test_a_row_per_cell_tables_and_a_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Memory as it would be."""
    monkeypatch.setattr(memory, "start", lambda cell: cell)
    monkeypatch.setattr(memory, "finish", lambda cell: memory.row_of(cell) | {"peak_bytes": 10**6 * len(cell["mode"])})
    before = torch.get_num_threads()
    status, rows = run(tmp_path, "--batch", "1,2", "--image", "240,816", "--memory-batch", "2")
    assert torch.get_num_threads() == before
    assert status == 0
    timed = [row for row in rows if "images_per_second" in row]
    cells = {(row["image_size"], row["batch"], row["implementation"]) for row in timed}
    places = [(240, 1), (240, 2), (816, 1)]
    assert cells == {(*place, key) for place in places for key in ("auto", "timm-eager")}
    assert len(rows) == 12
    with Image.open(tmp_path / "rows.png") as picture:
        assert picture.format == "PNG"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.json", "rows.png"]
    printed = capsys.readouterr().out
    ours = labels([{"implementation": "auto", **backend("auto", "cpu", torch.float32)}])["auto"]
    assert f"| image | batch | 1, timm-eager | 1, {ours} |" in printed
    assert f"| {MODEL} | float32 | train | 240 | 2 | 5 | 5 (1.00) |" in printed
    assert f"| {MODEL} | float32 | inference | 816 | 1 | 9 | 9 (1.00) |" in printed


def test_a_training_step_takes_less_memory_than_timms() -> None:
    """In fresh processes: the gradients and the optimizer's two averages of them for 7 million parameters, and more."""
    cell = dict(model=MODEL, mode="train", batch=2, image=240, dtype="float32", threads=1)
    started = [memory.start(cell | {"implementation": key}) for key in ("auto", "timm-eager")]
    ours, theirs = map(memory.finish, started)
    assert (ours["implementation"], theirs["implementation"]) == ("auto", "timm-eager")
    assert 3 * 4 * 6.7e6 < ours["peak_bytes"] < theirs["peak_bytes"]


def test_wrong_logits_have_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    build = memory.model_at

    def wrong(name: str, side: int, implementation: str) -> torch.nn.Module:
        model = build(name, side, implementation)
        if implementation == "auto":
            model.head[0].register_forward_hook(lambda module, args, output: output + 0.01)
        return model

    monkeypatch.setattr(memory, "model_at", wrong)
    status, rows = run(tmp_path, "--batch", "1", "--image", "240", "--no-memory", "--no-plot")
    assert status == 1
    assert {row["implementation"] for row in rows} == {"timm-eager"}
    assert "left out: auto" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]


def test_a_process_that_fails_is_said_to(tmp_path: Path) -> None:
    cell = dict(model=MODEL, implementation="auto", mode="inference", batch=1, image=0, dtype="float32", threads=1)
    with pytest.raises(RuntimeError, match="argument --image: expected at least 1, got 0"):
        memory.finish(memory.start(cell))


def test_peak_bytes_sees_what_a_call_holds() -> None:
    size = 64 * 2**20
    peak = memory.peak_bytes(lambda: torch.ones(size // 4).sum())
    assert 0.95 * size < peak < 1.5 * size  # the kernel counts pages in batches


def test_slow_calls_make_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "ROUNDS", (3, 9))
    for seconds, rounds in ((5.0, 3), (0.5, 6), (0.06, 9)):
        monkeypatch.setattr(timing, "host_seconds", lambda run, calls, s=seconds: s * calls)
        taken = scaling.in_turn({"a": lambda: None})
        assert taken == {"a": [seconds] * rounds}


def run_accelerated(path: Path) -> tuple[int, list[dict[str, Any]]]:
    accelerated._models.cache_clear()
    status = accelerated.main(["--model", MODEL, "--batch", "1,2", "--json", str(path / "rows.json")])
    return status, json.loads((path / "rows.json").read_text())


def test_accelerated_writes_pairs_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(accelerated, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(accelerated, "CELL_SECONDS", 0.0)
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 0.0)
    status, rows = run_accelerated(tmp_path)
    assert status == 0
    pairs = [(row["batch"], row["implementation"]) for row in rows]
    assert pairs == [(batch, key) for batch in (1, 2) for key in ("timm-eager", "accelerated")]
    assert all(row["rounds"] >= 9 and row["images_per_second"]["min"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert f"| {MODEL} | float32 | 2 |" in printed
    assert "Geometric mean of the ratios" in printed


def test_accelerated_leaves_out_what_disagrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def wrong(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
        model.register_forward_hook(lambda module, args, output: output + 0.1)
        return model

    monkeypatch.setattr(accelerated, "accelerate", wrong)
    status, rows = run_accelerated(tmp_path)
    assert (status, rows) == (1, [])
    assert f"left out: {MODEL}" in capsys.readouterr().out
