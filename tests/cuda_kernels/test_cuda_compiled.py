"""Every CUDA kernel as nvcc compiled it for every architecture of this build: read from the library, without a GPU."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import crossvit_kernels
from benchmarks.cases import BRANCHES, OPS, Cell
from benchmarks.inspect import cuda_plan, cuda_report
from benchmarks.inspect import plan as plans
from benchmarks.inspect.compiled import SHARED_LIMIT
from crossvit_kernels import backends

RECORD = json.loads(Path(crossvit_kernels.__file__).with_name("_build.json").read_text())["cuda"]
ARCHITECTURES = [name for name in RECORD["architectures"] if name.startswith("sm_")]
PLANNED = [name for name in ARCHITECTURES if name in SHARED_LIMIT]
if not os.environ.get("CROSSVIT_TESTS_ALL"):  # to disassemble an architecture takes a quarter of a minute
    PLANNED = PLANNED[len(PLANNED) // 2 :][:1]
INSPECTED = (PLANNED or ARCHITECTURES or [""])[0]

pytestmark = pytest.mark.skipif(RECORD["missing"] is not None, reason=f"no CUDA kernels: {RECORD['missing']}")
planned = pytest.mark.skipif(
    not PLANNED or not backends.emulated() or not backends.available("cuda"), reason="no emulation records launches"
)


@pytest.fixture(scope="module")
def kernels() -> list[cuda_report.Kernel]:
    return list(cuda_report.resources(cuda_report.LIBRARY).values())


def plan(folder: Path, *dtypes: torch.dtype) -> list[dict[str, Any]]:
    """The launches of every op at CrossViT-15's sizes, batch 256: forward, and forward and backward."""
    cells = [
        Cell(op, branch, 256, dtype, backward, 1)
        for op in OPS
        for branch in BRANCHES
        for dtype in dtypes
        for backward in (False, True)[: 1 + (op != "cls_fusion")]
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CROSSVIT_KERNELS_EMULATE_MULTIPROCESSORS", str(cuda_plan.MULTIPROCESSORS))
        plans.show(cells, PLANNED, folder / "plan.json", kernels=["cuda"])
    return json.loads((folder / "plan.json").read_text())


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return plan(tmp_path_factory.mktemp("plans"), torch.bfloat16, torch.float16, torch.float32)


def test_there_is_the_same_code_for_every_architecture(kernels: list[cuda_report.Kernel]) -> None:
    names = {a: {kernel.name for kernel in kernels if kernel.architecture == a} for a in ARCHITECTURES}
    assert {kernel.architecture for kernel in kernels} == set(ARCHITECTURES)
    assert all(found == names[ARCHITECTURES[0]] for found in names.values())


def test_no_kernel_spills(kernels: list[cuda_report.Kernel]) -> None:
    assert not {f"{kernel.name} {kernel.architecture}": kernel.stack for kernel in kernels if kernel.stack}


@planned
def test_launches_fit_into_a_multiprocessor(launches: list[dict[str, Any]]) -> None:
    for row in launches:
        assert row["shared"] <= SHARED_LIMIT[row["architecture"]], row["kernel"]
        assert row["blocks_per_multiprocessor"] > 0, row["kernel"]


def by_call(rows: list[dict[str, Any]], dtypes: set[str]) -> dict[tuple[str, ...], list[int]]:
    """How many tensor-core instructions each kernel has that a call launches."""
    found: dict[tuple[str, ...], list[int]] = {}
    for row in rows:
        if row["dtype"] in dtypes:
            key = (row["op"], row["mode"], row["branch"], row["dtype"], row["architecture"])
            found.setdefault(key, []).append(row["matrix"]["mma"])
    return found


@planned
def test_products_of_16_bits_are_made_by_tensor_cores_and_ieee_float32_by_none(launches: list[dict[str, Any]]) -> None:
    for key, matrix in by_call(launches, {"bfloat16", "float16"}).items():
        assert any(matrix), key
    for key, matrix in by_call(launches, {"float32"}).items():
        assert not any(matrix), key


@planned
def test_products_in_tf32_are_made_by_tensor_cores(tmp_path: Path) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        rows = plan(tmp_path, torch.float32)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    for key, matrix in by_call(rows, {"float32"}).items():
        assert any(matrix), key


@planned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("branch", BRANCHES)
def test_cls_cross_attention_brings_every_patch_to_shared_memory_once(branch: str, dtype: torch.dtype) -> None:
    """By the bytes that the asynchronous copies of an emulated call move."""
    cell = Cell("cls_cross_attention", branch, 2, dtype, False, 1)
    inputs = [v.normal_() if isinstance(v, torch.Tensor) else v for v in plans.arguments(cell, device="cpu")]
    launches = cuda_plan.call(cell, inputs, run=True).launches
    patches = 2 * (BRANCHES[branch].tokens - 1) * BRANCHES[branch].width * dtype.itemsize
    assert sum(launch.copied for launch in launches if launch.name.startswith("token_pass_kernel")) == patches


def test_names_are_those_of_the_source() -> None:
    symbol = (
        "_ZN8crossvit4cuda43_GLOBAL__N__c2917b03_10_scratch_cu_ad7a0d3110scale_rowsI13__nv_bfloat16EEvPKT_PS4_NS1_1AEf"
    )
    assert cuda_report.kernel_name(symbol) == "scale_rows<bfloat16>"
    assert cuda_report.kernel_name("main") == "main"


def test_the_report_is_a_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    cuda_report.main(["--architecture", INSPECTED, "--json", str(path)])
    rows = json.loads(path.read_text())
    assert {row["architecture"] for row in rows} == {INSPECTED}
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["kernel", "architecture", "registers", "stack"]
    assert len(lines) == len(rows) + 1
    assert lines[-1].startswith(f"{len(rows)} kernels; ")
