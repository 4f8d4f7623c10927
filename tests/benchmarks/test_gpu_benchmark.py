"""`make gpu` as far as it goes without a GPU: its stages, their limits and outcomes, its tables."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import devices, ops, throughput
from benchmarks.gpu import exercise, report, shards, stages
from benchmarks.gpu import job as gpu
from benchmarks.gpu import plan as gpu_stages
from benchmarks.gpu.stages import Outcome, Runner, Stage

ROOT = Path(__file__).resolve().parents[2]


def stage(name: str, code: str, weight: float = 1.0, **more: Any) -> Stage:
    """A stage that runs Python code."""
    return Stage(name, "test", [sys.executable, "-c", code], weight, **more)


def statuses(outcomes: list[Outcome]) -> dict[str, str]:
    return {outcome.stage.name: outcome.status for outcome in outcomes}


def test_without_a_gpu_it_says_what_it_needs(tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert "needs an NVIDIA GPU and a torch, 2.11 or newer" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu130")
    assert gpu.missing() == "this is torch 2.10.1+cu130"


def test_later_stages_run_after_a_failure(tmp_path: Path) -> None:
    told: list[str] = []
    runner = Runner(60, tmp_path, lambda outcome: told.append(outcome.stage.name))
    outcomes = runner.run(
        [
            stage("bad", "print('before', flush=True); raise SystemExit('why it failed')"),
            Stage("absent", "test", ["/nonexistent/tool"], 1),
            stage("lacking", "", missing="no such tool here"),
            stage("good", "import os; print(os.getcwd(), os.environ['WHAT'])", environment={"WHAT": "this"}),
        ]
    )
    assert statuses(outcomes) == {"bad": "failed", "absent": "failed", "lacking": "unavailable", "good": "ok"}
    assert told == ["bad", "absent", "lacking", "good"]
    assert [outcome.failed for outcome in outcomes] == [True, True, False, False]
    bad, absent, lacking, good = outcomes
    assert (bad.note, bad.output) == ("why it failed", "before\nwhy it failed\n")
    assert "No such file" in absent.note
    assert lacking.note == "no such tool here"
    assert good.output == f"{tmp_path} this\n"
    assert good.row().keys() == {"stage", "status", "seconds", "limit_seconds", "note"}


def test_stages_are_ended_at_their_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked as by Ctrl-C first, so that they can still say what they did; then killed with all that they started."""
    monkeypatch.setattr(stages, "GRACE_SECONDS", 1.0)
    polite = "import time\ntry: print('working', flush=True); time.sleep(60)\nexcept KeyboardInterrupt: print('kept')"
    child = "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print(p.pid, flush=True)"
    stubborn = f"import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); {child}; p.wait()"
    sleeps = "import time; time.sleep(60)"
    together = [
        stage("polite", polite, 10, beside=True),
        stage("stubborn", stubborn, beside=True),
        stage("worth a try", sleeps, beside=True, optional=True),
    ]
    late = stage("late and optional", "", optional=True)
    monkeypatch.setattr(stages, "LEAST_SECONDS", 3.0)
    ended = Runner(6, tmp_path).run([*together, stage("late", ""), late])
    outcomes = {outcome.stage.name: outcome for outcome in ended}
    assert statuses(list(outcomes.values())) == {
        "polite": "timed out",
        "stubborn": "timed out",
        "worth a try": "out of time",
        "late": "not run",
        "late and optional": "out of time",
    }
    assert outcomes["polite"].output == "working\nkept\n"
    assert not alive(int(outcomes["stubborn"].output))
    assert [outcomes[name].failed for name in ("polite", "worth a try", "late")] == [True, False, True]
    assert "did not end within" in outcomes["polite"].note


def alive(pid: int) -> bool:
    """Whether the process runs; one that ended and that nobody waited for does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_stages_beside_one_another_run_at_the_same_time(tmp_path: Path) -> None:
    """Each waits for the other's file."""
    wait = "import pathlib, time\npathlib.Path('{}').touch()\nwhile not pathlib.Path('{}').exists(): time.sleep(0.01)"
    pair = [stage(a, wait.format(a, b), beside=True) for a, b in (("a", "b"), ("b", "a"))]
    outcomes = Runner(60, tmp_path).run([*pair, stage("after", "import os; print(os.listdir())")])
    assert statuses(outcomes) == {"a": "ok", "b": "ok", "after": "ok"}


def test_time_that_is_left_over_goes_to_later_stages(tmp_path: Path) -> None:
    """By weights: 1 of 4, then 1 of 3 of what is left, then all of it; a command is told what it may take."""
    outcomes = Runner(80, tmp_path).run(
        [stage("a", ""), stage("b", ""), Stage("c", "test", [sys.executable, "-c", "print({seconds})"], 2)]
    )
    assert [round(outcome.limit, -1) for outcome in outcomes] == [20, 30, 80]
    assert 50 <= int(outcomes[2].output) <= 60


def test_ctrl_c_keeps_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(gpu, "facts", lambda: {"device": "a GPU", "driver": "1.2", "date": "2026-01-01"})
    rows = tmp_path / "rows"
    rows.mkdir()
    ready = tmp_path / "ready"
    wait = f"import pathlib, time; pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"

    def press() -> None:
        while not ready.exists():
            threading.Event().wait(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    written = [{**MODEL_ROW, "implementation": "triton"}]
    first = stage("first", f"open({str(rows / 'a.json')!r}, 'w').write({json.dumps(written)!r})")
    assert gpu.run([first, stage("second", wait), stage("third", "")], 60, rows, tmp_path / "out") == 130
    printed = capsys.readouterr().out
    for text in ("first   ok", "second  interrupted", "third   not run", "1230", "a GPU"):
        assert text in printed
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert found[0] == written[0]
    assert [row["status"] for row in found[1:]] == ["ok", "interrupted", "not run"]
    assert {row["driver"] for row in found[1:]} == {"1.2"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"gpu.json", "gpu.log", "gpu_models.png"}


@pytest.mark.parametrize(("status", "expected"), [(0, 0), (1, 1)])
def test_exit_status(status: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "facts", lambda: {"device": "a GPU"})
    chosen = [stage("a", f"raise SystemExit({status})"), stage("b", "", missing="not here")]
    assert gpu.run(chosen, 60, tmp_path, tmp_path / "out") == expected


SANITIZER = "========= COMPUTE-SANITIZER\n"


@pytest.mark.parametrize(
    ("judge", "status", "output", "verdict", "note"),
    [
        (gpu_stages.by_sanitizer, 0, SANITIZER + "========= ERROR SUMMARY: 0 errors\n", "ok", "0 errors"),
        (gpu_stages.by_sanitizer, 86, SANITIZER + "========= Invalid __global__ read\n", "failed", "Invalid __global"),
        (gpu_stages.by_sanitizer, 86, SANITIZER + "========= ERROR SUMMARY: 3 errors\n", "failed", "3 errors"),
        (gpu_stages.by_sanitizer, 1, SANITIZER + "========= Error: Device not supported\n", "unavailable", "Device"),
        (gpu_stages.by_sanitizer, 1, "Traceback\nImportError: triton\n", "failed", "ImportError: triton"),
        (gpu_stages.by_build, 0, "", "ok", ""),
        (gpu_stages.by_build, 0, "crossvit-kernels: without _cuda.so: no nvcc\nx\n", "unavailable", "no nvcc"),
        (gpu_stages.by_build, 0, "crossvit-kernels: without _cuda.so: a.cu: it did not compile\n", "failed", "a.cu"),
        (gpu_stages.by_build, 1, "error: why\n", "failed", "error: why"),
        (gpu_stages.by_pytest, 0, "..\n2 passed, 9 deselected in 3.1s\n", "ok", "2 passed, 9 deselected"),
        (gpu_stages.by_pytest, 1, "FAILED tests/a.py::b - X\n1 failed, 2 passed in 3s\n", "failed", "tests/a.py::b"),
        (gpu_stages.by_pytest, 1, "1 passed in 1s\n\n1 died, 2 passed in 3s\n", "failed", "1 died, 2 passed"),
        (gpu_stages.by_pytest, 5, "9 deselected in 3s\n", "failed", "no test is marked gpu"),
        (gpu_stages.by_rows, 0, "left out: sdpa (a): why\nnot reached: b: c\n", "ok", "sdpa (a): why (and 1 more)"),
        (gpu_stages.by_rows, 1, "left out: sdpa (a): y\nleft out: triton (a): z\n", "failed", "triton (a): z"),
        (gpu_stages.by_rows, 1, "Traceback\nKeyError: 'x'\n", "failed", "KeyError: 'x'"),
    ],
)
def test_verdicts(judge: Any, status: int, output: str, verdict: str, note: str) -> None:
    found, said = judge(status, output)
    assert found == verdict
    assert note in said


@pytest.mark.parametrize("smoke", [False, True])
def test_every_planned_command_is_understood(smoke: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (devices, sys.modules["benchmarks.session"]):
        monkeypatch.setattr(module, "no_gpu", lambda: None)
    monkeypatch.setattr(exercise, "_calls", lambda options: [])
    monkeypatch.setattr(exercise, "use", lambda device: devices.DEVICES["cpu"])
    planned = gpu_stages.planned(ROOT, tmp_path, smoke)
    assert {stage.group for stage in planned} == set(gpu.GROUPS)
    assert len({stage.name for stage in planned}) == len(planned)
    parsers = {"throughput": throughput._parse, "ops": ops._parse, "exercise": exercise.main}
    written = []
    for stage in planned:
        words = [word.replace("{seconds}", "10") for word in stage.command]
        module = next((word for word in words if word.startswith("benchmarks.")), None)
        if module is None:
            continue
        if module == "benchmarks.gpu.shards":
            assert 1 <= int(words[words.index(module) + 1]) <= gpu_stages.TEST_WORKERS
            continue
        options = parsers[module.rpartition(".")[2]](words[words.index(module) + 1 :])
        if module != "benchmarks.gpu.exercise":
            written.append(options.json)
            assert (options.device, options.seconds, options.dtype) == ("cuda", 10, ["bfloat16"])
    assert len(set(written)) == len(written) >= 4
    assert {path.parent for path in written} == {tmp_path}


def test_graphs_are_for_a_gpu(capsys: pytest.CaptureFixture) -> None:
    for words in (["--kernels", "triton-graph"], ["--peers", "timm-eager-graph"]):
        with pytest.raises(SystemExit, match="2"):
            throughput.main(["--model", "crossvit_tiny_240", *words])
        assert f"argument {words[0]}" in capsys.readouterr().err


def test_exercise_calls_every_op_and_finds_what_is_not_finite(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["--device", "cpu", "--kernels", "reference", "--op", "cls_fusion,layer_norm_linear"]
    assert exercise.main(words) == 0
    assert "21 calls, 0 failed" in capsys.readouterr().out
    monkeypatch.setitem(
        exercise.VARIANTS, "layer_norm_linear", [{"activation": "gelu"}, {"activation": "no such thing"}]
    )
    assert exercise.main(words) == 1
    assert "no such thing" in capsys.readouterr().out


SHARDED = """
import os, pathlib, pytest
@pytest.mark.parametrize("number", range(40))
def test_number(number):
    with open("ran", "a") as file:
        file.write(f"{number}\\n")
    if number in (3, 11):
        os._exit(0)
    if number == 5:
        pytest.skip()
    assert number not in (7, 8), "why"
@pytest.fixture
def broken():
    raise ValueError
def test_error(broken):
    pass
"""


def run_in_shards(folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu.shards", *words, "-q", "-p", "no:cacheprovider", "test_it.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_shards_run_every_test_once_even_where_some_end_their_process(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(SHARDED)
    ended = run_in_shards(tmp_path, "3")
    ran = [int(number) for number in (tmp_path / "ran").read_text().split()]
    assert sorted(ran) == list(range(40))
    verdict, note = gpu_stages.by_pytest(ended.returncode, ended.stdout)
    assert ended.returncode == 1
    assert verdict == "failed"
    assert ended.stdout.splitlines()[-1].startswith("2 died, 1 error, 2 failed, 35 passed, 1 skipped in ")
    assert note.startswith("2 died, 1 error, 2 failed, 35 passed, 1 skipped")
    assert "FAILED test_it.py::test_number[7] " in ended.stdout


def test_exit_status_of_shards(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(SHARDED)
    passing = run_in_shards(tmp_path, "2", "-k", "12 or 22")
    assert (passing.returncode, gpu_stages.by_pytest(0, passing.stdout)[1][:8]) == (0, "2 passed")
    died = run_in_shards(tmp_path, "2", "-k", "11")
    assert (died.returncode, died.stdout.splitlines()[-1][:6]) == (1, "1 died")
    assert run_in_shards(tmp_path, "2", "-k", "none").returncode == 5
    (tmp_path / "test_it.py").write_text("import no_such_module")
    assert run_in_shards(tmp_path, "2").returncode not in (0, 5)


def test_a_shard_without_its_gpu_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plugin = shards.Plugin(None, 0, 1, str(tmp_path / "journal"))
    node = type("Node", (), {"nodeid": "test_x"})
    failure = type("Report", (), {"longreprtext": "why"})
    for lost in (None, "CUDA error: an illegal memory access was encountered"):
        monkeypatch.setattr(devices.DEVICES["cuda"], "lost", lambda lost=lost: lost, raising=False)
        plugin.pytest_exception_interact(node, failure)
    assert ended == [1]


MODEL_ROW = {
    "model": "crossvit_x",
    "batch": 32,
    "dtype": "bfloat16",
    "mode": "inference",
    "implementation": "timm-eager",
    "images_per_second": {"median": 1230.0, "min": 1200.0, "max": 1300.0},
    "rounds": 9,
    "device": "a GPU",
    "driver": "1.2",
    "threads": 1,
    "versions": {"torch": "2.11"},
}
OP_ROW = {"op": "patch_embed", "branch": "small", "batch": 32, "dtype": "bfloat16", "mode": "forward"}


def test_model_table() -> None:
    rows = [MODEL_ROW, {**MODEL_ROW, "implementation": "triton-graph", "images_per_second": {"median": 2460.0}}]
    head, line = report.models(rows).splitlines()[1:3]
    assert head.split() == ["batch", "dtype", "mode", "timm-eager", "triton-graph", "ratio"]
    assert line.split() == ["crossvit_x", "32", "bfloat16", "inference", "1230", "2460", "2.00"]
    assert report.models([]) == ""


def test_op_table() -> None:
    rows = [
        {**OP_ROW, "implementation": name, "microseconds": {"median": time}, "floor_microseconds": 5.0}
        for name, time in {"reference": 30.0, "triton": 10.0, "sdpa": 15.0}.items()
    ]
    rows.append({**rows[0], "batch": 1})
    lines = report.ops(rows).splitlines()
    assert lines[1].split() == ["branch", "mode", "dtype", "batch", "32", "batch", "1"]
    figures = "10.0 2.0 3.00 – 1.50 30.0 (ref) 6.0"
    assert lines[2].split() == f"patch_embed small forward bfloat16 {figures}".split()


def test_rows_of_one_cell_come_from_one_run() -> None:
    def run(*names: str) -> list[dict[str, Any]]:
        return [{**MODEL_ROW, "implementation": name, "rounds": 9 + len(names)} for name in names]

    other = [{**MODEL_ROW, "batch": 1}]
    assert report.merged([run("a", "b"), other, run("a", "c", "d"), run("a")]) == run("a", "c", "d") + other
