"""Whoever calls a native op with what does not fit gets an error that names it, and nothing is read or written that is
not the call's. `make sanitize` makes a thousand such calls of every op, under AddressSanitizer."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import crossvit_kernels
import hostile_calls
from available import FROM_CPP, GPU, NATIVE

CALLS = int(os.environ.get("CROSSVIT_HOSTILE_CALLS", "60"))  # of each op
BACKENDS = [name for name in ("cpu", "cuda") if name in NATIVE and not (name == "cuda" and GPU)]
OPS = [
    f"{space.rpartition('_')[2]}::{name}"
    for space, _, name in (op.partition("::") for op in sorted(torch._C._dispatch_get_all_op_names()))
    if space in {f"crossvit_kernels_{backend}" for backend in BACKENDS}
    if any("Tensor" in str(a.type) for a in getattr(getattr(torch.ops, space), name).default._schema.arguments)
]
# What an error says of the calls of hostile_calls.named_calls: the argument, what was expected and what came.
SAID = {
    "a bias of one element": "bias: expected shape (4096,), got (1,)",
    "a weight of one column": "weight: expected shape (any, 4194304), got (8, 1)",
    "a norm weight of one element": "norm_weight: expected shape (4194304,), got (1,)",
    "a short residual": "residual: expected shape (4096, 8), got (2, 8)",
    "a patch of 0": "weight: expected a tensor of 4 dimensions that is not empty, got shape (8, 3, 0, 0)",
    "no heads": "num_heads: expected a divisor of 8, got 0",
    "more elements than can be counted": "x: expected fewer elements than",
    "freed memory": "weight: expected memory of its own, got a storage of 0 bytes for (8, 8)",
    "a weight of another size in the backward": "weight: expected shape (any, 64), got (16, 4096)",
    "no heads of self_attention": "num_heads: expected a divisor of 8, got 0",
    "no heads by the dispatcher": "num_heads: expected a divisor of 8, got 0",
    "a negative size": "height: expected 1 to 16777215, got -8",
    "a size that no taps can be made for": "height: expected 1 to 16777215, got 2147483648",
}
CPU_ALONE = {"no heads of self_attention", "no heads by the dispatcher", "a negative size"} | {
    "a size that no taps can be made for"
}
NAMED = [(backend, name) for backend in BACKENDS for name in SAID if backend == "cpu" or name not in CPU_ALONE]

pytestmark = pytest.mark.skipif(not BACKENDS, reason="there are no native kernels, or only those of a GPU")


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """What the script says of every op and of every named call."""
    script = Path(hostile_calls.__file__)
    arguments = ["--calls", str(CALLS), *(f"--backend={name}" for name in BACKENDS)]
    environment = os.environ | {"PYTHONPATH": str(Path(crossvit_kernels.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False, env=environment
    )
    sys.stderr.write(done.stderr)  # a sanitizer's report
    assert done.returncode in (0, 1)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line.pop("what"): line for line in lines}


@pytest.mark.parametrize("op", OPS)
def test_every_call_is_refused_or_answered_as_the_reference_does(results: dict[str, dict[str, Any]], op: str) -> None:
    """Wrong ranks, sizes, dtypes, devices, numbers and lists; expanded, overlapping, strided and freed memory; saved
    tensors of other shapes: none ends the process, none is answered with other numbers than the reference's."""
    found = results[op]
    assert found == {"calls": CALLS, "answered": found.get("answered")}
    assert 0 < found["answered"] < CALLS


@pytest.mark.parametrize("space, name", NAMED)
def test_an_error_says_what_was_wrong(results: dict[str, dict[str, Any]], space: str, name: str) -> None:
    found = results[f"{space}: {name}"]
    assert found.get("raised") in {error.__name__ for error in FROM_CPP}, found
    assert SAID[name] in found["message"]


def test_the_library_for_gpus_refuses_tensors_of_the_cpu() -> None:
    """It is made of the same objects as the emulation, which takes them; here nothing is launched on memory that no GPU
    has."""
    library = Path(crossvit_kernels.__file__).with_name("_cuda.so")
    if not library.exists():
        pytest.skip("the CUDA kernels were not built")
    code = (
        f"import torch; torch.ops.load_library({str(library)!r}); x = torch.randn(2, 8)\n"
        "try: torch.ops.crossvit_kernels_cuda.linear_residual(x, torch.randn(8, 8), None, x, None, False)\n"
        "except (ValueError, RuntimeError) as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "linear_residual: x: expected a tensor on cuda, got cpu\n"


def test_a_crash_and_a_wrong_answer_are_found() -> None:
    died = hostile_calls.in_a_process(lambda doing: doing.write_text("the call") and os.kill(os.getpid(), 9))
    assert died == {"died": "SIGKILL in the call"}
    assert hostile_calls.in_a_process(hostile_calls.refusal(lambda: None)) == {"wrong": "it was answered"}
