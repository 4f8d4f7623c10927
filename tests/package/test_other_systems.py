"""macOS and Windows, as far as Linux can show them: without the modules and functions that they lack, and under their
names, the package is Python alone, and imports, runs and trains on its reference."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETUP = ROOT / "setup.py"

# Only what is imported after torch is held to it: torch has builds of its own for these systems.
BEGIN = """
import importlib.abc, os, signal, sys, tempfile, subprocess, multiprocessing.util, torch
ABSENT = {"fcntl", "resource", "termios", "pwd", "grp"}

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in ABSENT:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Absent())
for module, names in ((os, sys.argv[2].split(",")), (signal, ["alarm"] if "pathconf" in sys.argv[2] else [])):
    for name in names:
        delattr(module, name)
sys.platform = sys.argv[1]
"""
SYSTEMS = {
    "darwin": ["sched_getaffinity"],
    "win32": ["sched_getaffinity", "O_NONBLOCK", "set_blocking", "pathconf", "sysconf", "getuid", "fork"],
}
RUN = """
import warnings
from pathlib import Path
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import crossvit, crossvit_kernels as k
    from crossvit.system.files import read_file, try_to_write, write_text
    from crossvit.system.memory import check_memory
    from crossvit.training.loading import start_worker

    settings = dict(image_size=48, embed_dim=(16, 32), num_heads=(2, 2), depth=((1, 1, 0),), num_classes=3)
    model = crossvit.create_model("crossvit_tiny_240", **settings)
    images, targets = torch.randn(4, 3, 48, 48), torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    check_memory("a picture", 1000)
    file = Path(sys.argv[3], "notes.txt")
    try_to_write(file)
    write_text(file, "kept")
    assert read_file(file, 10) == b"kept"
    start_worker(0)
told = [str(c.message) for c in caught if "crossvit_kernels" in str(c.message)]
assert len(told) == 1 and "built on Linux alone" in told[0], told
print(k.backends.reason("cpu"))
"""
TRAIN = """
import crossvit.cli.main
sys.argv = ["crossvit", *sys.argv[4:]]
crossvit.cli.main.main()
"""


def python(code: str, system: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter that takes itself for one of `system`."""
    return subprocess.run(
        [sys.executable, "-c", BEGIN + code, system, ",".join(SYSTEMS[system]), str(folder), *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_reference_runs_and_trains(system: str, tmp_path: Path) -> None:
    result = python(RUN, system, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"crossvit_kernels/_cpu.so is built on Linux alone, and this is {system}"


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_command_trains(system: str, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    from training_runs import TINY, make_images

    data = make_images(tmp_path / "data", train=8, val=3)
    result = python(TRAIN, system, tmp_path, "train", str(data), "--out", str(tmp_path / "run"), *TINY, "--epochs", "1")
    assert result.returncode == 0, result.stderr
    assert any((tmp_path / "run").iterdir())


@pytest.mark.skipif(not SETUP.is_file(), reason="no source tree beside the tests")
@pytest.mark.parametrize("system", SYSTEMS)
def test_setup_asks_there_for_python_alone(system: str, tmp_path: Path) -> None:
    """No torch, no compiler and no fcntl; the wheel is one for every system."""
    code = """
import json, runpy, sys, setuptools
asked = {}
setuptools.setup = lambda **named: asked.update(named)
sys.platform, sys.modules["torch"], sys.modules["fcntl"] = sys.argv[1], None, None
runpy.run_path("setup.py")
print(json.dumps(asked))
"""
    result = subprocess.run(
        [sys.executable, "-c", code, system], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {}
