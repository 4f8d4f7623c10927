"""examples/walk_through.ipynb: what is stored in it was executed, and executing it again gives the same."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
for package in ("ipykernel", "matplotlib", "skimage", "sklearn", "timm", "torchvision"):
    pytest.importorskip(package)

ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "examples" / "walk_through.ipynb"
if not PATH.is_file():
    pytest.skip("no source tree beside the tests", allow_module_level=True)
BYTES, SECONDS = 500_000, 120
# What is executed in the test, in place of what is stored: fewer turns to time, fewer epochs to learn.
SHORTER = {"rounds=9": "rounds=2", "range(6)": "range(2)", "total_steps=6 *": "total_steps=2 *"}
A_PATH = re.compile(r"(?:/|[A-Z]:\\)(?:home|root|tmp|work|usr|opt|var|mnt|Users)[/\\]")


def outputs(notebook: Any) -> Iterator[tuple[str, Any]]:
    """Each output with the source of its cell."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            yield from ((cell.source, output) for output in cell.outputs)


def texts(notebook: Any) -> list[str]:
    """What each cell prints, in however many pieces, but for the numbers, of which some are rounding errors."""
    printed = [
        "".join(output.text for output in cell.outputs if "text" in output)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    return [re.sub(r" *\d[\d.e+-]*", " 0", text) for text in printed]


def pictures(notebook: Any) -> int:
    """How many figures there are."""
    return sum("image/png" in output.get("data", {}) for _, output in outputs(notebook))


@pytest.fixture(scope="module")
def stored() -> Any:
    return nbformat.read(PATH, as_version=4)


def test_the_stored_notebook_is_whole_and_small(stored: Any) -> None:
    """It is valid, was executed from top to bottom without an error or a warning, and names no folder of a machine."""
    nbformat.validate(stored)
    assert PATH.stat().st_size < BYTES
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.output_type for _, output in outputs(stored)}
    assert kinds == {"stream", "display_data"}
    assert all(output.name == "stdout" for _, output in outputs(stored) if output.output_type == "stream")
    assert not A_PATH.search(json.dumps([dict(output) for _, output in outputs(stored)]))
    assert pictures(stored) == 5


def test_executing_it_gives_what_is_stored(stored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same texts but for their numbers, as many figures, the reference's answers, and digits learnt."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    executed = nbformat.read(PATH, as_version=4)
    for long, short in SHORTER.items():
        (cell,) = (cell for cell in executed.cells if long in cell.source)
        cell.source = cell.source.replace(long, short)
    nbclient.NotebookClient(
        executed, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert texts(executed) == texts(stored)
    assert pictures(executed) == pictures(stored)
    for notebook, learnt in (stored, 90), (executed, 40):
        said = "\n".join(output.text for _, output in outputs(notebook) if "text" in output)
        assert "same answers: True" in said
        differences = re.findall(r"largest difference: (\S+) of", said)
        assert len(differences) == 2
        assert max(map(float, differences)) < 1e-4
        assert float(re.search(r"the model +(\S+) %", said)[1]) > learnt
