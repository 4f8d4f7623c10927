"""The CPU emulation that CUDA kernels are tested in, tested itself: a right kernel passes, each planted fault is seen.

tests/cuda_emulation/faults.cu is compiled plainly, with the portable switching of stacks, and with sanitizers.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "tests" / "cuda_emulation"
CSRC = ROOT / "csrc"
FLAGS = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Wno-psabi", "-fopenmp"]
VARIANTS = {
    "plain": [],
    "ucontext": ["-DEMULATION_UCONTEXT"],
    "sanitized": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
# What a launch says of each fault; "wrong" is the result.
REPORTS = {
    "none": "right",
    "missing_barrier": "wrong",
    "missing_second_barrier": "wrong",
    "missing_wait": "wrong",
    "missing_lane_sync": "wrong",
    "outside_shared": r"byte 3584, outside the block's 3584 bytes of shared memory, was written \(block 0, 0, 0\)",
    "outside_shared_matrix": r"ldmatrix: byte \d+ is outside the block's 3584 bytes of shared memory, thread \d+, 0, 0",
    "misaligned_copy": "cp.async: the global address is not aligned",
    "unwritten_output": "wrong",
    "divergent_barrier": r"no thread can go on: 96 wait at __syncthreads, 32 at a warp's __syncwarp, 0 have returned",
    "divergent_lanes": "lanes of one warp meet at __shfl_(down|xor)_sync and at __shfl_(down|xor)_sync",
    "forgotten_copies": "the kernel returns with asynchronous copies that were not waited for",
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def faults(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(variant, the program that plants the faults)."""
    program = tmp_path_factory.mktemp(request.param) / "faults"
    sources = [str(path) for path in EMULATION.glob("*.cpp")]
    command = [os.environ.get("CXX", "g++"), *FLAGS, *VARIANTS[request.param]]
    command += [f"-I{EMULATION / 'include'}", f"-I{CSRC}", "-x", "c++", str(EMULATION / "faults.cu"), "-x", "none"]
    built = subprocess.run([*command, *sources, "-o", str(program)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert not built.stderr, built.stderr
    return request.param, program


def run(program: Path, *arguments: str, seed: int = 0) -> subprocess.CompletedProcess:
    environment = os.environ | {"CROSSVIT_KERNELS_EMULATE_SEED": str(seed)}
    return subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("seed", range(4))
def test_every_planted_fault_is_seen_and_a_right_kernel_passes(faults: tuple[str, Path], seed: int) -> None:
    variant, program = faults
    done = run(program, "sanitized", seed=seed) if variant == "sanitized" else run(program, seed=seed)
    assert (done.returncode, done.stderr) == (0, "")
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    planted = REPORTS.keys() - ({"outside_shared"} if variant == "sanitized" else set())
    for name in planted:
        for dtype in ("float16", "bfloat16"):
            assert re.search(f"(^|: ){REPORTS[name]}", said[f"{name} {dtype}"]), said[f"{name} {dtype}"]
    assert said["many blocks"] == said["conversions"] == said["no block"] == "right"
    assert said["too many threads"] == "2048 threads in a block"
    assert "307200 bytes of shared memory" in said["too much shared memory"]
    assert said["too large a grid"] == "a grid of 1 x 70000 x 1 blocks"


@pytest.mark.parametrize("faults", ["sanitized"], indirect=True)
def test_the_sanitizer_sees_accesses_outside_memory(faults: tuple[str, Path]) -> None:
    """A write behind an output, and one behind the block's shared memory."""
    _, program = faults
    outside = run(program, "outside_global")
    assert outside.returncode != 0
    assert "heap-buffer-overflow" in outside.stderr
    assert "faults.cu" in outside.stderr
    shared = run(program)
    assert shared.returncode != 0
    assert "use-after-poison" in shared.stderr
    assert "faults.cu" in shared.stderr
