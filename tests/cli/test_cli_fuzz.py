"""Command lines drawn from the commands' own parsers end in an exit status and a few lines: `cli_fuzz` says more.

CROSSVIT_FUZZ="SEED CALLS" tries others.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
SEED, CALLS = os.environ.get("CROSSVIT_FUZZ", "0 100").split()


def test_no_command_line_ends_in_a_traceback(tmp_path: Path) -> None:
    """In a process of its own, whose memory is limited."""
    done = subprocess.run(
        [sys.executable, SUPPORT / "cli_fuzz.py", tmp_path, SEED, CALLS],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{SUPPORT}"},
        capture_output=True,
        text=True,
        errors="replace",
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert f'"calls": {CALLS}, "wrong": 0' in done.stdout
