"""Searches block sizes, warps and stages of the Triton kernels on this GPU, on request, and can save what is faster.

python -m benchmarks.inspect.tune [--op all] [--batch 256] [--dtype bfloat16] [--mode all] [--kernel A] [--minutes 5]
    [--save]

For each kernel configuration that an op's forward and backward take at CrossViT-15's sizes: in turn one parameter at a
time is halved and doubled, the whole op timed as replays of a CUDA graph, and what is MARGIN faster kept, until
nothing is. Results go to crossvit_kernels/triton_kernels/tuned.json with --save, under this GPU's architecture;
nothing is tuned otherwise, so that results do not change from run to run.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from crossvit_kernels.triton_kernels import configs, target

from .. import devices, timing
from ..agreement import rms
from ..cases import BRANCHES, OPS, Cell, inputs
from ..session import DTYPES, counts, names
from .plan import served

Configuration = dict[str, int]  # block sizes, num_warps and num_stages, as in the table

MODES = ("forward", "backward")
MARGIN = 1.015  # a configuration counts as faster from this ratio on
REPLAYS = 20
TOLERANCE = 2e-2  # the most that a configuration may change a result, of its rms
LIMITS = {"num_warps": (1, 16), "num_stages": (1, 6), "RESIDENT": (1, 4), "TILES": (1, 8)}
BLOCK_LIMITS = (16, 256)
COUNTS = ("num_stages", "RESIDENT", "TILES")  # change by one, others by a factor of two
# Where steps of one parameter do not lead, since all have to fit into shared memory together: tried first.
_TILES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "RESIDENT", "num_warps", "num_stages")
STARTS = {
    "linear_tiles": [
        dict(zip(_TILES, values))
        for values in (
            (128, 64, 64, 2, 4, 3),
            (128, 64, 64, 3, 4, 3),
            (128, 128, 64, 1, 8, 4),
            (128, 128, 64, 2, 4, 3),
            (128, 256, 64, 1, 8, 3),
            (256, 128, 64, 1, 8, 3),
        )
    ]
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the search; 0, 1 without a GPU, 130 after Ctrl-C (what was found until then is kept)."""
    options = _parse(arguments)
    if (why := devices.no_gpu()) is not None:
        print(f"benchmarks.inspect.tune needs an NVIDIA GPU: {why}", file=sys.stderr)
        return 1
    cells = [
        Cell(op, branch, batch, DTYPES[dtype], backward, 1, "cuda")
        for dtype, batch, op, backward in itertools.product(options.dtype, options.batch, options.op, options.mode)
        for branch in BRANCHES
        if served(op) and not (backward and op == "cls_fusion")
    ]
    end, found = time.monotonic() + 60 * options.minutes, Found(options.save)
    workers = min(8, os.cpu_count() or 1)
    try:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for cell in tqdm(cells, desc="tuning", unit="op"):
                _tune(cell, options.kernel, found, pool, end)
                if time.monotonic() > end:
                    tqdm.write("the time is up: what follows was not searched")
                    break
    except KeyboardInterrupt:
        return 130
    finally:
        found.show()
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inspect.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--op", type=names(OPS, OPS), default=list(OPS), help=f"all, {', '.join(OPS)}")
    parser.add_argument("--batch", type=counts, default=[256], help="256 by default")
    parser.add_argument("--dtype", type=names(DTYPES), default=["bfloat16"], help="bfloat16 by default")
    parser.add_argument(
        "--mode", type=names(MODES, MODES), default=list(MODES), help="all, forward, backward (for training, with both)"
    )
    parser.add_argument("--kernel", type=lambda text: text.split(","), help="only configurations of these names")
    parser.add_argument("--minutes", type=float, default=5.0, help="5 by default")
    parser.add_argument("--save", action="store_true", help="write what is faster into the table of the package")
    options = parser.parse_args(arguments)
    options.mode = [mode == "backward" for mode in options.mode]
    return options


class Found:
    """The configurations that were faster, with their gains, and the table that they go into."""

    def __init__(self, save: bool) -> None:
        self.save = save
        self.gains: dict[tuple[str, str], tuple[Configuration, float]] = {}

    def add(self, key: tuple[str, str], configuration: Configuration, gain: float) -> None:
        """A configuration that makes an op `gain` times as fast as before."""
        self.gains[key] = configuration, gain
        if self.save:
            table = json.loads(json.dumps(configs.table()))
            table.setdefault(target.architecture(), {}).setdefault(key[0], {})[key[1]] = configuration
            write_table(configs.TABLE, table)
        configs.table.cache_clear()

    def show(self) -> None:
        """Prints them."""
        for (kernel, key), (configuration, gain) in self.gains.items():
            print(f"{kernel} {key}: {gain:.2f} × with {configuration}")


def write_table(path: Path, table: dict[str, Any]) -> None:
    """Writes the table, a configuration a line, under a temporary name and renames it."""
    lines = []
    for architecture, kernels in sorted(table.items()):
        entries = [
            f"    {json.dumps(kernel)}: {{\n"
            + ",\n".join(f"      {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(of_width.items()))
            + "\n    }"
            for kernel, of_width in sorted(kernels.items())
        ]
        lines.append(f"  {json.dumps(architecture)}: {{\n" + ",\n".join(entries) + "\n  }")
    timing.write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _tune(cell: Cell, wanted: Sequence[str] | None, found: Found, pool: ProcessPoolExecutor, end: float) -> None:
    op = Call(cell)
    with configs.requests() as taken:
        op()
    for (kernel, key), start in list(taken.items()):
        if (wanted is not None and kernel not in wanted) or (kernel, key) in found.gains:
            continue
        best, before = start.values(), op.seconds()
        fastest, tried = before, {_frozen(start.values())}
        others = [c for name, starts in STARTS.items() if kernel.startswith(name) for c in starts]
        while time.monotonic() < end:
            candidates = [c for c in others or neighbours(best) if _frozen(c) not in tried]
            searching, others = bool(others), []
            tried |= {_frozen(c) for c in candidates}
            works = list(pool.map(_works, itertools.repeat(cell), itertools.repeat(kernel), candidates))
            better = best
            for candidate in itertools.compress(candidates, works):
                with configs.overriding(kernel, configs.Config.of(candidate)):
                    seconds = op.seconds()
                if seconds * MARGIN < fastest:
                    fastest, better = seconds, candidate
            if better is best and not searching:
                break
            best = better
        tqdm.write(f"{cell}: {kernel} {key}: {1e6 * before:.1f} -> {1e6 * fastest:.1f} µs, {len(tried)} tried, {best}")
        if fastest < before:
            found.add((kernel, key), best, before / fastest)


def neighbours(configuration: Configuration) -> Iterator[Configuration]:
    """The configurations that differ in one parameter by a factor of two, or by one of COUNTS."""
    for name, value in configuration.items():
        low, high = LIMITS.get(name, BLOCK_LIMITS)
        for other in (value - 1, value + 1) if name in COUNTS else (value // 2, value * 2):
            if low <= other <= high:
                yield configuration | {name: other}


def _frozen(configuration: Configuration) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(configuration.items()))


class Call:
    """The op of a cell on the Triton kernels, over inputs larger than the cache, as one call a set."""

    def __init__(self, cell: Cell) -> None:
        self.function, self.names = cell.function("triton"), cell.differentiable() if cell.backward else []
        first = self._set(cell, 0)
        size = sum(t.numel() * t.element_size() for t in first.values())
        sets = min(8, max(2, -(-2 * devices.DEVICES["cuda"].cache_bytes() // size)))
        self.sets = [first, *(self._set(cell, seed) for seed in range(1, sets))]
        self.gradient = torch.randn_like(self.function(**first)) if cell.backward else None

    def _set(self, cell: Cell, seed: int) -> dict[str, Tensor]:
        return {name: t.requires_grad_(name in self.names) for name, t in inputs(cell, seed).items()}

    def __call__(self) -> None:
        for tensors in self.sets:
            self.results(tensors)

    def results(self, tensors: dict[str, Tensor] | None = None) -> list[Tensor]:
        """The output, or the gradients, of one set of inputs."""
        tensors = tensors or self.sets[0]
        if self.gradient is None:
            with torch.no_grad():
                return [self.function(**tensors)]
        return list(torch.autograd.grad(self.function(**tensors), [tensors[n] for n in self.names], self.gradient))

    def seconds(self) -> float:
        """Of one call, the best of several turns of replays."""
        replay = devices.captured(self)
        devices.event_seconds(replay, 3)
        turns = [devices.event_seconds(replay, REPLAYS // len(self.sets) + 1) for _ in range(5)]
        return min(turns) / (REPLAYS // len(self.sets) + 1) / len(self.sets)


_calls: dict[Cell, Call] = {}


def _works(cell: Cell, kernel: str, configuration: Configuration) -> bool:
    """Compiles and runs the op with this configuration in a process of its own, so that the caller finds it compiled,
    and a failure (too much shared memory, say) stays there; False also where the results are others."""
    with contextlib.suppress(Exception):
        if cell not in _calls:
            _calls.clear()
            _calls[cell] = Call(cell)
        expected = _calls[cell].results()
        with configs.overriding(kernel, configs.Config.of(configuration)):
            found = _calls[cell].results()
        return all(rms((a - b).double()) <= TOLERANCE * rms(b.double()) for a, b in zip(found, expected))
    return False


if __name__ == "__main__":
    sys.exit(main())
