"""Hostile calls of every native op of the CPU and the CUDA kernels, each op in a process of its own, so that a crash is
one op's and is known by its call.

    python tests/support/hostile_calls.py --calls 1000

A call is a valid one with one argument to three changed (hostile.py), drawn from a seed; it has to raise or,
where it is still a legal one, to answer as the reference does. Prints a line of JSON for each op, and ends with 1 where
one is wrong.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before torch reads them
    os.environ["OMP_NUM_THREADS"] = "1"  # a process that is forked has no other threads
    os.environ.setdefault("CROSSVIT_KERNELS_EMULATE", "1")  # hostile calls are no business of a GPU that others use

import torch

import crossvit_kernels
import hostile
from crossvit_kernels import backends
from hostile_answers import REFUSALS, WrongError, check


def in_a_process(function: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What a function returns, and under "died" how its process ended where it did not return, with what it had written
    to the path that it is given."""
    with tempfile.TemporaryDirectory() as folder:
        doing, done = Path(folder, "doing"), Path(folder, "done")
        if (process := os.fork()) == 0:
            try:
                done.write_text(json.dumps(function(doing)))
            except BaseException as error:
                done.write_text(json.dumps({"died": f"{type(error).__name__}: {error}"}))
            finally:
                os._exit(0)
        status = os.waitpid(process, 0)[1]
        if done.exists() and status == 0:
            return json.loads(done.read_text())
        how = signal.Signals(status & 127).name if status & 127 else f"exit code {status >> 8}"
        return {"died": f"{how} in {doing.read_text() if doing.exists() else 'its beginning'}"}


def hostile_calls(calls: list[hostile.Call], seed: int, count: int) -> Callable[[Path], dict[str, Any]]:
    """So many changed calls of an op. Each is named in a file before it is made."""

    def run(doing: Path) -> dict[str, Any]:
        warnings.simplefilter("ignore")
        for call in calls:
            doing.write_text(str(call))
            if not check(call):
                return {"wrong": f"refused, though valid: {call}"}
        answered = 0
        for index in range(count):
            rng = random.Random(f"{seed}/{calls[0].backend}/{calls[0].name}/{index}")
            call = hostile.change(rng.choice(calls), rng)
            doing.write_text(text := f"call {index}: {call}")
            try:
                answered += check(call)
            except WrongError as error:
                return {"wrong": f"{text}: {error}"}
        return {"calls": count, "answered": answered}

    return run


def _weight_of_another_size(backend: str) -> None:
    x, norm_weight = torch.randn(3, 64, requires_grad=True), torch.ones(64)
    weight = torch.randn(16, 64, requires_grad=True)
    out = crossvit_kernels.layer_norm_linear(x, norm_weight, None, weight, kernels=backend)
    weight.data = torch.randn(16, 4096)
    out.sum().backward()


def named_calls(backend: str) -> dict[str, Callable[[], Any]]:
    """Wrong calls by which a kernel that trusts them leaves its memory far behind, or divides by zero."""
    ops = getattr(torch.ops, f"crossvit_kernels_{backend}")
    x, ones, weight = torch.randn(2, 8), torch.ones(8), torch.randn(8, 8)
    wide, images, one = torch.randn(2, 1 << 22), torch.randn(1, 3, 8, 8), torch.randn(1, 1)
    ends = (1e-6, False, False, True)
    calls: dict[str, Callable[[], Any]] = {
        "a bias of one element": lambda: ops.layer_norm_linear(
            x, ones, None, torch.randn(4096, 8), torch.randn(1), *ends
        ),
        "a weight of one column": lambda: ops.layer_norm_linear(
            wide, torch.ones(1 << 22), None, torch.randn(8, 1), None, *ends
        ),
        "a norm weight of one element": lambda: ops.layer_norm_linear(
            wide, torch.ones(1), None, torch.randn(8, 1 << 22), None, *ends
        ),
        "a short residual": lambda: ops.linear_residual(
            torch.randn(4096, 8), weight, None, torch.randn(2, 8), None, False
        ),
        "a patch of 0": lambda: ops.patch_embed(
            images, torch.randn(8, 3, 0, 0), None, torch.randn(1, 1, 8), torch.randn(1, 2, 8), 8, 8
        ),
        "no heads": lambda: ops.cls_cross_attention(
            x, torch.randn(2, 3, 8), ones, None, weight, None, weight, weight, None, 0, 1e-6, True
        ),
        "more elements than can be counted": lambda: ops.linear_residual(
            one.expand(1 << 40, 1), one.expand(1 << 20, 1), None, one.expand(1 << 40, 1 << 20), None, False
        ),
        "freed memory": lambda: ops.layer_norm_linear(x, ones, None, _freed(weight), None, *ends),
        "a weight of another size in the backward": lambda: _weight_of_another_size(backend),
    }
    if backend == "cpu":
        qkv = torch.randn(2, 5, 24)
        calls |= {
            "no heads of self_attention": lambda: ops.self_attention(qkv, 0, True),
            "no heads by the dispatcher": lambda: torch.ops.crossvit_kernels.self_attention(qkv, 0, True, "cpu"),
            "a negative size": lambda: ops.bicubic_resize(images, -8, 8),
            "a size that no taps can be made for": lambda: ops.bicubic_resize(images, 1 << 31, 8),
        }
    return calls


def _freed(t: torch.Tensor) -> torch.Tensor:
    copy = t.clone()
    copy.untyped_storage().resize_(0)
    return copy


def refusal(call: Callable[[], Any]) -> Callable[[Path], dict[str, Any]]:
    """What a wrong call raises."""

    def run(doing: Path) -> dict[str, Any]:
        try:
            call()
        except REFUSALS as error:
            return {"raised": type(error).__name__, "message": str(error).partition("\n")[0]}
        return {"wrong": "it was answered"}

    return run


def main(arguments: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000, help="of each op")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", action="append", choices=("cpu", "cuda"), help="may be given twice; both")
    parser.add_argument("--op", help="one op alone, such as cpu::self_attention")
    options = parser.parse_args(arguments)
    wrong = False
    for backend in options.backend or ("cpu", "cuda"):
        if not backends.available(backend):
            print(json.dumps({"what": backend, "missing": str(backends.reason(backend))}))
            continue
        if options.op is None:
            for name, call in named_calls(backend).items():
                result = in_a_process(refusal(call))
                print(json.dumps({"what": f"{backend}: {name}", **result}), flush=True)
                wrong |= not {"wrong", "died"}.isdisjoint(result)
        for name, calls in hostile.valid_calls(backend).items():
            if options.op in (None, f"{backend}::{name}"):
                result = in_a_process(hostile_calls(calls, options.seed, options.calls))
                print(json.dumps({"what": f"{backend}::{name}", **result}), flush=True)
                wrong |= not {"wrong", "died"}.isdisjoint(result)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
