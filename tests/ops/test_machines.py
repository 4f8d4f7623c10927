"""machines.py: a slice of it, and what it says of settings that fail, are not to be had, or are not there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import machines
from available import NATIVE
from crossvit_kernels import backends
from machines import Outcome, Setting

pytestmark = pytest.mark.skipif(not backends.available("cpu"), reason="there are no C++ kernels")


def test_a_slice(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Few tokens, sharp scores and few rows as on a machine with nothing but the baseline."""
    path, ops = tmp_path / "ratios.json", "linear_residual,cls_cross_attention"
    arguments = ["--quick", "--settings", "baseline", "--ops", ops, "--json", str(path)]
    assert machines.main(arguments) == 0
    ratios = json.loads(path.read_text())["nothing but the baseline, 3 threads"]
    assert {row[1] for row in ratios} == set(ops.split(","))
    assert {"[cpu-0-" in row[0] for row in ratios} == {True, False}  # the seeds
    assert len({row[5] for row in ratios}) > len(ratios) // 2
    assert max(row[5] for row in ratios) <= 1
    said = capsys.readouterr().out
    assert "nothing but the baseline, 3 threads" in said
    assert " 0 failed" in said


def test_what_fails_is_counted_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "test_patch_embed.py").write_text("def test_cpu(): pass\ndef test_cpu_too(): assert 1 > 2, 'no more'\n")
    monkeypatch.setattr(machines, "HERE", tmp_path)
    monkeypatch.setattr(machines, "QUICK", [Setting("some"), Setting("none", tests="nowhere")])
    assert machines.main(["--quick", "--ops", "patch_embed"]) == 1
    said = capsys.readouterr().out
    assert "some: 1 failed" in said
    assert "no more" in said
    assert "none: 1 failed" in said  # where no test ran
    assert "1 passed, 2 failed" in said


def test_what_a_machine_lacks_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(machines, "QUICK", [Setting("another CPU", lacking=machines.not_set("sse9"))])
    assert machines.main(["--quick"]) == 0
    assert re.search(r"another CPU +skipped: .*'sse9' was not compiled in", capsys.readouterr().out)


def test_kernels_for_a_gpu_run_without_one() -> None:
    """By itself, where nobody has set the interpreter and the emulation up."""
    environment = {n: v for n, v in os.environ.items() if n not in ("TRITON_INTERPRET", "CROSSVIT_KERNELS_EMULATE")}
    code = "import machines as m; print([s.lacking() for s in m.SETTINGS if s.name.endswith('kernels')])"
    command = [sys.executable, "-c", code]
    path = os.pathsep.join([str(Path(machines.__file__).parent), str(machines.ROOT)])
    done = subprocess.run(command, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(
        [None if name in NATIVE else backends.reason(name) for name in ("cuda", "triton")]
    )


def test_the_table() -> None:
    rows = [("t.py::test_x[cpu]", "op", "cpu", "float32", "out", ratio / 100) for ratio in range(100)]
    outcomes = {"one": Outcome(100, 0, "", rows)}
    said = machines.table(outcomes, {"two": "not here"}, [Setting("one"), Setting("two"), Setting("three")])
    one, two, three = said.splitlines()[2:5]
    assert one.split()[:4] == ["one", "100", "0", "0.99"]
    assert one.endswith("out of test_x[cpu]")
    assert two.split() == ["two", "skipped:", "not", "here"]
    assert three.split() == ["three", "did", "not", "end"]
    assert said.splitlines()[-1].split() == ["op", "cpu", "float32", "100", "0.49", "0.99", "0.99"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--workers", "-1"], "--workers: expected at least 1, got -1"),
        (["--ops", "x"], "--ops: unknown x, expected of layer"),
        (["--settings", "x86"], "--settings: none of as it is, .* contains 'x86'"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        machines.main(arguments)
    assert re.search(message, capsys.readouterr().err)
