"""Disks that are full, folders that take no files, outputs that are no files: one line, and nothing computed is lost.

A full disk is a limit on the size of files, which holds for any user; a folder without files is one in /proc.
"""

import errno
import io
import json
import os
import resource
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from commands import command, photographs_by_class, save_small
from crossvit.system.files import replacing, write_text
from training_runs import make_images, one_thread, train  # noqa: F401  one_thread is for every test here
from untidy import picture

FULL = "File too large"  # the words of the system for it
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("weights"))


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file grows past `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_evaluate_keeps_what_it_counted(checkpoint: Path, tmp_path: Path) -> None:
    """The table is printed, and of the two files the one that fits is written."""
    data = photographs_by_class(tmp_path / "data")
    drawn, found = tmp_path / "x.png", tmp_path / "x.json"
    found.write_text("before")
    given = ("--checkpoint", checkpoint, "--confusion", drawn, "--json", found, "--workers", "0")
    with full_disk(3000):
        done = command("evaluate", data, *given)
    assert (done.status, done.err) == (1, f"crossvit evaluate: error: [Errno 27] {FULL}: '{drawn}'\n")
    assert "on 7 images" in done.out
    assert json.loads(found.read_text())["images"] == 7
    with full_disk(10):
        done = command("evaluate", data, *given)
    assert (done.status, done.err.count("\n"), done.err.count(FULL)) == (1, 2, 2)
    assert "on 7 images" in done.out
    assert json.loads(found.read_text())["images"] == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "x.json"]


@pytest.mark.parametrize("form", ["table", "json"])
def test_predict_prints_what_it_cannot_write(form: str, checkpoint: Path, tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    given = ("--checkpoint", checkpoint, "--format", form, "--output", tmp_path / "out", "--workers", "0")
    with full_disk(10):
        done = command("predict", path, *given)
    assert (done.status, done.err) == (1, f"crossvit predict: error: [Errno 27] {FULL}: '{tmp_path / 'out'}'\n")
    assert f"{path}" in done.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, MemoryError])
def test_predict_keeps_what_it_found(
    interrupt: type[BaseException], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Ctrl-C, or what else ends it."""
    from crossvit.cli import predict

    best, calls = predict.best, 0

    def interrupted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise interrupt
        return best(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(predict, "best", interrupted)
    files = [picture(tmp_path / f"{k}.png", k) for k in range(4)]
    given = ("--checkpoint", checkpoint, "--format", "json", "--batch-size", "1", "--workers", "0")
    done = command("predict", *files, *given)
    assert done.status == (130 if interrupt is KeyboardInterrupt else 1)
    assert done.err == ("interrupted\n" if done.status == 130 else "crossvit predict: error: not enough memory\n")
    assert [row["file"] for row in json.loads(done.out)] == [str(file) for file in files[:2]]


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x.pt2"])
def test_export_on_a_full_disk(name: str, checkpoint: Path, tmp_path: Path) -> None:
    """torch's and safetensors' writers have errors of their own, which say no file and no reason."""
    path = tmp_path / name
    with full_disk(20_000):
        done = command("export", path, "--checkpoint", checkpoint, "--fixed-batch", "1")
    assert (done.status, done.err) == (1, f"crossvit export: error: [Errno 27] {FULL}: '{path}'\n")
    assert not list(tmp_path.iterdir())


def test_train_on_a_full_disk(tmp_path: Path) -> None:
    """It ends with a line; what was saved before is kept and can be gone on from."""
    data, out = make_images(tmp_path / "data", train=12, val=3), tmp_path / "run"
    with full_disk(20_000):
        status, printed = train(data, out, "--epochs", "1", "--batch-size", "4")
    assert status == 1
    assert printed.splitlines()[-1] == f"crossvit train: error: [Errno 27] {FULL}: '{out / 'best.pth'}'"
    assert "Traceback" not in printed
    assert not list(out.glob("*.pth"))
    assert not list(out.glob(".*"))
    status, printed = train(data, tmp_path / "second", "--epochs", "1", "--batch-size", "4")
    assert status == 0, printed
    with full_disk(20_000):
        status, printed = train(
            data, tmp_path / "second", "--epochs", "2", "--batch-size", "4", "--resume", "auto", "--log-every", "1"
        )
    last = tmp_path / "second" / "last.pth"
    assert (status, f"what was saved is kept; go on with --resume {last}" in printed) == (1, True), printed
    assert torch.load(last, weights_only=True)["position"]["epoch"] == 1


def test_a_full_disk_under_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written to again when it is closed."""
    monkeypatch.setattr("crossvit.cli.train_setup.write_text", lambda *_: None)  # args.yaml is longer than the log
    data, out = make_images(tmp_path / "data", train=12, val=0), tmp_path / "run"
    with full_disk(50):
        status, printed = train(data, out, "--epochs", "1", "--batch-size", "2", "--log-every", "1")
    assert (status, "Traceback" in printed) == (1, False), printed
    assert printed.splitlines()[-1] == f"crossvit train: error: [Errno 27] {FULL}: '{out / 'metrics.jsonl'}'"


def test_a_picture_of_the_curves_is_not_worth_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "curves.png")

    monkeypatch.setattr("crossvit.training.loop.draw_curves", full)
    data = make_images(tmp_path / "data", train=12, val=3)
    status, printed = train(data, tmp_path / "run", "--epochs", "1", "--batch-size", "4")
    assert (status, "the curves could not be drawn: [Errno 28]" in printed) == (0, True), printed
    assert (tmp_path / "run" / "last.pth").exists()


@pytest.mark.parametrize("where", ["/proc/x", "file/x", "/proc/self/x"])
def test_folders_that_take_no_files(where: str, checkpoint: Path, tmp_path: Path) -> None:
    """Said before anything is computed, by every command that writes, naming the argument."""
    (tmp_path / "file").touch()
    path = tmp_path / where if where.startswith("file") else Path(where)
    data = photographs_by_class(tmp_path / "data", ("cat", "coffee", "camera"))
    one, shared = picture(tmp_path / "a.png"), ("--checkpoint", checkpoint)
    for option, arguments in {
        "--output": ["predict", one, *shared, "--output", path],
        "--json": ["evaluate", data, *shared, "--json", path],
        "--confusion": ["evaluate", data, *shared, "--confusion", path],
        "FILE": ["export", path.with_suffix(".pth"), *shared],
        "--output ": ["explain", one, *shared, "--output", path],
        "--out": ["train", make_images(tmp_path / "images", 6, 3), "--out", path, "--model", "crossvit_tiny_240"],
    }.items():
        done = command(*arguments)
        assert (done.status, done.out, done.err.count("\n")) == (2, "", 1), (option, done)
        assert f"{option.strip()} {path.with_suffix('.pth') if option == 'FILE' else path}: " in done.err


@needs_full
@pytest.mark.parametrize("arguments", [["info"], ["--help"], ["predict", "--help"]])
def test_standard_output_on_a_full_disk(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    err = io.StringIO()
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", err)
        from crossvit.cli.main import main

        try:
            status = main(arguments)
        except SystemExit as ended:
            status = int(ended.code or 0)
    assert status == 1
    assert err.getvalue().endswith("error: [Errno 28] No space left on device: 'standard output'\n")
    assert err.getvalue().count("\n") == 1


@needs_full
def test_devices_are_written_to_and_not_replaced(checkpoint: Path, tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    for device, status in (("/dev/null", 0), ("/dev/full", 1)):
        done = command("predict", path, "--checkpoint", checkpoint, "--output", device, "--workers", "0")
        assert done.status == status
        assert stat.S_ISCHR(os.stat(device).st_mode)
    assert done.err == "crossvit predict: error: [Errno 28] No space left on device: '/dev/full'\n"
    assert str(path) in done.out


def test_pipes_and_links_are_written_to_and_not_replaced(tmp_path: Path) -> None:
    os.symlink(tmp_path / "file", tmp_path / "link")
    for text in ("one", "two"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "file").read_text() == text
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(tmp_path / "pipe", "through")
        assert os.read(reader, 100) == b"through"
        assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    finally:
        os.close(reader)
    with pytest.raises(OSError, match="No such device or address"):  # nobody reads it, and nobody is waited for
        write_text(tmp_path / "pipe", "through")


def test_names_as_long_as_they_can_be_are_written(tmp_path: Path) -> None:
    """The temporary name beside them is shorter."""
    for name in ("n" * 255, "ü" * 127):
        write_text(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"
    with pytest.raises(OSError, match="File name too long"), replacing(tmp_path / ("n" * 256)) as temporary:
        temporary.write_text("x")
    assert len(list(tmp_path.iterdir())) == 2
