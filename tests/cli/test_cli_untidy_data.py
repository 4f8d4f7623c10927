"""Data folders as they are found: dangling links, other programs' leftovers, empty classes, spreadsheets' labels."""

import os
import sys
from pathlib import Path

import pytest

from commands import command
from crossvit.data.datasets import open_dataset, open_folder
from crossvit.data.folders import files_below
from training_runs import make_images, one_thread, train  # noqa: F401  one_thread is for every test here
from untidy import LATIN1, classes, picture, split

ROW = ("--epochs", "1", "--batch-size", "4")


def test_skip_goes_on_past_what_is_not_there(tmp_path: Path) -> None:
    """Dangling links and rows without a file are broken images: named, and left out; by default they stop the run."""
    data = make_images(tmp_path / "data", train=12, val=3)
    for part in ("train", "val"):
        os.symlink("nowhere.png", data / part / "class0" / "dangling.png")
    status, printed = train(data, tmp_path / "run", *ROW, "--on-broken", "skip")
    assert status == 0, printed
    for part in ("train", "val"):
        assert f"skipped {data / part / 'class0' / 'dangling.png'}: No such file or directory" in printed
    status, printed = train(data, tmp_path / "stopped", *ROW)
    assert (status, printed.count("dangling.png")) == (1, 1), printed
    assert "Traceback" not in printed


def test_skip_goes_on_past_rows_without_a_file(tmp_path: Path) -> None:
    data = split(tmp_path / "data", "a", "b", each=3)
    (data / "train" / "labels.csv").write_text(
        "image,labels\na/0.png,a\nnone.png,b\na/1.png,a;b\nb/0.png,b\nb/1.png,\n"
    )
    (data / "val" / "labels.csv").write_text("image,labels\na/0.png,a\nnone.png,b\n")
    options = ("--epochs", "1", "--batch-size", "5", "--loss", "bce", "--on-broken", "skip")
    status, printed = train(data, tmp_path / "run", *options)
    assert status == 0, printed
    assert f"skipped {data / 'train' / 'none.png'}: No such file or directory" in printed
    assert f"skipped {data / 'val' / 'none.png'}: No such file or directory" in printed


def test_a_workers_broken_image_is_one_line(tmp_path: Path) -> None:
    """Its exception comes from another process with a traceback in front."""
    data = make_images(tmp_path / "data", train=12, val=0)
    (data / "train" / "class1" / "broken.png").write_bytes(b"no picture")
    status, printed = train(data, tmp_path / "run", *ROW, "--workers", "1")
    broken = data / "train" / "class1" / "broken.png"
    assert status == 1
    assert printed.splitlines()[-1] == f"crossvit train: error: {broken}: no image, or one of an unknown format"
    assert "Traceback" not in printed


def test_what_other_programs_leave_is_no_data(tmp_path: Path) -> None:
    """No class, no image, and nothing that stops a run: in data folders and in folders to predict."""
    root = classes(tmp_path / "data", "a", "b")
    for name in (".ipynb_checkpoints", "__MACOSX", ".git", "@eaDir", "lost+found", "System Volume Information"):
        picture(root / name / "x.png")
        picture(root / "a" / name / "x.png")
    for name in ("._0.png", ".hidden.png"):
        (root / "a" / name).write_bytes(b"\0\5\x16\7")
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini"):
        (root / "a" / name).write_bytes(b"x")
    found = open_folder(root)
    assert found.classes == ["a", "b"]
    assert found.paths == [root / name / f"{i}.png" for name in ("a", "b") for i in (0, 1)]
    assert list(found.targets) == [0, 0, 1, 1]
    assert sorted(files_below(root)) == found.paths


def test_links_that_go_round_are_followed_once(tmp_path: Path) -> None:
    root = classes(tmp_path / "data", "a", "b")
    os.symlink("..", root / "a" / "up")
    os.symlink(root / "b", root / "a" / "other")
    found = [path.relative_to(root).as_posix() for path in open_folder(root).paths]
    assert found == ["a/0.png", "a/1.png", "a/other/0.png", "a/other/1.png", "b/0.png", "b/1.png"]


def test_pipes_among_the_images_are_not_waited_for(tmp_path: Path) -> None:
    root = classes(tmp_path / "data", "a", "b")
    os.mkfifo(root / "a" / "pipe.png")
    assert len(open_folder(root)) == 4


def test_a_class_without_images_is_refused(tmp_path: Path) -> None:
    """As torchvision refuses it; on request it is a class."""
    data = split(tmp_path / "data", "a", "b")
    (data / "train" / "c").mkdir()
    (data / "train" / "c" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"has no images \(.*\) in the folders of these classes: c .*--allow-empty"):
        open_dataset(data, "train")
    status, printed = train(data, tmp_path / "run", *ROW)
    assert (status, printed.count("\n")) == (2, 1), printed
    assert "in the folders of these classes: c" in printed
    assert not (tmp_path / "run").exists()
    assert open_dataset(data, "train", allow_empty=True).classes == ["a", "b", "c"]
    status, printed = train(data, tmp_path / "run", *ROW, "--allow-empty-classes")
    assert status == 0, printed
    assert "images of 3 classes" in printed
    (data / "val" / "c").mkdir()  # of classes that are given nothing is learnt from folders
    assert len(open_dataset(data, "val", ["a", "b", "c"])) == 2


def test_a_class_by_a_name_that_the_model_has_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="several by that name: crane"):
        open_folder(classes(tmp_path, "crane", "heron"), ["crane", "heron", "crane"])


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfimage,labels\n0.png,b;a\n1.png,\n",
        b"image,labels\r\n0.png,b;a\r\n1.png,\r\n",
        b"\nimage,labels\n\n  \n0.png,b;a\n,\n1.png,\n\n",
        b"image,labels\n0.png,b;a\nimage,labels\n1.png,\n",
        b'"image","labels"\n"0.png","b; a"\n"1.png",""\n',
        b"Image , Labels\n 0.png , b ; a \n1.png\n",
        b"labels,note,image\nb;a,,0.png\n,x,1.png\n",
    ],
    ids=["mark", "crlf", "blank", "header twice", "quotes", "spaces", "order"],
)
def test_labels_as_spreadsheets_write_them(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(content)
    found = open_folder(tmp_path)
    assert found.classes == ["a", "b"]
    assert found.paths == [tmp_path / "0.png", tmp_path / "1.png"]
    assert found.targets.tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"image,labels\n0.png,a,b\n", r"line 2: 3 fields under 2 columns"),
        (b"image,labels\n0.png,a\n,b\n", r"line 3: no image is named"),
        (b"image;labels\n0.png;a\n", r"its first line is 'image;labels'"),
        (b"image,labels,labels\n0.png,a,b\n", r"its first line is 'image,labels,labels'"),
        (b'image,labels\n0.png,"a\n1.png,b\n', r"line 3: no CSV: unexpected end of data"),
        (b"image,labels\n0.png,caf\xe9\n", r"line 2: expected labels in UTF-8 .* got 'caf\\\\xe9'"),
        (b"image,labels\n0.png," + b"a" * 200_000 + b"\n", r"line 2: no CSV: field larger than field limit"),
        ("image,labels\n0.png,a\n".encode("utf-16"), r"must have a line 'image,labels'"),
        (b"image,labels\n0.png,\n", r"has no label in any of its 1 rows"),
        (b"", r"must have a line 'image,labels'"),
    ],
)
def test_labels_that_are_none(content: bytes, reason: str, tmp_path: Path) -> None:
    """The line is named, and no row is taken for another."""
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"labels.csv.*{reason}"):
        open_folder(tmp_path)


@pytest.mark.skipif(sys.platform == "darwin", reason="the file system has no such names")
def test_images_of_any_name_in_labels(tmp_path: Path) -> None:
    picture(tmp_path / f"{LATIN1}.png")
    (tmp_path / "labels.csv").write_bytes(b"image,labels\ncaf\xe9.png,a\n")
    assert open_folder(tmp_path)[0][0].size == (20, 16)


def test_evaluate_names_what_it_could_not_read(tmp_path: Path) -> None:
    """And counts the rest, leftovers aside."""
    from commands import photographs_by_class, save_small

    root = photographs_by_class(tmp_path / "data")
    (root / ".ipynb_checkpoints").mkdir()
    (root / "people" / "._cat.png").write_bytes(b"\0")
    os.symlink("nowhere.png", root / "people" / "gone.png")
    done = command("evaluate", root, "--checkpoint", save_small(tmp_path), "--workers", "0")
    assert (done.status, done.err) == (1, f"{root / 'people' / 'gone.png'}: No such file or directory\n")
    assert "on 7 images" in done.out
