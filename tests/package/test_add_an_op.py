"""docs/add-an-op.md, done as it says in a copy of the package: the op's own test passes there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from crossvit_kernels import backends

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "add-an-op.md").read_text()
BLOCKS = re.findall(r"^`([\w/]+\.py)`:\n\n```(python|diff)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def apply(change: str, text: str) -> str:
    """`text` with the lines of a diff that begin with - replaced by those that begin with +."""
    old, new = ("".join(line[1:] for line in change.splitlines(True) if line[0] in (" ", sign)) for sign in ("-", "+"))
    assert text.count(old) == 1, old
    return text.replace(old, new)


def test_the_page_can_be_followed_to_the_end(tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "crossvit_kernels", tmp_path / "crossvit_kernels", ignore=ignore)
    shutil.copytree(ROOT / "tests" / "support", tmp_path / "tests" / "support", ignore=ignore)
    for name in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    written = []
    for name, kind, code in BLOCKS:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(apply(code, path.read_text()) if kind == "diff" else code)
        written.append(name)
    assert len(written) == 5
    assert written[-1] == "tests/ops/test_scaled_gelu.py"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", written[-1]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= (5 if backends.available("triton") else 2), done.stdout
