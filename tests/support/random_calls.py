"""Random calls of every op on every backend, held to the reference by the rule of tests/support/numerics.py.

    python tests/support/random_calls.py --calls 200000

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

# torch's own kernels, which the reference uses, compile for every shape, and that would look like growth.
for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(cache, "16")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin would wait for each other's cores

from tqdm import tqdm

import available  # before the kernels are loaded: sets how they run here
import draws
from crossvit_kernels import backends
from random_checks import AGAIN, MismatchError, check

__all__ = ["MismatchError", "check", "main"]

WARM = 300  # draws after which a process has seen everything once
GROWTH = 24 * 2**20  # bytes a process may gain between a tenth of its draws (at least WARM) and the last
SLOWER = 50  # one call in so many is for each backend that an interpreter or an emulation runs


def resident_bytes() -> int:
    """What this process holds, without what is free but kept."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def work(seed: int, indices: range, ops: tuple[str, ...], backend: str, now: Any, said: Any) -> None:
    """A process: checks its draws; says ("done", index, op, (calls, lucky)) or ("failed", index, op, why) of each."""
    available.fill_empty_memory_with_nan()
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
    parser = argparse.ArgumentParser(
        prog="python tests/support/random_calls.py", description=__doc__.partition("\n")[0]
    )
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
        parser.error(f"argument --backend: {options.backend} is not available: {why}")
    if not known:
        parser.error("no backend is there but the reference: " + str(backends.reason("cpu")))
    chosen = known if options.backend == "all" else [options.backend]
    if options.only is not None:
        if len(chosen) > 1:
            parser.error("argument --only: expected a --backend whose draw is meant")
        draw = draws.draw(options.seed, options.only, draws.ops_of(chosen[0], ops), chosen[0])
        print(draw)
        available.fill_empty_memory_with_nan()
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
