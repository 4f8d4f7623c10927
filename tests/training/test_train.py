"""`crossvit train` through its command line: it learns, stops, goes on to the bit, in one process or several."""

import contextlib
import json
import multiprocessing
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import crossvit
import training_runs
from crossvit.system.files import remove_unfinished
from crossvit.training import files, loop
from training_runs import TINY, train

# Everything random and everything with a state of its own
EVERYTHING = """--mixup 0.8 --cutmix 1 --auto-augment rand-m9-mstd0.5-inc1 --erasing 0.25 --repeats 3 --drop 0.1
    --drop-path 0.2 --ema 0.9 --clip-grad 1 --accumulate 2 --label-smoothing 0.1 --precision bfloat16
    --checkpoint-every 2""".split()  # noqa: SIM905  as it is typed
NOTHING = """--no-augment --drop-path 0 --no-shuffle --label-smoothing 0 --lr 1e-3 --epochs 2
    --log-every 1""".split()  # noqa: SIM905
REPOSITORY = Path(__file__).resolve().parents[2]

one_thread, data = training_runs.one_thread, training_runs.data  # fixtures


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with everything, from beginning to end."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    status, printed = train(data, out, *EVERYTHING)
    assert status == 0, printed
    assert "epoch 2/2  loss" in printed
    return out


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Equal to the bit, through dicts and sequences."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for k in range(len(expected)):
            assert_same(found[k], expected[k], f"{where}[{k}]")
    else:
        assert found == expected, where


def assert_same_run(found: Path, expected: Path) -> None:
    """The same checkpoints and metrics, and nothing half written."""
    for name in ("last.pth", "best.pth"):
        contents = [torch.load(folder / name, weights_only=True) for folder in (found, expected)]
        assert_same(*contents, name)
    assert (found / "metrics.jsonl").read_text() == (expected / "metrics.jsonl").read_text()
    assert [path.name for path in found.iterdir() if path.name.startswith(".")] == []


def test_a_run(undisturbed: Path) -> None:
    """What it leaves: a log, a picture of the curves, the best weights as a model."""
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [2, 3, 4, 6]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in evaluations] == [3, 6]
    with Image.open(undisturbed / "curves.png") as image:
        assert min(image.size) > 200
        assert len(image.convert("L").getcolors() or ()) > 10
    model, notes = crossvit.load_model(undisturbed / "best.pth")
    assert notes["classes"] == ["class0", "class1", "class2"]
    assert notes["crop_ratio"] == 0.875
    assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 3)
    best = torch.load(undisturbed / "best.pth", weights_only=True)
    assert best["metrics"]["top1"] == max(line["top1"] for line in evaluations)


# Forks before torch has threads: importing it takes longest.
KILLED = """
import os, signal, sys
from crossvit.cli.train import main
from crossvit.training.loop import Trainer
step = Trainer._step
for last in map(int, sys.argv[1].split(",")):
    def killed(self, batches):
        if self.run.position.steps == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batches)
    child = os.fork()
    if not child:
        Trainer._step = killed
        os._exit(main(sys.argv[2:]))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != -signal.SIGKILL:
        sys.exit(f"status {status} instead of a kill at step {last}")
"""


def test_kills_change_nothing(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL before the first checkpoint and within both epochs, with workers reading ahead, and resumed each time, at
    last without them: the same weights, averages, optimizer, generators and log."""
    out = tmp_path / "run"
    arguments = [str(data), "--out", str(out), *TINY, *EVERYTHING, "--workers", "2", "--resume", "auto"]
    command = [sys.executable, "-c", KILLED, "0,2,5", *arguments]
    # No pipe: a reading worker whose parent is killed while it starts never learns of it, and would hold it open.
    with (tmp_path / "output").open("w+") as output:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment(), stdout=output, stderr=output, start_new_session=True
        )
        try:
            status = process.wait(timeout=300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert status == 0, (tmp_path / "output").read_text()
    assert torch.load(out / "last.pth", weights_only=True)["position"]["steps"] == 4
    status, printed = train(data, out, *EVERYTHING, "--resume", "auto")
    assert status == 0, printed
    assert "at step 4" in printed
    assert_same_run(out, undisturbed)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_saves(
    data: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    """Ctrl-C ends the step at hand and saves; resumed it is the undisturbed run."""
    step = loop.Trainer._step

    def interrupted(self: loop.Trainer, batches: Any) -> float:
        if self.run.position.steps == 4:
            signal.raise_signal(number)
        return step(self, batches)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", interrupted)
        found, printed = train(data, out, *EVERYTHING)
    assert found == status
    assert f"go on with --resume {out / 'last.pth'}" in printed
    assert torch.load(out / "last.pth", weights_only=True)["position"]["steps"] == 5
    assert train(data, out, *EVERYTHING, "--resume", str(out / "last.pth"))[0] == 0
    assert_same_run(out, undisturbed)


def test_a_signal_to_all_its_processes_stops_a_run(data: Path, tmp_path: Path) -> None:
    """As a batch system sends it, and a terminal Ctrl-C: the workers leave it to their parent, which saves and ends."""
    out = tmp_path / "run"
    arguments = [str(data), "--out", str(out), *TINY, "--workers", "2", "--epochs", "10000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "crossvit", "train", *arguments],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        while not (line := process.stdout.readline()).startswith("epoch 1/"):
            assert line, process.communicate()[1]
        os.killpg(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143, said
    assert said.splitlines()[-1] == f"stopped; go on with --resume {out / 'last.pth'}"
    assert "Traceback" not in said
    assert torch.load(out / "last.pth", weights_only=True)["position"]["steps"] >= 3


WEIGHTS = torch.arange(1 << 18)


def _write_for_ever(path: Path) -> None:
    """In a forked process, which computes nothing with torch: its threads are not there."""
    for k in range(1 << 30):
        files.save({"position": {}, "weights": WEIGHTS, "number": k}, path)


def test_kills_leave_no_half_written_file(tmp_path: Path) -> None:
    """Fifty processes killed while they write one checkpoint after another: what bears the name is always whole."""
    context = multiprocessing.get_context("fork")
    deadline = time.monotonic() + 60
    path, pause = tmp_path / "last.pth", random.Random(0)
    for _ in range(50):
        writer = context.Process(target=_write_for_ever, args=(path,))
        writer.start()
        before = path.stat().st_ino if path.exists() else None
        while not path.exists() or path.stat().st_ino == before:  # it has begun
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(pause.random() * 0.02)
        writer.kill()
        writer.join()
        assert torch.equal(files.load(path)["weights"], WEIGHTS)
    assert len(list(tmp_path.glob(".last.pth.*"))) > 1  # what was being written when the kill came
    remove_unfinished(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pth"]


def test_an_error_while_writing_leaves_the_file_before(tmp_path: Path) -> None:
    files.save({"position": 1}, tmp_path / "last.pth")
    with pytest.raises((AttributeError, pickle.PicklingError)):
        files.save({"position": 2, "weights": WEIGHTS, "function": lambda: 0}, tmp_path / "last.pth")
    assert files.load(tmp_path / "last.pth") == {"position": 1}
    assert len(list(tmp_path.iterdir())) == 1


def environment(**values: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"} | {
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests' / 'support'}",
        "OMP_NUM_THREADS": "1",
        **values,
    }


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, and that no connection is given meanwhile: the system hands out those above."""
    found = []
    for port in range(20000 + os.getpid() % 8000, 32768):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_are_one(data: Path, tmp_path: Path) -> None:
    """DDP and FSDP2 over two processes have the loss curve of one with the same batch, the same evaluation (of 7
    images) and the same weights, with nothing random; with everything random a run repeats itself; and what FSDP2 wrote
    goes on in one process."""
    runs = {
        "ddp": ["--strategy", "ddp", *NOTHING],
        "fsdp": ["--strategy", "fsdp", *NOTHING, "--accumulate", "2", "--clip-grad", "1e6"],
        "random": ["--strategy", "fsdp", *EVERYTHING, "--batch-size", "12", "--epochs", "1"],
        "again": ["--strategy", "fsdp", *EVERYTHING, "--batch-size", "12", "--epochs", "1"],
    }
    script = (
        "import json, os, sys\n"
        "from pathlib import Path\n"
        "from training_runs import train\n"
        "data, folder, plan = sys.argv[1:]\n"
        "for name, (port, options) in json.loads(plan).items():\n"
        "    os.environ['MASTER_PORT'] = str(port)\n"
        "    status, printed = train(Path(data), Path(folder) / name, *options)\n"
        "    if status: sys.exit(printed)\n"
    )
    ports = free_ports(len(runs))
    plan = json.dumps({name: (port, options) for port, (name, options) in zip(ports, runs.items(), strict=True)})
    group = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(data), str(tmp_path), plan],
            cwd=REPOSITORY,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **group),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert train(data, tmp_path / "one", *NOTHING)[0] == 0
    for process in processes:
        _, printed = process.communicate(timeout=300)
        assert process.returncode == 0, printed
    for name in ("one", "fsdp"):
        assert train(data, tmp_path / name, *NOTHING, "--epochs", "3", "--resume", "auto")[0] == 0
    expected = read_log(tmp_path / "one")
    weights = torch.load(tmp_path / "one" / "last.pth", weights_only=True)["model"]
    assert len(expected) == 12
    for name in ("ddp", "fsdp"):
        for found, wanted in zip(read_log(tmp_path / name), expected[: 8 if name == "ddp" else 12], strict=True):
            assert found.pop("kind") == wanted["kind"]
            assert found == pytest.approx({k: v for k, v in wanted.items() if k != "kind"}, rel=2e-5), name
    found = torch.load(tmp_path / "fsdp" / "last.pth", weights_only=True)["model"]
    assert max((found[key] - weights[key]).abs().max().item() for key in weights) < 1e-4
    assert_same_run(tmp_path / "random", tmp_path / "again")
