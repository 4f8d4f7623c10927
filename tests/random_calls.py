"""Random calls of every op on every backend, held to the reference by the rule of tests/numerics.py.

    python tests/random_calls.py --calls 200000

Op, shapes, dtypes, options, memory layouts and numbers of threads are drawn from a seed. For each draw the kernels run
several times: on the tensors as they lie and on dense ones, again (the same bits), without gradients, and with only
some of them asked for. A call is a forward or a backward of the kernels. The backends of this machine have their turns,
or one of them, `--backend`; without a GPU the Triton kernels run in the interpreter and the CUDA kernels in the
emulation, over small shapes and with few of the calls. Processes share the draws; one that crashes is started again
behind the draw that it died of, and none may grow. `--backend B --seed S --only I` replays draw I.
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
from unittest import mock

# Of torch's own kernels that the reference uses: what they compile for every shape would look like growth.
for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(cache, "16")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin would wait for each other's cores

import torch

if not torch.cuda.is_available():  # as tests/conftest.py; read when the kernels are loaded
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("CROSSVIT_KERNELS_EMULATE", "1")

import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import crossvit_kernels
import draws
from crossvit_kernels import backends
from numerics import DEVICES, FLOAT64, assert_equal_to_reference, like

AGAIN = 12  # draws of the same shapes that decide where one misses the rule
WARM = 300  # draws after which a process has seen everything once
GROWTH = 24 * 2**20  # bytes a process may gain between a tenth of its draws (at least WARM) and the last
SLOWER = 50  # one call in so many is for each backend that an interpreter or an emulation runs
ZERO = {"grad k_bias": 0.0}  # by mathematics; the kernels return zeros
Results = dict[str, Tensor]


class MismatchError(AssertionError):
    """A kernel's result is not what it has to be."""


def evaluate(
    draw: draws.Draw, kernels: str, wanted: frozenset[str] | None = None, *, dense: bool = False
) -> tuple[Results, int]:
    """ "out" and "grad <input>" of the inputs `wanted` (None: all that are tensors), for a fixed gradient of out; and
    how many calls that were. `kernels` "float64" is the reference in float64 on the inputs rounded to their dtypes."""
    device, exact = DEVICES[draw.backend], kernels == "float64"
    values = {n: v for n, v in draw.values.items() if isinstance(v, Tensor)}
    wanted = values.keys() if wanted is None else wanted
    leaves = {}
    for name, value in values.items():
        v = value.contiguous() if dense else value
        rounded = v.detach().to(draw.dtype(name)).to(device)
        leaves[name] = like(rounded.double() if exact else rounded, v).requires_grad_(name in wanted)
    with (FLOAT64 if exact else draw.precision).context(device):
        out = getattr(crossvit_kernels, draw.op)(**(draw.values | leaves), kernels="reference" if exact else kernels)
    results = {"out": out.detach().cpu()}
    if wanted:
        grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).bfloat16().to(out)
        asked = [name for name in leaves if name in wanted]
        gradients = torch.autograd.grad(out, [leaves[name] for name in asked], grad_out)
        results |= {f"grad {name}": g.cpu() for name, g in zip(asked, gradients)}
    return results, 1 + bool(wanted)


def check(draw: draws.Draw) -> tuple[int, int]:
    """Holds one draw to everything; returns how many calls of the kernels it took, and how many of their results only
    obeyed the rule together with others' (`luck`).

    Raises MismatchError that says which run of them failed, and how.
    """
    kernels = draw.backend
    torch.set_num_threads(draw.threads)
    wanted = None if draw.op != "cls_fusion" else frozenset[str]()
    first, calls = evaluate(draw, kernels, wanted)
    again, more = evaluate(draw, kernels, wanted)
    calls += more
    same_bits("the same call again", again, first)
    bare, more = evaluate(draw, kernels, frozenset())
    calls += more
    same_bits("the call without gradients", bare, {"out": first["out"]})
    laid, more = evaluate(draw, kernels, wanted, dense=True)
    calls += more
    runs = {"the call": first, "dense tensors": laid}
    if wanted is None:
        runs["some gradients only"], more = evaluate(draw, kernels, frozenset(draw.some))
        calls += more
        if kernels == "cpu":  # elsewhere what is kept for one gradient in the inputs' dtype enters another
            partial = runs.pop("some gradients only")
            same_bits("some gradients only", partial, {n: first[n] for n in partial})
    torch.set_num_threads(1)
    reference, _ = evaluate(draw, "reference", wanted)
    ref64, _ = evaluate(draw, "float64", wanted)
    lucky, scales = 0, cancelling(draw)
    for what, found in runs.items():
        expected = [{name: r[name] for name in found} for r in (reference, ref64)]
        for name in scales.keys() & found.keys():
            off = (found.pop(name).double() - expected[1].pop(name)).abs().max().item()
            expected[0].pop(name)
            if not off <= (bound := 4 * draw.precision.ulp * scales[name]):
                raise MismatchError(f"{what}: {name}: {off:.3g} off where summands cancel, bound {bound:.3g}")
        try:
            held_to_the_rule(found, *expected, draw.precision.ulp)
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


def cancelling(draw: draws.Draw) -> dict[str, float]:
    """The gradients of which next to nothing is left, and how large the summands are that cancel.

    Through a LayerNorm of two elements, which makes 1 and -1 of nearly everything, passes what eps leaves of it alone.
    The summands are the gradient that passes where mean and deviation are constants.
    """
    norm_weight = draw.values.get("norm_weight")
    if draw.op not in ("layer_norm_linear", "cls_cross_attention") or norm_weight.numel() != 2:
        return {}
    with mock.patch.object(F, "layer_norm", _with_constant_statistics):
        summands, _ = evaluate(draw, "float64")
    return {
        f"grad {name}": summands[f"grad {name}"].abs().max().item()
        for name in draws.ACTIVATIONS
        if name in draw.values and summands[f"grad {name}"].numel()
    }


def _with_constant_statistics(x: Tensor, shape: Any, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    variance, mean = torch.var_mean(x.detach(), dim=-1, correction=0, keepdim=True)
    y = (x - mean) * (variance + eps).rsqrt() * weight
    return y if bias is None else y + bias


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
        found, _ = evaluate(other, draw.backend, wanted)
        torch.set_num_threads(1)
        plain, _ = evaluate(other, "reference", wanted)
        ref64, _ = evaluate(other, "float64", wanted)
        for name in found.keys() - cancelling(other).keys():
            exact = ref64[name]
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


def work(seed: int, indices: range, ops: tuple[str, ...], backend: str, now: Any, said: Any) -> None:
    """A process: checks its draws; says ("done", index, op, (calls, lucky)) or ("failed", index, op, why) of each."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory handed out uninitialised holds NaN
    early = 0
    for i, index in enumerate(indices):
        now.value = index
        draw = draws.draw(seed, index, ops, backend)
        try:
            said.put(("done", index, draw.op, check(draw)))
        except Exception as error:
            said.put(("failed", index, str(draw), f"{type(error).__name__}: {error}"))
        if i == max(len(indices) // 10, min(WARM, len(indices) - 1)):
            early = resident_bytes()
    said.put(("ended", early, "", resident_bytes()))


class Worker:
    """A process over every `step`-th draw, and what is left of them for the next one should it crash."""

    def __init__(self, seed: int, indices: range, ops: tuple[str, ...], backend: str) -> None:
        self.arguments, self.indices = (seed, ops, backend), indices
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.now, self.said = context.Value("q", -1, lock=False), context.Queue()
        seed, *others = self.arguments
        arguments = (seed, self.indices, *others, self.now, self.said)
        self.process = context.Process(target=work, args=arguments, daemon=True)
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
    known = [name for name in backends.BACKENDS if name != "reference" and backends.available(name)]
    parser = argparse.ArgumentParser(prog="python tests/random_calls.py", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--calls",
        type=int,
        default=2000,
        help=f"forwards and backwards of the kernels, about (2000); of those that are interpreted or emulated one in "
        f"{SLOWER}",
    )
    parser.add_argument("--backend", default="all", help="all, each in turn, or one of " + ", ".join(known))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="I", help="draw I of the backend alone, in this process")
    parser.add_argument("--ops", default=",".join(draws.CASES), help="of these only: " + ", ".join(draws.CASES))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    options = parser.parse_args(arguments)
    ops = tuple(options.ops.split(","))
    if unknown := [op for op in ops if op not in draws.CASES]:
        parser.error(f"argument --ops: unknown {', '.join(unknown)}, expected of {', '.join(draws.CASES)}")
    for name in ("calls", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: expected at least 1, got {getattr(options, name)}")
    if options.backend not in ("all", *backends.BACKENDS[1:]):
        parser.error(f"argument --backend: unknown {options.backend}, expected all or of {', '.join(known)}")
    if options.backend != "all" and (why := backends.reason(options.backend)):
        parser.error(f"argument --backend: {options.backend} is not there: {why}")
    if not known:
        parser.error("no backend is there but the reference: " + str(backends.reason("cpu")))
    chosen = known if options.backend == "all" else [options.backend]
    if options.only is not None:
        if len(chosen) > 1:
            parser.error("argument --only: expected a --backend whose draw is meant")
        draw = draws.draw(options.seed, options.only, draws.ops_of(chosen[0], ops), chosen[0])
        print(draw)
        torch.use_deterministic_algorithms(True, warn_only=True)
        calls, lucky = check(draw)
        print(
            f"{calls} calls, all right" + (f", {lucky} only together with others in the same shapes" if lucky else "")
        )
        return 0
    failed = 0
    for backend in chosen:
        if served := draws.ops_of(backend, ops):
            calls = options.calls if len(chosen) == 1 or not draws.slow(backend) else options.calls // SLOWER
            failed += _all(backend, served, math.ceil(calls / draws.calls_each(served)), options)
    return int(failed > 0)


def _all(backend: str, ops: tuple[str, ...], number: int, options: argparse.Namespace) -> bool:
    """Whether one of this many draws failed."""
    workers = [
        Worker(options.seed, range(w, number, options.workers), ops, backend)
        for w in range(min(options.workers, number))
    ]
    which = f"--backend {backend} --seed {options.seed}"
    if ops != tuple(draws.CASES):
        which += f" --ops {','.join(ops)}"
    failures: list[str] = []
    calls: Counter[str] = Counter()
    lucky = 0
    sizes: list[tuple[int, int]] = []
    began, live = time.monotonic(), list(workers)
    with tqdm(total=number, unit="draw", desc=backend, dynamic_ncols=True, smoothing=0.02) as bar:
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
                        failures.append(f"{which} --only {index}: {what}\n    {result}")
                        tqdm.write(failures[-1])
                    bar.update(kind != "ended")
                if alive:
                    continue
                live.remove(worker)
                if (index := worker.crashed()) is not None:
                    died = f"the process ended with {worker.process.exitcode}"
                    failures.append(f"{which} --only {index}: {died}")
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
    print(f"{backend}: {calls.total()} calls in {number} draws and {seconds:.0f} s, {len(failures)} failures")
    for failure in failures:
        print(f"failed: {failure}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
