"""`crossvit predict`: odd files are classified, broken ones named, and the rest goes on."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import crossvit
from commands import CLASSES, command, photograph, save_small
from crossvit.data.images import load_image
from crossvit.data.transforms import evaluation_transform

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def cat() -> Image.Image:
    picture = photograph("cat")
    picture.thumbnail((160, 160))
    return picture


def huge_png(path: Path) -> None:
    """A picture of 30,000 × 30,000 pixels in a few bytes: its header."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 90_001)))


def odd_files(folder: Path, cat: Image.Image) -> list[str]:
    """Pictures of all kinds that can be read; their names."""
    grey = np.asarray(cat.convert("L"))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    alpha = cat.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(cat.size))
    cat.save(folder / "plain.jpg")
    cat.save(folder / "plain.png")
    cat.save(folder / "rotated.jpg", exif=rotated)
    cat.save(folder / "progressive.jpg", progressive=True)
    cat.convert("CMYK").save(folder / "cmyk.jpg")
    cat.convert("L").save(folder / "grey.png")
    cat.convert("LA").save(folder / "grey-alpha.png")
    cat.convert("1").save(folder / "two-colours.png")
    cat.convert("P").save(folder / "palette.png")
    cat.convert("P").save(folder / "transparent.gif", transparency=0)
    cat.save(folder / "animated.gif", save_all=True, append_images=[cat.rotate(90)])
    alpha.save(folder / "alpha.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "sixteen-bit.png")
    Image.fromarray(grey.astype(np.float32) / 255).save(folder / "float.tiff")
    cat.save(folder / "lossless.webp", lossless=True)
    cat.save(folder / "bitmap.bmp")
    cat.resize((1, 1)).save(folder / "one-pixel.png")
    cat.resize((400, 3)).save(folder / "flat.png")
    cat.save(folder / "no-suffix", format="PNG")
    cat.save(folder / "really-a-png.jpg", format="PNG")
    (folder / "déjà vu").mkdir()
    cat.save(folder / "déjà vu" / "ünï cødé.jpg")
    return [str(path) for path in folder.rglob("*") if path.is_file()]


def broken_files(folder: Path, cat: Image.Image) -> dict[str, str]:
    """Files that cannot be read, and a word of the reason for each."""
    whole = io.BytesIO()
    cat.save(whole, format="JPEG")
    picture = io.BytesIO()
    cat.save(picture, format="PNG")
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("not a picture")
    (folder / "truncated.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (folder / "truncated.png").write_bytes(picture.getvalue()[: len(picture.getvalue()) // 2])
    (folder / "header.gif").write_bytes(b"GIF89a")
    (folder / "zeros.png").write_bytes(bytes(1000))
    (folder / "notes.txt").write_text("a folder may hold anything")
    huge_png(folder / "huge.png")
    os.symlink("nowhere.png", folder / "dangling.png")
    reasons = {
        "empty.jpg": "empty",
        "text.jpg": "no image",
        "truncated.jpg": "truncated",
        "truncated.png": "truncated",
        "header.gif": "",
        "zeros.png": "no image",
        "notes.txt": "no image",
        "huge.png": "900,000,000 pixels",
        "dangling.png": "No such file",
    }
    return {str(folder / name): reason for name, reason in reasons.items()}


@pytest.mark.parametrize("output", ["json", "table"])
def test_a_folder_of_odd_and_broken_files(output: str, checkpoint: Path, cat: Image.Image, tmp_path: Path) -> None:
    """30 files: every good one is classified, every bad one named with the reason, and the exit status is 1."""
    good, bad = odd_files(tmp_path, cat), broken_files(tmp_path, cat)
    assert len(good) + len(bad) == 30
    done = command("predict", tmp_path, "--checkpoint", checkpoint, "--format", output, "--batch-size", "8")
    assert done.status == 1
    assert "9 of 30 files could not be read" in done.err
    if output == "table":
        assert len(done.out.splitlines()) == 21
        for name in good:
            assert f"{name}  " in done.out
    else:
        rows = {row["file"]: row for row in json.loads(done.out)}
        assert rows.keys() == {*good, *bad}
        for name in good:
            answers = rows[name]["predictions"]
            assert {answer["class"] for answer in answers} == set(CLASSES)
            assert sum(answer["probability"] for answer in answers) == pytest.approx(1)
        for name, reason in bad.items():
            assert rows[name].keys() == {"file", "error"}
            assert reason in rows[name]["error"]
    for name, reason in bad.items():
        (line,) = [line for line in done.err.splitlines() if line.startswith(f"{name}  error: ")]
        assert reason in line


def test_the_probabilities_are_the_models(checkpoint: Path, cat: Image.Image, tmp_path: Path) -> None:
    """The same picture by hand gives the same; in the order asked for, whatever the batches."""
    names = [str(tmp_path / f"{i}.png") for i in (3, 1, 2)]
    for turn, name in enumerate(names):
        cat.rotate(90 * turn).save(name)
    arguments = ("--checkpoint", checkpoint, "--format", "json", "--top", 2, "--batch-size", 2, "--workers", 0)
    done = command("predict", *names, *arguments)
    assert done.status == 0
    assert not done.err
    model, notes = crossvit.load_model(checkpoint)
    images = torch.stack([evaluation_transform(72)(load_image(name)) for name in names])
    with torch.inference_mode():
        values, indices = model.eval()(images).softmax(dim=1).topk(2)
    rows = json.loads(done.out)
    assert [row["file"] for row in rows] == names
    for row, own, which in zip(rows, values, indices.tolist()):
        assert [answer["index"] for answer in row["predictions"]] == which
        assert [answer["class"] for answer in row["predictions"]] == [notes["classes"][i] for i in which]
        found = torch.tensor([answer["probability"] for answer in row["predictions"]])
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-6)


def test_several_labels(checkpoint: Path, cat: Image.Image, tmp_path: Path) -> None:
    """A model of several labels each: every class has a probability of its own."""
    model, notes = crossvit.load_model(checkpoint)
    crossvit.save_checkpoint(model, tmp_path / "x.safetensors", classes=notes["classes"], multi_label=True)
    cat.save(tmp_path / "x.png")
    done = command("predict", tmp_path / "x.png", "--checkpoint", tmp_path / "x.safetensors", "--format", "json")
    (row,) = json.loads(done.out)
    with torch.inference_mode():
        expected = model.eval()(evaluation_transform(72)(cat)[None])[0].sigmoid()
    found = {answer["index"]: answer["probability"] for answer in row["predictions"]}
    assert found == pytest.approx(dict(enumerate(expected.tolist())), rel=1e-4)


def test_globs_standard_input_and_class_files(
    checkpoint: Path, cat: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cat.save(tmp_path / "a.png")
    cat.save(tmp_path / "b.png")
    cat.save(tmp_path / "c [1].png")
    (tmp_path / "names.json").write_text(json.dumps({"1": ["n2", "dog"], "0": ["n1", "cat"], "2": ["n3", "cow"]}))
    (tmp_path / "names.txt").write_text("cat\ndog\ncow\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{tmp_path / 'b.png'}\n\n{tmp_path / 'a.png'}\n"))
    shared = ("--checkpoint", checkpoint, "--top", "1", "--output", tmp_path / "out.txt")
    for names, given, files in (
        ("names.json", [tmp_path / "?.png"], ["a.png", "b.png"]),
        ("names.txt", ["-", tmp_path / "c [1].png"], ["b.png", "a.png", "c [1].png"]),
    ):
        done = command("predict", *given, *shared, "--classes", tmp_path / names)
        assert (done.status, done.out, done.err) == (0, "", "")
        rows = (tmp_path / "out.txt").read_text().splitlines()
        assert [row.partition("  ")[0] for row in rows] == [str(tmp_path / file) for file in files]
        assert all(row.partition("  ")[2].split()[0] in ("cat", "dog", "cow") for row in rows)
    (tmp_path / "names.txt").write_text("cat\n")
    done = command("predict", tmp_path / "a.png", *shared, "--classes", tmp_path / "names.txt")
    assert done.status == 2
    assert "1 class names were given, but the model has 3 classes" in done.err


def test_ctrl_c(checkpoint: Path, cat: Image.Image, tmp_path: Path) -> None:
    """With processes that decode, which a terminal interrupts too: one word, status 130."""
    cat.save(tmp_path / "a.png")
    arguments = ["predict", *[tmp_path / "a.png"] * 10_000, "--checkpoint", checkpoint, "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "crossvit", *map(str, arguments), "--batch-size", "4"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    lines = [line for line in said.splitlines() if not line.startswith("warning: ")]  # torch's, where cores are few
    assert (process.returncode, lines) == (130, ["interrupted"])


@pytest.mark.parametrize("name", ["predict", "explain"])
def test_a_folder_without_files_does_not_stop_the_others(
    name: str, checkpoint: Path, cat: Image.Image, tmp_path: Path
) -> None:
    """It is named, so is a glob that matches nothing, the rest is done, and the exit status says that not all was."""
    for folder in ("first", "empty", "last"):
        (tmp_path / folder).mkdir()
    cat.save(tmp_path / "first" / "a.png")
    cat.save(tmp_path / "last" / "b.png")
    given = [tmp_path / "first", tmp_path / "empty", tmp_path / "*.xyz", tmp_path / "last"]
    output = ["--output", tmp_path / "out"] if name == "explain" else []
    done = command(name, *given, "--checkpoint", checkpoint, "--workers", "0", *output)
    assert done.status == 1
    assert done.err == f"the folder {tmp_path / 'empty'} holds no files\nno file matches {tmp_path / '*.xyz'}\n"
    assert len(done.out.splitlines()) == 2
    assert all(file in done.out for file in ("a.png", "b.png"))


def test_what_cannot_be_asked(checkpoint: Path, cat: Image.Image, tmp_path: Path) -> None:
    cat.save(tmp_path / "a.png")
    (tmp_path / "none").mkdir()
    for arguments, reason in (
        ([tmp_path / "none"], "holds no files"),
        ([tmp_path / "*.xyz"], "no file matches"),
        ([tmp_path / "a.png", "--top", "0"], "--top must be at least 1, got 0"),
        ([tmp_path / "a.png", "--crop-ratio", "2"], "--crop-ratio must be above 0 and at most 1, got 2.0"),
    ):
        done = command("predict", *arguments, "--checkpoint", checkpoint)
        assert done.status == 2, arguments
        assert reason in done.err, arguments
        assert not done.out
