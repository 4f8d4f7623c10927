"""Random calls of every op on the C++ kernels, held to the reference by the rule of tests/numerics.py.

    python tests/random_calls.py --calls 200000

Op, shapes, dtypes, options, memory layouts and numbers of threads are drawn from a seed. For each draw the kernels run
several times: on the tensors as they lie and on dense ones, again (the same bits), without gradients, and with only
some of them asked for. A call is a forward or a backward of the kernels. Processes share the draws; one that crashes is
started again behind the draw that it died of, and none may grow. `--seed S --only I` replays draw I.
"""

import argparse
import ctypes
import math
import multiprocessing
import os
import sys
import time
from collections import Counter
from pathlib import Path
from queue import Empty
from typing import Any

# Of torch's own kernels that the reference uses: what they compile for every shape would look like growth.
for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(cache, "16")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin would wait for each other's cores

import torch
from torch import Tensor
from tqdm import tqdm

import crossvit_kernels
import draws
from inputs import Random
from numerics import FLOAT64, Precision, assert_equal_to_reference, like
from rounding import Rounded

AGAIN = 12  # draws of the same shapes that decide where one misses the rule
WARM = 300  # draws after which a process has seen everything once
GROWTH = 24 * 2**20  # bytes a process may gain between a tenth of its draws (at least WARM) and the last
ZERO = {"grad k_bias": 0.0}  # by mathematics; the kernels return zeros
Results = dict[str, Tensor]


class MismatchError(AssertionError):
    """A kernel's result is not what it has to be."""


def evaluate(
    op: str, values: dict[str, Any], precision: Precision, kernels: str, wanted: frozenset[str] | None = None
) -> tuple[Results, int]:
    """ "out" and "grad <input>" of the inputs `wanted` (None: all that are tensors), for a fixed gradient of out; and
    how many calls that were."""
    if wanted is None:
        wanted = frozenset(name for name, v in values.items() if isinstance(v, Tensor))
    leaves = {
        name: like(v.detach().to(precision.inputs), v).requires_grad_(name in wanted)
        for name, v in values.items()
        if isinstance(v, Tensor)
    }
    with precision.context("cpu"):
        out = getattr(crossvit_kernels, op)(**(values | leaves), kernels=kernels)
    results = {"out": out.detach()}
    if wanted:
        grad_out = Random(7).normal(*out.shape).bfloat16().to(out)
        asked = [name for name in leaves if name in wanted]
        gradients = torch.autograd.grad(out, [leaves[name] for name in asked], grad_out)
        results |= {f"grad {name}": g for name, g in zip(asked, gradients)}
    return results, 1 + bool(wanted)


def exact_inputs(draw: draws.Draw) -> dict[str, Any]:
    """The draw's values rounded to its dtype."""
    return {n: like(v.to(draw.precision.inputs), v) if isinstance(v, Tensor) else v for n, v in draw.values.items()}


def check(draw: draws.Draw) -> tuple[int, int]:
    """Holds one draw to everything; returns how many calls of the kernels it took, and how many of their results only
    obeyed the rule together with others' (`luck`).

    Raises MismatchError that says which run of them failed, and how.
    """
    op, values, precision = draw.op, draw.values, draw.precision
    torch.set_num_threads(draw.threads)
    wanted = None if op != "cls_fusion" else frozenset[str]()
    first, calls = evaluate(op, values, precision, "cpu", wanted)
    again, more = evaluate(op, values, precision, "cpu", wanted)
    calls += more
    same_bits("the same call again", again, first)
    bare, more = evaluate(op, values, precision, "cpu", frozenset())
    calls += more
    same_bits("the call without gradients", bare, {"out": first["out"]})
    dense = {n: v.contiguous() if isinstance(v, Tensor) else v for n, v in values.items()}
    laid, more = evaluate(op, dense, precision, "cpu", wanted)
    calls += more
    if wanted is None:
        some = frozenset(draw.some)
        partial, more = evaluate(op, values, precision, "cpu", some)
        calls += more
        same_bits("some gradients only", partial, {n: first[n] for n in partial})
    torch.set_num_threads(1)
    with Rounded():
        reference, _ = evaluate(op, values, precision, "reference", wanted)
    ref64, _ = evaluate(op, exact_inputs(draw), FLOAT64, "reference", wanted)
    lucky = 0
    for what, found in (("the call", first), ("dense tensors", laid)):
        try:
            held_to_the_rule(found, reference, ref64, precision.ulp)
        except AssertionError as error:
            if not luck(draw, error):
                raise MismatchError(f"{what}: {error}") from None
            lucky += 1
    return calls, lucky


def same_bits(what: str, found: Results, expected: Results) -> None:
    """Raises MismatchError where two runs differ in a bit."""
    for name, value in expected.items():
        if found[name].dtype != value.dtype or not torch.equal(found[name], value):
            off = (found[name].double() - value.double()).abs().max().item()
            raise MismatchError(f"{what}: {name} is not the same: {off:.3g} off")


def held_to_the_rule(found: Results, reference: Results, ref64: Results, ulp: float) -> None:
    """numerics' rule; where nothing but zero is exact (an empty batch) zero is what is wanted."""
    nothing = {name for name, exact in ref64.items() if exact.numel() and not exact.any() and name not in ZERO}
    for name in nothing:
        assert not found[name].any(), f"{name}: {found[name].abs().max().item():.3g} where 0 is exact"
    rest = [{n: v for n, v in results.items() if n not in nothing} for results in (found, reference, ref64)]
    assert_equal_to_reference(*rest, ulp, zero=ZERO)


def luck(draw: draws.Draw, error: AssertionError) -> bool:
    """Whether other values in the same shapes obey the rule, taken together.

    The error of a mean over a few numbers is a matter of luck, the reference's too; so is that of a small difference of
    large numbers. Squares are added up over the draws, and the largest error is the largest of all.
    """
    total: dict[str, list[float]] = {}
    ulp = draw.precision.ulp
    wanted = None if draw.op != "cls_fusion" else frozenset[str]()
    for other in draw.others(AGAIN):
        torch.set_num_threads(draw.threads)
        found, _ = evaluate(other.op, other.values, other.precision, "cpu", wanted)
        torch.set_num_threads(1)
        with Rounded():
            plain, _ = evaluate(other.op, other.values, other.precision, "reference", wanted)
        ref64, _ = evaluate(other.op, exact_inputs(other), FLOAT64, "reference", wanted)
        for name, exact in ref64.items():
            if name in ZERO or not exact.numel() or not exact.any():
                continue
            scale, most = exact.square().mean().item(), exact.abs().max().item()
            off, plain_off = (r[name].double() - exact for r in (found, plain))
            sums = total.setdefault(name, [0.0] * 4)
            sums[0] += off.square().mean().item() / scale
            sums[1] += plain_off.square().mean().item() / scale
            sums[2] = max(sums[2], off.abs().max().item() / most)
            sums[3] = max(sums[3], plain_off.abs().max().item() / most)
    for square, plain_square, largest, plain_largest in total.values():
        if not math.sqrt(square / AGAIN) <= 2 * math.sqrt(plain_square / AGAIN) + ulp:
            return False
        if not largest <= 4 * plain_largest + 4 * ulp:
            return False
    return "nan" not in str(error) and "dtype" not in str(error) and "where 0 is exact" not in str(error)


def resident_bytes() -> int:
    """What this process holds, without what is free but kept."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def work(seed: int, indices: range, ops: tuple[str, ...], now: Any, said: Any) -> None:
    """A process: checks its draws; says ("done", index, op, (calls, lucky)) or ("failed", index, op, why) of each."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory handed out uninitialised holds NaN
    early = 0
    for i, index in enumerate(indices):
        now.value = index
        draw = draws.draw(seed, index, ops)
        try:
            said.put(("done", index, draw.op, check(draw)))
        except Exception as error:
            said.put(("failed", index, str(draw), f"{type(error).__name__}: {error}"))
        if i == max(len(indices) // 10, min(WARM, len(indices) - 1)):
            early = resident_bytes()
    said.put(("ended", early, "", resident_bytes()))


class Worker:
    """A process over every `step`-th draw, and what is left of them for the next one should it crash."""

    def __init__(self, seed: int, indices: range, ops: tuple[str, ...]) -> None:
        self.arguments, self.indices = (seed, ops), indices
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.now, self.said = context.Value("q", -1, lock=False), context.Queue()
        seed, ops = self.arguments
        self.process = context.Process(target=work, args=(seed, self.indices, ops, self.now, self.said), daemon=True)
        self.process.start()

    def messages(self) -> list[Any]:
        found = []
        try:
            while True:
                found.append(self.said.get_nowait())
        except Empty:
            return found

    def crashed(self) -> int | None:
        """The draw that the process died of, if it did; a new process goes on behind it."""
        if self.process.is_alive() or self.process.exitcode == 0:
            return None
        index = self.now.value
        self.indices = self.indices[self.indices.index(index) + 1 :] if index >= 0 else range(0)
        return index


def main(arguments: list[str] | None = None) -> int:
    """0 where every call was right, 1 where not."""
    parser = argparse.ArgumentParser(prog="python tests/random_calls.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=2000, help="forwards and backwards of the kernels, about (2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="I", help="draw I alone, in this process")
    parser.add_argument("--ops", default=",".join(draws.CASES), help="of these only: " + ", ".join(draws.CASES))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    options = parser.parse_args(arguments)
    ops = tuple(options.ops.split(","))
    if unknown := [op for op in ops if op not in draws.CASES]:
        parser.error(f"argument --ops: unknown {', '.join(unknown)}, expected of {', '.join(draws.CASES)}")
    for name in ("calls", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: expected at least 1, got {getattr(options, name)}")
    if not crossvit_kernels.backends.available("cpu"):
        parser.error(f"there are no C++ kernels: {crossvit_kernels.backends.reason('cpu')}")
    if options.only is not None:
        draw = draws.draw(options.seed, options.only, ops)
        print(draw)
        torch.use_deterministic_algorithms(True, warn_only=True)
        calls, lucky = check(draw)
        print(
            f"{calls} calls, all right" + (f", {lucky} only together with others in the same shapes" if lucky else "")
        )
        return 0
    return _all(options, ops)


def _all(options: argparse.Namespace, ops: tuple[str, ...]) -> int:
    number = math.ceil(options.calls / draws.calls_each(ops))
    workers = [Worker(options.seed, range(w, number, options.workers), ops) for w in range(options.workers)]
    failures: list[str] = []
    calls: Counter[str] = Counter()
    lucky = 0
    sizes: list[tuple[int, int]] = []
    began, live = time.monotonic(), list(workers)
    with tqdm(total=number, unit="draw", dynamic_ncols=True, smoothing=0.02) as bar:
        while live:
            time.sleep(0.1)
            for worker in list(live):
                alive = worker.process.is_alive()
                for kind, index, what, result in worker.messages():
                    if kind == "ended":
                        sizes.append((index, result))
                    elif kind == "done":
                        calls[what] += result[0]
                        lucky += result[1]
                    else:
                        failures.append(f"--seed {options.seed} --only {index}: {what}\n    {result}")
                        tqdm.write(failures[-1])
                    bar.update(kind != "ended")
                if alive:
                    continue
                live.remove(worker)
                if (index := worker.crashed()) is not None:
                    died = f"the process ended with {worker.process.exitcode}"
                    failures.append(f"--seed {options.seed} --only {index}: {died}")
                    tqdm.write(failures[-1])
                    bar.update()
                    if len(worker.indices):
                        worker.start()
                        live.append(worker)
    for early, late in sizes:
        print(f"memory of a process: {early / 2**20:.0f} MiB after a tenth, {late / 2**20:.0f} MiB at the end")
        if late > early + GROWTH:
            failures.append(f"a process grew by {(late - early) / 2**20:.0f} MiB")
    print(", ".join(f"{op} {count}" for op, count in sorted(calls.items())))
    print(f"{lucky} results obeyed the rule only together with those of {AGAIN} other draws in the same shapes")
    seconds = time.monotonic() - began
    print(f"{calls.total()} calls in {number} draws and {seconds:.0f} s, {len(failures)} failures")
    for failure in failures:
        print(f"failed: {failure}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
