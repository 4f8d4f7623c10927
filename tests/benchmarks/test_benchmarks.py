"""The benchmarks: what they write, and that a wrong or failing candidate gets no figures."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import crossvit
from benchmarks import cases, floor, ops, peers, session, throughput, timing, training
from benchmarks.labels import labels
from benchmarks.photographs import photographs
from benchmarks.plots import bars as plot

THROUGHPUT_ROW = {
    "model": str,
    "batch": int,
    "dtype": str,
    "mode": str,
    "implementation": str,
    "images_per_second": dict,
    "rounds": int,
    "device": str,
    "threads": int,
    "versions": dict,
}
MODEL = "crossvit_tiny_240"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The least number of rounds, of one call each, and the machine is not measured; torch's threads as before."""
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 0.0)
    for module in (throughput, ops):
        monkeypatch.setattr(module, "TURN_SECONDS", 0.0)
        monkeypatch.setattr(module, "CELL_SECONDS", 0.0)
    monkeypatch.setattr(floor, "flop_rate", lambda dtype, threads: (1e11, "not measured"))
    monkeypatch.setattr(floor, "bandwidth", lambda threads: 1e10)
    monkeypatch.setattr(floor, "cache_bytes", lambda: 2**16)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run_throughput(path: Path, *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit status, and the rows by implementation."""
    cell = ("--model", MODEL, "--batch", "1", "--dtype", "float32", "--json", str(path / "rows.json"))
    status = throughput.main([*cell, *arguments])
    return status, {row["implementation"]: row for row in json.loads((path / "rows.json").read_text())}


def check_row(row: dict[str, Any], schema: dict[str, type], figures: str) -> None:
    ours = {"backend": str} if row["implementation"] in session.KERNELS else {}
    assert {key: type(value) for key, value in row.items()} == schema | ours
    assert row["rounds"] >= 9
    assert 0 < row[figures]["min"] <= row[figures]["median"] <= row[figures]["max"]
    assert row["versions"]["torch"] == str(torch.__version__).partition("+")[0]


def test_throughput_writes_a_row_per_implementation_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Engines of other makers included: they are given the same weights and images, so their logits must agree."""
    status, rows = run_throughput(tmp_path, "--peers", "timm-eager,onnxruntime,openvino")
    assert status == 0
    assert set(rows) == {"reference", "auto", "timm-eager", "onnxruntime", "openvino"}
    for row in rows.values():
        check_row(row, THROUGHPUT_ROW, "images_per_second")
        assert (row["model"], row["batch"], row["dtype"], row["mode"]) == (MODEL, 1, "float32", "inference")
    with Image.open(tmp_path / "rows.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.json", "rows.png"]
    printed = capsys.readouterr().out
    assert "× timm-eager" in printed
    assert rows["auto"]["backend"] in ("cpu", "reference")
    assert "backend" not in rows["timm-eager"]
    assert labels([rows["auto"]])["auto"] in printed
    assert "auto" not in printed
    assert "left out" not in printed


def test_training_step_is_timed_and_engines_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status, rows = run_throughput(tmp_path, "--train", "--kernels", "auto", "--peers", "timm-eager,openvino")
    assert status == 0
    assert set(rows) == {"auto", "timm-eager"}
    assert {row["mode"] for row in rows.values()} == {"train"}
    assert "left out: openvino" in capsys.readouterr().out


def test_training_step_changes_the_weights() -> None:
    model = peers.timm_model(MODEL)
    before = model.head[0].weight.detach().clone()
    training.TrainingStep(model, photographs(1, 240), torch.float32)()
    assert not torch.equal(model.head[0].weight, before)


@pytest.mark.parametrize("fault", [lambda y: y + 0.01, lambda y: y * torch.nan, lambda y: y[:, :999]])
def test_candidate_with_wrong_logits_gets_no_row(
    fault: Callable[[Tensor], Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def wrong(model: nn.Module, images: Tensor, dtype: torch.dtype) -> peers.Run:
        right = peers.timm_eager(model, images, dtype)
        return lambda: fault(right())

    monkeypatch.setitem(peers.PEERS, "openvino", wrong)
    status, rows = run_throughput(tmp_path, "--kernels", "reference", "--peers", "timm-eager,openvino")
    assert status == 0
    assert set(rows) == {"reference", "timm-eager"}
    assert "left out: openvino" in capsys.readouterr().out


def test_wrong_kernels_get_no_row_and_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = crossvit.create_model

    def other(name: str, kernels: str) -> nn.Module:
        model = create(name, kernels="reference")
        if kernels == "auto":
            model.head[0].register_forward_hook(lambda module, args, output: output + 0.01)
        return model

    monkeypatch.setattr(crossvit, "create_model", other)
    status, rows = run_throughput(tmp_path, "--peers", "none")
    assert status == 1
    assert set(rows) == {"reference"}


def test_wrong_gradients_get_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = crossvit.create_model

    def other(name: str, kernels: str) -> nn.Module:
        model = create(name, kernels="reference")
        if kernels == "auto":
            model.blocks[2].blocks[1][3].mlp.fc2.weight.register_hook(lambda gradient: 1.5 * gradient)
        return model

    monkeypatch.setattr(crossvit, "create_model", other)
    status, rows = run_throughput(tmp_path, "--train", "--peers", "none")
    assert status == 1
    assert set(rows) == {"reference"}


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(model: nn.Module, images: Tensor, dtype: torch.dtype) -> peers.Run:
        calls = iter(range(6))

        def run() -> Tensor:
            if next(calls) == 5:  # after the check, three calls of warming up and a turn
                raise KeyboardInterrupt
            return logits

        logits = peers.timm_eager(model, images, dtype)()
        return run

    monkeypatch.setitem(peers.PEERS, "openvino", interrupted)
    status, rows = run_throughput(tmp_path, "--kernels", "reference", "--peers", "timm-eager,openvino")
    assert status == 130
    assert {name: row["rounds"] for name, row in rows.items()} == {"reference": 2, "timm-eager": 2, "openvino": 1}
    assert (tmp_path / "rows.png").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "crossvit_16_240"],
        ["--batch", "0"],
        ["--batch", "1,two"],
        ["--dtype", "float64"],
        ["--kernels", "gpu"],
        ["--peers", "tensorrt"],
        ["--rounds", "8"],
        ["--threads", "-1"],
    ],
)
def test_throughput_refuses_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        throughput.main(arguments)
    assert f"argument {arguments[0]}" in capsys.readouterr().err


def test_candidates_take_turns_and_a_failing_one_is_dropped() -> None:
    """A B C A B C …, at least nine rounds, and the others go on when one raises."""
    order, left = [], iter(range(7))

    def failing() -> None:
        order.append("b")
        if next(left) == 6:
            raise OSError("worn out")

    candidates = {"a": lambda: order.append("a"), "b": failing, "c": lambda: order.append("c")}
    turns = list(timing.interleaved(candidates, turn_seconds=0, budget_seconds=0))
    failures = [(name, str(taken)) for name, taken, _ in turns if isinstance(taken, Exception)]
    assert failures in ([("b", "worn out")], [])
    assert [name for name, taken, _ in turns if name == "a"] == ["a"] * 9
    assert {rounds for _, _, rounds in turns} == {9}
    with pytest.raises(ValueError, match="min_rounds must be at least 9, got 8"):
        next(timing.interleaved(candidates, min_rounds=8))


def test_spread_and_json(tmp_path: Path) -> None:
    assert timing.spread([3.0, 1.0, 2.00004]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    rows = [{"a": 1, "b": [1.5]}, {"a": 2}]
    timing.write_json(tmp_path / "new" / "rows.json", rows)
    assert json.loads((tmp_path / "new" / "rows.json").read_text()) == rows
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_executed_operations_are_those_of_the_paper_and_fewer_with_kernels() -> None:
    """timm runs what `describe()` counts, its CPU attention included; the kernels never project keys and values."""
    model, images = peers.timm_model(MODEL), photographs(1, 240)
    ours = crossvit.create_model(MODEL, kernels="cpu" if "cpu" in available() else "reference").eval()
    counted = 2 * ours.describe().multiply_adds
    assert floor.executed_flops(peers.inference(model, images)) == pytest.approx(counted, rel=1e-3)
    executed = floor.executed_flops(peers.inference(ours, images))
    assert executed < 0.97 * counted if "cpu" in available() else executed == pytest.approx(counted, rel=1e-3)


def available() -> list[str]:
    from crossvit_kernels import backends

    return [name for name in backends.BACKENDS if backends.available(name)]


def test_photographs_are_deterministic_distinct_and_normalised() -> None:
    images = photographs(12, (48, 64))
    assert images.shape == (12, 3, 48, 64)
    assert images.dtype == torch.float32
    assert torch.equal(photographs(7, (48, 64)), images[:7])
    assert torch.equal(photographs(2, (48, 64), torch.bfloat16), images[:2].bfloat16())
    apart = torch.cdist(images.flatten(1), images.flatten(1)) + 1e3 * torch.eye(12)
    assert apart.min() > 10
    assert images.mean().abs() < 0.5
    assert 0.8 < images.std() < 1.6
    with pytest.raises(ValueError, match="count"):
        photographs(-1, 48)
    with pytest.raises(ValueError, match="size"):
        photographs(1, (0, 48))
    with pytest.raises(TypeError, match="dtype"):
        photographs(1, 48, torch.uint8)


@pytest.mark.parametrize("backward", [False, True])
def test_ops_writes_a_row_per_implementation(backward: bool, tmp_path: Path) -> None:
    arguments = [
        "--op",
        "all",
        "--batch",
        "1",
        "--dtype",
        "float32",
        "--peers",
        "sdpa",
        "--json",
        str(tmp_path / "rows.json"),
    ]
    assert ops.main([*arguments, *(["--backward"] if backward else [])]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    names = [name for name in cases.OPS if not (backward and name == "cls_fusion")]
    expected = [(op, branch, name) for op in names for branch in cases.BRANCHES for name in ("reference", "auto")]
    expected += [("cls_cross_attention", branch, "sdpa") for branch in cases.BRANCHES]
    assert sorted((row["op"], row["branch"], row["implementation"]) for row in rows) == sorted(expected)
    schema = {key: kind for key, kind in THROUGHPUT_ROW.items() if key not in ("model", "images_per_second")}
    schema |= {"op": str, "branch": str, "tokens": int, "width": int, "microseconds": dict, "floor_microseconds": float}
    for row in rows:
        check_row(row, schema, "microseconds")
    assert Image.open(tmp_path / "rows.png").format == "PNG"


@pytest.mark.parametrize("backward", [False, True])
def test_wrong_op_gets_no_row(backward: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --backward the output may be right: a gradient that is not is enough."""
    right = cases.Cell.function

    def wrong(cell: cases.Cell, kernels: str) -> Callable[..., Tensor]:
        function = right(cell, kernels)

        def call(**tensors: Tensor) -> Tensor:
            out = function(**tensors)
            return out + 0.01 * (tensors["bias"] - tensors["bias"].detach() * (1.0 if backward else 0.9))

        return call if kernels == "auto" else function

    monkeypatch.setattr(cases.Cell, "function", wrong)
    arguments = ["--op", "linear_residual", "--batch", "1", "--dtype", "float32", "--peers", "none"]
    status = ops.main([*arguments, *["--backward"] * backward, "--json", str(tmp_path / "rows.json")])
    assert status == 1
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["implementation"] for row in rows} == {"reference"}


def test_ops_inputs_rotate_over_more_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "cache_bytes", lambda: 2**23)
    cell = cases.Cell("self_attention", "small", 1, torch.float32, False, 1)
    sets = ops._rotation(cell)
    assert sum(tensor.nbytes for tensors in sets for tensor in tensors.values()) >= 2 * 2**23
    assert not torch.equal(sets[0]["qkv"], sets[1]["qkv"])


def test_plots_of_nothing_are_refused(tmp_path: Path) -> None:
    for draw in (plot.throughput, plot.ops):
        with pytest.raises(ValueError, match="rows is empty"):
            draw([], tmp_path / "plot.png")


def test_argument_lists() -> None:
    parse = session.names(["a", "b"], ["a"])
    assert parse("b,a,b") == ["b", "a"]
    assert parse("all") == ["a"]
    assert parse("none") == []
    assert session.counts("8,1,8") == [8, 1]
