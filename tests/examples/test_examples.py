"""Every script of examples/ runs with small settings, and what it prints and writes is right."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

for package in ("onnxruntime", "onnxscript", "skimage", "sklearn", "timm", "torchvision"):
    pytest.importorskip(package)

from commands import CLASSES, command, photographs_by_class, save_small

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("no source tree beside the tests", allow_module_level=True)
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs an example as a script, in an empty folder, and returns what it printed; nothing may go to stderr."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str | Path) -> str:
        script = EXAMPLES / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        runpy.run_path(str(script), run_name="__main__")
        out, err = capfd.readouterr()
        assert err == ""
        return out

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of three classes, in a file that says what it is."""
    return save_small(tmp_path_factory.mktemp("weights"), depth=((1, 1, 0),))


def numbers(pattern: str, text: str) -> list[float]:
    """What the group of `pattern` matched, everywhere in `text`."""
    return [float(found) for found in re.findall(pattern, text)]


def test_the_readme_lists_every_example_and_a_test_runs_it() -> None:
    here = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    for path in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")]:
        assert f"[`{path.name}`]({path.name})" in (EXAMPLES / "README.md").read_text()
        assert any(f'"{path.stem}"' in text or f'"{path.name}"' in text for text in here), path.name


def test_swap_into_timm(run: Run) -> None:
    """The whole model is swapped, and answers as before."""
    said = run("swap_into_timm", "--batch", "2", "--rounds", "1")
    assert "modules run on the kernels" in said
    assert "MultiScaleBlock" in said
    assert numbers(r"largest difference of the logits: (\S+) of", said)[0] < 1e-4
    assert "same top-1 for 2 of 2 images" in said
    timms, ours, ratio = (numbers(p, said)[0] for p in (r"timm (\S+) images", r"accelerated (\S+):", r"(\S+) times"))
    assert ours / timms == pytest.approx(ratio, rel=0.02)


def test_fine_tune_on_a_folder(run: Run, tmp_path: Path) -> None:
    """It learns the three photographs apart, and the file that it wrote is the model that it ended with."""
    said = run("fine_tune_on_a_folder", "--epochs", "3")
    assert "72 images of 3 classes, 30 to validate" in said
    before, *epochs, loaded = numbers(r"(\S+) % right", said)
    assert len(epochs) == 3
    assert before < 60 < epochs[-1]
    assert loaded == epochs[-1]
    info = command("info", "--checkpoint", tmp_path / "fine_tuned" / "model.safetensors")
    assert "classes: astronaut, chelsea, coffee" in info.out


def test_export_and_serve_onnx(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    """ONNX Runtime answers as the model for one image and for three, from one file."""
    said = run("export_and_serve_onnx", "--checkpoint", checkpoint, "--out", tmp_path / "small.onnx")
    assert (tmp_path / "small.onnx").stat().st_size > 100_000
    assert "batch 1: same answer for 1" in said
    assert "batch 3: same answer for 3" in said
    assert max(numbers(r"largest difference (\S+) of", said)) < 1e-4


def test_one_op_in_your_model(run: Run) -> None:
    """The logits and the gradient of every parameter are the reference's."""
    said = run("one_op_in_your_model", "--batch", "2")
    found = dict(re.findall(r"^(\S+) +(\d\S+)", said, re.MULTILINE))
    assert {"logits", "query", "norm.weight", "q.weight", "k.bias", "v.bias", "head.bias"} < found.keys()
    assert sum(name.startswith("blocks.1.") for name in found) == 12
    assert 0 < max(map(float, found.values())) < 1e-4


def test_attention_maps(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    """Each branch reads itself and the other; rollout's shares are shares; all six maps are in the picture."""
    said = run("attention_maps", "--checkpoint", checkpoint)
    for branch in 0, 1:
        assert f"branch {branch} reads itself: " in said
        assert f"branch {branch} reads branch {1 - branch}: " in said
        assert 0 < sum(numbers(rf"branch {branch} is made of branch .*to (\S+)%", said)) <= 100
    assert all(float(high) > float(low) for low, high in re.findall(r"(\S+)% to (\S+)%", said))
    picture = np.asarray(Image.open(tmp_path / "attention.png"))
    assert picture.shape[0] > 3 * 320
    assert picture.std() > 30


def test_per_branch_evaluation_of_digits(run: Run) -> None:
    """After an epoch of training on digits the model is right more often than one answer in ten."""
    said = run("per_branch_evaluation", "--epochs", "1")
    assert "top-1 on 359 images" in said
    *branches, mean = numbers(r"(\S+) %", said)
    assert len(branches) == 2
    assert mean > 20


def test_per_branch_evaluation_of_a_file(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    """The shares are those that `crossvit evaluate` counts."""
    folder = photographs_by_class(tmp_path / "photographs")
    assert command("evaluate", folder, "--checkpoint", checkpoint, "--workers", "0", "--json", "x.json").status == 0
    expected = json.loads(Path("x.json").read_text())
    said = run("per_branch_evaluation", "--checkpoint", checkpoint, "--data", folder)
    shares = [*(branch["top1"] for branch in expected["branches"]), expected["top1"]]
    assert numbers(r"(\S+) %", said) == pytest.approx(shares, abs=0.05)
    assert len(expected["classes"]) == len(CLASSES)
