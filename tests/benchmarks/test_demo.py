"""`make demo`, as far as it is not training: the digits as a folder, and the table beside the paper's."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")

from benchmarks.demo import PAPER, table, write_digits
from crossvit.data.datasets import open_dataset


def test_digits_as_a_folder(tmp_path: Path) -> None:
    """All 1,797, a fifth of them held out, none in both; the same from the same seed."""
    write_digits(tmp_path / "one")
    write_digits(tmp_path / "two")
    train, val = (open_dataset(tmp_path / "one", split) for split in ("train", "val"))
    assert len(train) + len(val) == 1797
    assert 0.19 < len(val) / 1797 < 0.21
    assert train.classes == val.classes == [str(digit) for digit in range(10)]
    names = [{path.name for path in dataset.paths} for dataset in (train, val)]
    assert not names[0] & names[1]
    again = open_dataset(tmp_path / "two", "val")
    assert [path.name for path in again.paths] == [path.name for path in val.paths]
    assert val[0][0].size == (32, 32)
    assert np.ptp(np.asarray(val[0][0])) > 200


def test_fusions_beside_the_papers() -> None:
    rows = [
        dict(fusion=name, top1=97.5, parameters=10, multiply_adds=2e6, seconds=1.5)
        | {"paper_imagenet_crossvit_s": dict(top1=paper[0], multiply_adds=paper[1] * 1e9, parameters=paper[2] * 1e6)}
        for name, paper in PAPER.items()
    ]
    lines = table(rows).splitlines()
    assert "digits" in lines[0]
    assert "paper (ImageNet" in lines[0]
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 6
