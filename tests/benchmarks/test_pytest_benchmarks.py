"""What pytest-benchmark runs, a slice of it, each function once and untimed: so it cannot rot."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import devices
from crossvit_kernels import backends

ROOT = Path(__file__).resolve().parents[2]
OPS = "small and float32 and (layer_norm_linear or cls_fusion)"
MODELS = "crossvit_9_240-inference-1-bfloat16"


def test_a_slice_runs_on_what_is_there() -> None:
    """All other backends are skipped with the reason, although stand-ins for them would run."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-disable", "-k", f"{OPS} or {MODELS}"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CROSSVIT_KERNELS_EMULATE": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [*command, "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    own = 2 if backends.available("cpu") else 1
    assert f"{4 * own} passed, {20 - 4 * own} skipped" in ended.stdout.strip().splitlines()[-1]
    missing = "no CUDA device was found" if torch.version.cuda else "was built without CUDA"
    assert re.search(rf"SKIPPED \[9\] benchmarks/test_ops.*{missing}", ended.stdout)


def test_stand_ins_have_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter and the emulation take CPU tensors; the reference is timed wherever there is a device."""
    monkeypatch.setattr(devices, "no_gpu", lambda: None)
    monkeypatch.setattr(backends, "reason", lambda name: None)
    for stand_in in (("cpu", "cuda"), ("cpu",)):
        monkeypatch.setattr(backends, "devices", lambda name, found=stand_in: found)
        assert "a stand-in" in str(devices.why_not("cuda", "triton", torch.float32))
    monkeypatch.setattr(backends, "devices", lambda name: ("cuda",))
    monkeypatch.setattr(backends, "dtypes", lambda name: (torch.float32,))
    assert devices.why_not("cuda", "triton", torch.float32) is None
    assert "does not compute in torch.bfloat16" in str(devices.why_not("cuda", "triton", torch.bfloat16))
    assert devices.why_not("cuda", "reference", torch.bfloat16) is None
    monkeypatch.setattr(backends, "reason", lambda name: "it was not built")
    assert devices.why_not("cpu", "cpu", torch.float32) == "it was not built"
