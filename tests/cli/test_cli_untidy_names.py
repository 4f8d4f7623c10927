"""Names that are no UTF-8 or no single line, outputs of small encodings, byte order marks, outputs that close."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from commands import command, save_small
from crossvit.cli.main import main
from crossvit.system.text import printable, to_json
from untidy import LATIN1, classes, picture

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="the file system has no such names")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("weights"))


@contextmanager
def standard_output(encoding: str) -> Iterator[io.BytesIO]:
    """Both outputs, strict in an encoding as a pipe's would be."""
    out, before = io.BytesIO(), (sys.stdout, sys.stderr)
    sys.stdout = io.TextIOWrapper(out, encoding=encoding, write_through=True)
    sys.stderr = io.TextIOWrapper(out, encoding=encoding, write_through=True)
    try:
        yield out
    finally:
        sys.stdout.detach()
        sys.stderr.detach()
        sys.stdout, sys.stderr = before


def run(encoding: str, *arguments: str | Path) -> tuple[int, str]:
    with standard_output(encoding) as out:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            status = int(ended.code or 0)
        return status, out.getvalue().decode(encoding)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("plain é †.png", "plain é †.png"),
        (os.fsdecode(b"caf\xe9.png"), "caf\\xe9.png"),
        ("a\nb\x1b[31m\r.png", "a\\nb\\x1b[31m\\r.png"),
        ("a\u2028b\ud800", "a\\u2028b\\ud800"),
        (Path("x/y"), "x/y"),
    ],
)
def test_names_in_one_line(name: str | Path, expected: str) -> None:
    assert printable(name) == expected
    printable(name).encode()


def test_json_that_every_reader_takes() -> None:
    value: Any = {LATIN1: [float("nan"), float("inf"), 1.5, ("ü", LATIN1)]}
    assert json.loads(to_json(value), parse_constant=pytest.fail) == {"caf\\xe9": [None, None, 1.5, ["ü", "caf\\xe9"]]}


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
@pytest.mark.parametrize("form", ["table", "json"])
def test_predict_of_names_that_are_no_text(form: str, encoding: str, checkpoint: Path, tmp_path: Path) -> None:
    """Each picture is classified, whatever it is called, and whatever the output can show; one line each."""
    for name in (f"{LATIN1}.png", "two\nlines.png", "größe.png"):
        picture(tmp_path / name)
    (tmp_path / f"{LATIN1}.txt").write_text("no picture")
    status, printed = run(encoding, "predict", tmp_path, "--checkpoint", checkpoint, "--format", form, "--workers", "0")
    assert status == 1
    assert "1 of 4 files could not be read" in printed
    assert f"{tmp_path}/caf\\xe9.txt  error: no image" in printed
    if form == "json":
        rows = json.loads(printed[: printed.rindex("]") + 1])
        names = [row["file"].removeprefix(f"{tmp_path}/") for row in rows]
        assert sorted(names) == sorted(["caf\\xe9.png", "caf\\xe9.txt", "two\nlines.png", "größe.png"])
    else:
        assert len(printed.splitlines()) == 5
        assert "caf\\xe9.png  " in printed
        assert "two\\nlines.png  " in printed
        assert f"gr{'öß' if encoding != 'ascii' else 'xx'}e.png  ".replace("xx", "\\xf6\\xdf") in printed


def test_classes_whose_names_are_no_text(checkpoint: Path, tmp_path: Path) -> None:
    """Evaluated, drawn, written into a checkpoint, described and explained."""
    root = classes(tmp_path / "data", LATIN1, "b\nc", "ü")
    names = tmp_path / "names.json"
    names.write_text(json.dumps(sorted([LATIN1, "b\nc", "ü"])))
    given = ["--checkpoint", checkpoint, "--classes", names, "--device", "cpu"]
    found, drawn = tmp_path / "found.json", tmp_path / f"{LATIN1}.png"
    status, printed = run("ascii", "evaluate", root, *given, "--json", found, "--confusion", drawn, "--workers", "0")
    assert (status, "6 images" in printed) == (0, True), printed
    assert set(json.loads(found.read_bytes().decode("utf-8"))["classes"]) == {"caf\\xe9", "b\nc", "ü"}
    assert np.asarray(Image.open(drawn).convert("L")).std() > 5
    exported = tmp_path / f"weights-{LATIN1}.pth"
    assert run("utf-8", "export", exported, *given)[0] == 0
    named = tmp_path / "named.safetensors"
    assert run("utf-8", "export", named, *given)[0] == 0
    for encoding in ("utf-8", "ascii"):
        status, printed = run(encoding, "info", "--checkpoint", named)
        assert (status, "b\\nc, caf\\xe9" in printed) == (0, True), printed
        status, printed = run(encoding, "info", "--checkpoint", named, "--json")
        assert json.loads(printed)["model"]["classes"] == ["b\nc", "caf\\xe9", "ü"]
    out = tmp_path / LATIN1
    pictures = root / LATIN1
    status, printed = run("utf-8", "explain", pictures, "--checkpoint", named, "--output", out, "--workers", "0")
    assert (status, printed.splitlines()) == (0, [f"{tmp_path}/caf\\xe9/{k}.png" for k in (0, 1)])


def test_explain_of_names_that_are_no_text_or_as_long_as_they_can_be(checkpoint: Path, tmp_path: Path) -> None:
    names = [f"{LATIN1}.png", "ü" * 125 + ".png", "n" * 251 + ".png"]
    for name in names:
        picture(tmp_path / "pictures" / name)
    out = tmp_path / "out"
    given = ("--checkpoint", checkpoint, "--output", out, "--workers", "0")
    status, printed = run("utf-8", "explain", tmp_path / "pictures", *given)
    assert (status, len(printed.splitlines())) == (0, 3), printed
    assert sorted(path.name[:3] for path in out.iterdir()) == sorted(["caf", "üüü", "nnn"])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_help_and_tables_in_small_encodings(encoding: str, checkpoint: Path) -> None:
    """What is printed beyond ASCII becomes plain letters."""
    for arguments in (["--help"], ["train", "--help"], ["info", "--model", "crossvit_15_dagger_240"]):
        status, printed = run(encoding, *arguments)
        assert (status, "\\u" in printed) == (0, False), printed
    assert "torchrun --nproc-per-node 8 -m crossvit train ...." in " ".join(run(encoding, "train", "--help")[1].split())
    assert run("ascii", "info", "--checkpoint", checkpoint)[1].count("72x72") > 0


def test_byte_order_marks(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of --classes, as text and JSON, and of paths from standard input, which may be any bytes."""
    picture(tmp_path / "a.png")
    picture(tmp_path / f"{LATIN1}.png")
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\n\r\ncow\r\n")
    (tmp_path / "names.json").write_bytes(b'\xef\xbb\xbf["cat", "dog", "cow"]')
    for names in ("names.txt", "names.json"):
        lines = b"\xef\xbb\xbf" + bytes(tmp_path) + b"/a.png\r\n\n" + bytes(tmp_path) + b"/caf\xe9.png\n"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
        given = ("--checkpoint", checkpoint, "--classes", tmp_path / names, "--format", "json", "--workers", "0")
        done = command("predict", "-", *given)
        assert (done.status, done.err) == (0, "")
        rows = json.loads(done.out)
        assert [row["file"] for row in rows] == [f"{tmp_path}/a.png", f"{tmp_path}/caf\\xe9.png"]
        assert {answer["class"] for answer in rows[0]["predictions"]} == {"cat", "dog", "cow"}


def test_standard_input_that_is_closed_or_odd(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    done = command("predict", "-", "--checkpoint", checkpoint)
    assert (done.status, done.err.count("\n"), "standard input, which is closed" in done.err) == (2, 1, True)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"no\0where.png\n"), encoding="utf-8"))
    done = command("predict", "-", "--checkpoint", checkpoint)
    assert (done.status, "no\\x00where.png  error: no file can have this name here" in done.err) == (1, True)


def program(*arguments: str | Path, **settings: Any) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | settings.pop("env", {})
    line = [sys.executable, "-m", "crossvit", *map(str, arguments)]
    return subprocess.run(line, env=environment, stderr=subprocess.PIPE, check=False, **settings)


def test_in_the_c_locale(checkpoint: Path, tmp_path: Path) -> None:
    """Where Python takes names and outputs for ASCII."""
    picture(tmp_path / "größe.png")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    given = ("--checkpoint", checkpoint, "--device", "cpu", "--workers", "0")
    done = program("predict", tmp_path, *given, env=plain, stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert f"{tmp_path}/gr".encode() in done.stdout
    done = program(
        "info", "--model", "crossvit_15_dagger_240", env={"PYTHONIOENCODING": "ascii"}, stdout=subprocess.PIPE
    )
    assert (done.returncode, done.stderr, b"224x224" in done.stdout) == (0, b"", True)


def test_a_reader_that_has_enough(tmp_path: Path) -> None:
    """`| head -1`: no word, and the status that shells give it; also of help."""
    for arguments in (["info"], ["train", "--help"]):
        read, write = os.pipe()
        os.close(read)
        with open(write, "wb") as closed:
            done = program(*arguments, stdout=closed)
        assert (done.returncode, done.stderr) == (141, b""), arguments
