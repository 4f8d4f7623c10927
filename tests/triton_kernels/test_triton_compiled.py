"""Every Triton kernel, compiled ahead of time for three generations of GPUs by a machine that need not have one.

The compilation runs in processes of its own, since here Triton may be an interpreter; what is looked at is their JSON.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.inspect.compiled import SHARED_LIMIT
from crossvit_kernels import triton_kernels
from crossvit_kernels.triton_kernels.configs import table

ROOT = Path(__file__).resolve().parents[2]


class Run(NamedTuple):
    """One `--plan` of every op, or one, in branches of a model, batch 256: forward and backward, as for training, and
    with `both` also the forward of inference."""

    architecture: str
    dtype: str
    branches: str = "large"
    tf32: bool = False
    both: bool = False
    autocast: bool = False
    op: str = "all"

    def __str__(self) -> str:
        kind = "tf32" if self.tf32 else f"autocast {self.dtype}" if self.autocast else self.dtype
        return f"{self.architecture} {kind} {self.branches}" + f" {self.op}" * (self.op != "all")

    def rows(self, folder: Path) -> list[dict[str, Any]]:
        path = folder / f"{str(self).replace(' ', '-')}.json"
        command = [sys.executable, "-m", "benchmarks.ops", "--plan", "--kernels", "triton", "--batch", "256"]
        command += ["--json", str(path)]
        command += ["--both" if self.both else "--backward", "--op", self.op]
        command += ["--architecture", self.architecture, "--dtype", self.dtype, "--branch", self.branches]
        environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
        command += ["--tf32"] * self.tf32 + ["--autocast"] * self.autocast
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(path.read_text())


# One 16-bit dtype is as good as the other. The tuned table is sm_90's; elsewhere the defaults are launched. The pass
# over the tokens and its gradient hold most in registers.
RUNS = [
    Run("sm_90", "bfloat16"),
    Run("sm_80", "float32", "base", tf32=True, op="cls_cross_attention"),
    Run("sm_100", "float32", op="cls_cross_attention"),
]
if os.environ.get("CROSSVIT_TESTS_ALL"):  # over 20 minutes
    RUNS += [
        Run(architecture, dtype, branch, tf32=tf32, both=True, autocast=autocast)
        for architecture in SHARED_LIMIT
        for branch in ("tiny", "small", "large", "base")
        for dtype, tf32, autocast in (
            ("bfloat16", False, False),
            ("bfloat16", False, True),
            ("float32", True, False),
            ("float32", False, False),
        )
    ]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[Run, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("plans")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(RUNS, pool.map(lambda run: run.rows(folder), RUNS)))


def named(row: dict[str, Any]) -> str:
    return f"{row['op']} {row['mode']} {row['branch']}: {row['kernel']}"


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_every_op_compiles(compiled: dict[Run, list[dict[str, Any]]], run: Run) -> None:
    ops = triton_kernels.OPS if run.op == "all" else (run.op,)
    expected = {(op, "forward" if op == "cls_fusion" else "forward+backward") for op in ops}
    if run.both:
        expected |= {(op, "forward") for op in ops}
    assert {(row["op"], row["mode"]) for row in compiled[run]} == expected


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_no_kernel_spills(compiled: dict[Run, list[dict[str, Any]]], run: Run) -> None:
    assert not {named(row): row["stack"] for row in compiled[run] if row["stack"]}


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_shared_memory_is_within_the_limit(compiled: dict[Run, list[dict[str, Any]]], run: Run) -> None:
    limit = SHARED_LIMIT[run.architecture]
    assert not {named(row): row["shared"] for row in compiled[run] if row["shared"] > limit}
    assert all(row["blocks_per_multiprocessor"] > 0 for row in compiled[run])


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_products_are_made_by_the_matrix_units(compiled: dict[Run, list[dict[str, Any]]], run: Run) -> None:
    """16-bit and TF32 ones: by mma.sync where a tile has 16 rows, by wgmma or tcgen05 where it has 64 or more; IEEE
    float32 ones by none."""
    large = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05"}[run.architecture]
    for row in compiled[run]:
        if not row["products"]:
            continue
        if run.dtype == "float32" and not run.tf32:
            assert not any(row["matrix"].values()), named(row)
        else:
            assert any(row["matrix"].values()), named(row)
            if min(rows for rows, _, _ in row["products"]) >= 64:
                assert row["matrix"][large], named(row)


def test_the_tuned_table_names_kernels_and_what_they_take() -> None:
    for architecture, kernels in table().items():
        assert architecture.startswith("sm_")
        for configurations in kernels.values():
            for key, configuration in configurations.items():
                width, bits = key.split("/")
                assert width.isdecimal()
                assert bits in ("16", "32")
                assert {"num_warps", "num_stages"} < configuration.keys()
