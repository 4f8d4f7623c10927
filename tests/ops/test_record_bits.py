"""tests/support/record_bits.py tells results apart that differ in a bit, and says which."""

import json
from pathlib import Path

import pytest
import torch

from record_bits import digest, main


@pytest.mark.parametrize("other", [torch.tensor([-0.0, 1.0]), torch.tensor([0.0, 1.0]).double(), torch.zeros(1, 2)])
def test_a_bit_a_dtype_or_a_shape_makes_another_digest(other: torch.Tensor) -> None:
    value = torch.tensor([0.0, 1.0])
    assert digest({"out": value}) == digest({"out": value[:, None].expand(2, 3)[:, 0]})
    assert digest({"out": value}) != digest({"out": other})
    assert digest({"out": value}) != digest({"other": value})


def test_what_differs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps({"a": "1", "b": "2", "only here": "3"}))
    after.write_text(json.dumps({"a": "1", "b": "4"}))
    assert main(["--compare", str(before), str(before)]) == 0
    assert main(["--compare", str(before), str(after)]) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == ["2 results in both, 1 differ", "    b"]
