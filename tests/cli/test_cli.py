"""The command line as a whole: help, errors, `info` and `bench`."""

import errno
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import crossvit
import crossvit_kernels
from commands import CLASSES, command, photograph, save_small, small_model
from crossvit.cli.main import COMMANDS, main
from crossvit.system.files import replacing

ROOT = Path(__file__).resolve().parents[2]
HERE = [name for name in COMMANDS if (ROOT / "crossvit" / "cli" / f"{name}.py").is_file()]


def test_the_list_of_commands() -> None:
    done = command("--help")
    assert done.status == 0
    assert all(name in done.out for name in HERE)
    assert command().status == 2


@pytest.mark.parametrize("name", HERE)
def test_help_of_every_command(name: str) -> None:
    done = command(name, "--help")
    assert done.status == 0
    assert done.out.startswith(f"usage: crossvit {name} ")
    assert "--kernels" in done.out
    assert "--device" in done.out


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, crossvit.__main__ as m\ntry: m.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_version_is_one_line() -> None:
    done = command("--version")
    expected = f"crossvit-kernels {crossvit_kernels.__version__}, torch {torch.__version__}\n"
    assert (done.status, done.out, done.err) == (0, expected, "")


def test_the_package_has_its_names() -> None:
    assert set(crossvit.__all__) <= set(dir(crossvit))
    assert all(getattr(crossvit, name).__name__ == name for name in crossvit.__all__ if name != "FUSIONS")
    with pytest.raises(AttributeError, match="module 'crossvit' has no attribute 'paint'"):
        crossvit.paint  # noqa: B018


def test_as_a_program(tmp_path: Path) -> None:
    """python -m crossvit, with its exit status and its errors where they belong."""
    arguments = [sys.executable, "-m", "crossvit", "predict", "x.jpg", "--checkpoint", "nothing.pth"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("crossvit predict: error: no checkpoint nothing.pth")
    assert "Traceback" not in done.stderr


def test_the_console_script() -> None:
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("no source tree beside the tests")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"crossvit": f"{main.__module__}:{main.__name__}"}


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["paint"], "invalid choice: 'paint'"),
        (["--", "paint"], "invalid choice: 'paint'"),
        (
            ["bench", "crossvit_9_240"],
            "bench: error: unrecognized arguments: crossvit_9_240 (a model is named by --model)",
        ),
        (
            ["predict", "x.jpg", "--batchsize", "8"],
            "unrecognized arguments: --batchsize 8 (did you mean --batch-size?)",
        ),
        (
            ["predict", "x.jpg", "--model", "crossvit_9_240"],
            "--model crossvit_9_240 names no weights: expected --checkpoint",
        ),
        (["info", "crossvit_9_241"], "did you mean crossvit_9_240"),
        (["info", "nothing.pth"], "no checkpoint nothing.pth"),
        (["info", "crossvit_9_240", "--model", "crossvit_9_240"], "are two: expected one of them"),
        (["predict"], "the following arguments are required: IMAGE"),
        (["predict", "x.jpg"], "no model given: expected --checkpoint FILE"),
        (["bench"], "no model given: expected --checkpoint FILE or --model NAME"),
        (["bench", "--model", "crossvit_9_241"], "did you mean crossvit_9_240"),
        (["bench", "--model", "crossvit_9_240", "--image-size", "big"], "expected a side or HEIGHTxWIDTH"),
        (["bench", "--model", "crossvit_9_240", "--set", "fusion"], "expected NAME=VALUE, got 'fusion'"),
        (["bench", "--model", "crossvit_9_240", "--set", "fusion=x"], "fusion must be one of"),
        (["bench", "--model", "crossvit_9_240", "--set", "colour=red"], "has no argument colour"),
        (["bench", "--model", "crossvit_9_240", "--set", "image_size=9"], "has an option of its own, --image-size"),
        (
            ["bench", "--model", "crossvit_9_240", "--json", "/nowhere/x"],
            "--json /nowhere/x: there is no folder /nowhere",
        ),
        (["predict", "x.jpg", "--checkpoint", "x.pth", "--output", "/"], "--output must be a file, / is a folder"),
        (
            ["evaluate", "x", "--checkpoint", "x.pth", "--confusion", "/nowhere/x"],
            "--confusion /nowhere/x: there is no",
        ),
        (["bench", "--model", "crossvit_9_240", "--device", "toaster"], "--device toaster: "),
        (["bench", "--model", "crossvit_9_240", "--kernels", "fpga"], "argument --kernels: invalid choice: 'fpga'"),
        (["bench", "--model", "crossvit_9_240", "--batch", "0"], "expected positive integers"),
        (
            ["bench", "--model", "crossvit_9_240", "--peers", "none", "--set", "fusion=none"],
            "--peers times timm's models",
        ),
        (
            ["predict", "x.jpg", "--checkpoint", "x.pth", "--batch-size", "0"],
            "expected an integer of at least 1, got '0'",
        ),
    ],
)
def test_bad_arguments(arguments: list[str], reason: str) -> None:
    done = command(*arguments)
    assert done.status == 2
    assert reason in done.err
    assert "Traceback" not in done.err


def test_what_the_system_refuses_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, say: no traceback, status 1."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.json")

    monkeypatch.setattr("crossvit.cli.bench.write_text", full)
    given = ["--checkpoint", save_small(tmp_path), "--batch", "1", "--rounds", "1", "--json", tmp_path / "x.json"]
    done = command("bench", *given)
    assert (done.status, done.err) == (1, "crossvit bench: error: [Errno 28] No space left on device: 'x.json'\n")


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    """What load_checkpoint says is what the command says."""
    photograph("cat").save(tmp_path / "x.png")
    (tmp_path / "broken.safetensors").write_bytes(b"{")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    crossvit.save_checkpoint(small_model(), tmp_path / "bare.pth")
    for name, reason in (
        ("broken.safetensors", "is truncated, no checkpoint"),
        ("other.pth", "holds weights of some other kind of model"),
        ("bare.pth", "holds a model with embed_dim=(48, 96)"),
    ):
        done = command("predict", tmp_path / "x.png", "--checkpoint", tmp_path / name)
        assert done.status == 2
        assert reason in done.err
    given = ["--model", "crossvit_tiny_240", "--set", "embed_dim=[48,96]", "--set", "depth=[[1,1,0],[1,1,0]]"]
    done = command("predict", tmp_path / "x.png", "--checkpoint", tmp_path / "bare.pth", *given, "--image-size", "72")
    assert (done.status, done.err) == (0, "")


def test_a_head_of_other_classes_is_warned_of(tmp_path: Path) -> None:
    checkpoint = save_small(tmp_path)
    done = command("info", "--checkpoint", checkpoint, "--set", "num_classes=7")
    assert (
        done.err
        == f"warning: {checkpoint}: it has a head of 3 classes; the model's, of 7, starts from initial weights\n"
    )


def test_info(tmp_path: Path) -> None:
    done = command("info")
    assert done.status == 0
    assert "crossvit_15_dagger_240" in done.out
    assert "reference" in done.out
    checkpoint = save_small(tmp_path)
    done = command("info", "--checkpoint", checkpoint)
    assert done.status == 0
    assert str(small_model().describe()) in done.out
    assert ", ".join(CLASSES) in done.out
    found = json.loads(command("info", "--checkpoint", checkpoint, "--json").out)
    assert found["checkpoint"]["notes"]["classes"] == CLASSES
    assert found["checkpoint"]["parameters"] == found["model"]["parameters"] == small_model().describe().parameters
    found = json.loads(command("info", "--model", "crossvit_18_dagger_408", "--json").out)["model"]
    assert (found["parameters"], found["crop_ratio"]) == (44_606_560, 1.0)


def test_info_needs_no_option_for_what_it_is_about(tmp_path: Path) -> None:
    checkpoint = save_small(tmp_path)
    for plain, option in (("crossvit_tiny_240", "--model"), (checkpoint, "--checkpoint")):
        done = command("info", plain, "--device", "cpu")
        assert (done.status, done.err) == (0, "")
        assert done.out == command("info", option, plain, "--device", "cpu").out


@pytest.mark.parametrize("what", [[], ["crossvit_tiny_240"]], ids=["nothing", "a model"])
def test_kernels_that_are_not_here_are_refused(what: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the option's name, with the reason, whether or not a model is built; and those for another device."""
    monkeypatch.setattr("crossvit.cli.commands.backends.reason", lambda name: "it was not built")
    done = command("info", *what, "--kernels", "cuda", "--device", "cpu")
    assert (done.status, done.out) == (2, "")
    assert done.err == "crossvit info: error: --kernels cuda is not available: it was not built\n"
    monkeypatch.setattr("crossvit.cli.commands.backends.reason", lambda name: None)
    monkeypatch.setattr("crossvit.cli.commands.backends.devices", lambda name: ("cuda",))
    done = command("info", *what, "--kernels", "cuda", "--device", "cpu")
    assert done.status == 2
    assert "--kernels cuda takes tensors on cuda, the device is cpu" in done.err


def test_info_of_a_file_of_something_else(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2, 3)}, tmp_path / "x.pth")
    done = command("info", "--checkpoint", tmp_path / "x.pth")
    assert done.status == 0
    assert "weights of some other kind of model: 1 tensors of float32, 6 numbers" in done.out
    assert "no model is built of it" in done.out
    assert command("info", "--checkpoint", tmp_path / "y.pth").status == 2


def test_bench(tmp_path: Path) -> None:
    """Both are timed after their outputs agreed, and the figures written."""
    checkpoint, path = save_small(tmp_path), tmp_path / "x.json"
    done = command("bench", "--checkpoint", checkpoint, "--batch", "1,2", "--rounds", "1", "--json", path)
    assert (done.status, done.err) == (0, "")
    rows = json.loads(path.read_text())
    assert [(row["batch"], row["implementation"]) for row in rows] == [
        (batch, name) for batch in (1, 2) for name in ("reference", "auto")
    ]
    assert all(row["rounds"] == 1 and row["images_per_second"]["median"] > 0 for row in rows)


def test_bench_hands_on_to_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    throughput = pytest.importorskip("benchmarks.throughput")
    handed: list[list[str]] = []
    monkeypatch.setattr("crossvit.cli.bench.subprocess.call", lambda words: handed.append(words) or 3)
    done = command("bench", "--model", "crossvit_9_240", "--peers", "timm-eager", "--batch", "4", "--device", "cpu")
    assert done.status == 3
    assert handed[0][:3] == [sys.executable, "-m", "benchmarks.throughput"]
    assert throughput._parse(handed[0][3:]).batch == [4]
    assert throughput._parse(handed[0][3:]).peers == ["timm-eager"]
    monkeypatch.setitem(sys.modules, "benchmarks.throughput", None)
    done = command("bench", "--model", "crossvit_9_240", "--peers", "timm-eager")
    assert done.status == 2
    assert "--peers needs the repository's benchmarks" in done.err


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("before")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    with replacing(path) as temporary:
        temporary.write_text("after")
    assert path.read_text() == "after"
