"""Images per second of CrossViT models on our kernels beside what a user would pick instead, in one process, in turn.

python -m benchmarks.throughput --model crossvit_15_dagger_240 --batch 1,8 --dtype float32,bfloat16 \\
    --kernels reference,auto --peers timm-eager,timm-compiled,onnxruntime,openvino --json PATH [--train] [--device cuda]

Every candidate has the same weights and sees the same photographs. It is timed only after its logits (and, with
--train, its gradients) agreed with the float32 reference's within LOGIT_TOLERANCE and GRADIENT_TOLERANCE. bfloat16 and
float16 mean a model cast to it, for training autocast. On a GPU a name with "-graph" behind it is replayed as a CUDA
graph; images lie in the GPU's memory.
"""

import argparse
import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor

import crossvit

from . import floor, models, peers, timing
from .devices import DEVICES, Host, captured, use
from .labels import backend, labels
from .models import GRADIENT_TOLERANCE, LOGIT_TOLERANCE, Cell
from .plots import bars as plot
from .session import (
    DTYPES,
    GRAPH,
    GRAPHS,
    KERNELS,
    RESULTS,
    Session,
    add_device_arguments,
    add_shared_arguments,
    check_device,
    counts,
    dtype_name,
    names,
    where,
)
from .training import peer_step

TURN_SECONDS = 0.1  # how long a candidate's turn lasts at least
CELL_SECONDS = 8.0  # more rounds than asked for are made where they fit into this
ALL_PEERS = [*peers.PEERS, *(name + GRAPH for name in peers.GPU_PEERS)]
GPU_TURN_SECONDS, GPU_CELL_SECONDS = 0.03, 2.5


@dataclass
class Result:
    """One candidate in one cell: by how much its logits were off, its operations, its time per call for each round."""

    cell: Cell
    implementation: str
    difference: float
    flops: int
    seconds: list[float]

    def images_per_second(self) -> dict[str, float]:
        return timing.spread([self.cell.batch / seconds for seconds in self.seconds])

    def row(self) -> dict[str, Any]:
        return {
            "model": self.cell.model,
            "batch": self.cell.batch,
            "dtype": dtype_name(self.cell.dtype),
            "mode": self.cell.mode,
            "implementation": self.implementation,
            **backend(self.implementation, self.cell.device, self.cell.dtype),
            "images_per_second": self.images_per_second(),
            "rounds": len(self.seconds),
            **DEVICES[self.cell.device].facts(),
            "threads": self.cell.threads,
            "versions": DEVICES[self.cell.device].versions(),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0, or 1 where one of our kernels has no row, or 130 after Ctrl-C."""
    options = _parse(arguments)
    device = use(options.device)
    grid = itertools.product(options.model, options.threads, options.batch, options.dtype)
    cells = [Cell(model, b, DTYPES[dtype], t, options.train, options.device) for model, t, b, dtype in grid]
    implementations = [*options.kernels, *options.peers]
    results: list[Result] = []
    turns = (TURN_SECONDS, CELL_SECONDS) if options.device == "cpu" else (GPU_TURN_SECONDS, GPU_CELL_SECONDS)
    steps = len(cells) * len(implementations)
    with Session(steps, options.rounds, *turns, device, options.seconds) as session:
        for cell in cells:
            torch.set_num_threads(cell.threads)
            if not session.begin(cell):
                continue
            known: dict[str, tuple[float, int]] = {}
            seconds: dict[str, list[float]] = {}
            runs: dict[str, Callable[[], Tensor]] = {}
            device.flop_rate(cell.dtype, cell.threads)
            builders = {name: functools.partial(_build, cell, name, known, runs) for name in implementations}
            try:
                session.compare(cell, builders, seconds)
            finally:
                results += [Result(cell, name, *known[name], taken) for name, taken in seconds.items()]
                timing.write_json(options.json, [result.row() for result in results])
    _print_tables(results, options.peers, device)
    _print_summary(results, options)
    draw = None if options.no_plot else plot.throughput
    session.conclude(draw, [result.row() for result in results], options.json)
    return session.exit_status(options.kernels)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__.partition("\n")[0])
    known = list(filter(timm.is_model, crossvit.list_models()))
    default_models = ["crossvit_9_240", "crossvit_15_dagger_240"]
    parser.add_argument("--model", type=names(known), default=default_models, help=", ".join(known))
    parser.add_argument("--batch", type=counts, default=[1, 8], help="images per call: 1,8")
    parser.add_argument("--train", action="store_true", help="time a training step; bfloat16 and float16 by autocast")
    add_shared_arguments(parser, ALL_PEERS, "throughput", KERNELS + GRAPHS)
    add_device_arguments(parser)
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    _choose(parser, options)
    options.json = options.json or RESULTS / ("training.json" if options.train else "throughput.json")
    return options


def _choose(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Take all peers to be those of the device, and refuse what it has not."""
    known = [name for name in peers.PEERS if options.device == "cpu" or name in peers.GPU_PEERS]
    known += [] if options.device == "cpu" or options.train else [name + GRAPH for name in known]
    if options.peers == ALL_PEERS:
        options.peers = known
    if foreign := [name for name in options.peers if name not in known]:
        parser.error(f"argument --peers: no {', '.join(foreign)} on this device, expected of {', '.join(known)}")
    graphs = [name for name in options.kernels if name.endswith(GRAPH)]
    if graphs and (options.device == "cpu" or options.train):
        parser.error(f"argument --kernels: {', '.join(graphs)} is for inference on a GPU")


def _build(
    cell: Cell, name: str, known: dict[str, tuple[float, int]], runs: dict[str, Callable[[], Tensor]]
) -> Callable[[], Tensor]:
    """The call to be timed; `known` gets by how much its logits differ from the reference's, and its operations; `runs`
    holds what was built for this cell, for the graphs of it."""
    base = name.removesuffix(GRAPH)
    if base not in runs:
        runs[base] = models.our_call(cell, base) if base in KERNELS else _peer_call(cell, base)
    run = runs[base] if base == name else captured(runs[base])
    known[name] = models.check(cell, run), _flops(cell, base, runs[base])
    return run


def _peer_call(cell: Cell, name: str) -> Callable[[], Tensor]:
    model, images = models.timm_model(cell.model, cell.device), models.images(cell.model, cell.batch, cell.device)
    return peer_step(name, model, images, cell.dtype) if cell.train else peers.PEERS[name](model, images, cell.dtype)


def _flops(cell: Cell, name: str, run: Callable[[], object]) -> int:
    """Floating-point operations of one call; an engine whose operations cannot be seen counts as the timm model."""
    if name in KERNELS or name == "timm-eager":
        return floor.executed_flops(run)
    return _timm_flops(cell.model, cell.batch, cell.train, cell.device)


@functools.lru_cache(maxsize=2)
def _timm_flops(name: str, batch: int, train: bool, device: str) -> int:
    model, images = models.timm_model(name, device), models.images(name, batch, device)
    return floor.executed_flops(
        peer_step("timm-eager", model, images, torch.float32) if train else peers.inference(model, images)
    )


def _print_tables(results: list[Result], peer_names: list[str], device: Host) -> None:
    called = labels([result.row() for result in results])
    width = max(map(len, called.values()), default=0)
    for cell, group in itertools.groupby(results, key=lambda result: result.cell):
        rows = list(group)
        medians = {row.implementation: row.images_per_second()["median"] for row in rows}
        present = [peer for peer in peer_names if peer in medians]
        rate, _ = device.flop_rate(cell.dtype, cell.threads)
        ratios = "".join(f"{'× ' + peer:>17}" for peer in present)
        print(f"\n{cell}\n  {'':{width}}  images/s    min    max  rounds  logits off  of peak{ratios}")
        for row in rows:
            figures = row.images_per_second()
            share = row.flops / cell.batch * figures["median"] / rate
            ratios = "".join(f"{figures['median'] / medians[peer]:17.2f}" for peer in present)
            print(
                f"  {called[row.implementation]:{width}}"
                f"  {figures['median']:8.4g} {figures['min']:6.4g} {figures['max']:6.4g}"
                f"  {len(row.seconds):6d}  {row.difference:10.1e}  {share:7.0%}{ratios}"
            )


def _print_summary(results: list[Result], options: argparse.Namespace) -> None:
    """Geometric means over the cells, what was held against what, and where."""
    device = DEVICES[options.device]
    medians = {(result.cell, result.implementation): result.images_per_second()["median"] for result in results}
    cells = list(dict.fromkeys(result.cell for result in results))
    called = labels([result.row() for result in results])
    print()
    for kernels, peer in itertools.product(options.kernels, options.peers):
        both = [cell for cell in cells if (cell, kernels) in medians and (cell, peer) in medians]
        ratios = [medians[cell, kernels] / medians[cell, peer] for cell in both]
        if ratios:
            mean = statistics.geometric_mean(ratios)
            print(
                f"{called[kernels]}: {mean:.2f} × {peer} in the geometric mean of {len(both)} cells, "
                f"at least {min(ratios):.2f}"
            )
    for dtype, threads in dict.fromkeys((cell.dtype, cell.threads) for cell in cells):
        rate, by = device.flop_rate(dtype, threads)
        place = where(options.device, threads)
        gradients = f", gradients within {GRADIENT_TOLERANCE[dtype]:g} of their norm" if options.train else ""
        print(
            f"{dtype_name(dtype)}, {place}: peak {rate / 1e9:.0f} GFLOP/s ({by}); logits within"
            f" {LOGIT_TOLERANCE[dtype]:g} of the largest of the float32 reference's{gradients}"
        )
    print(device.environment())


if __name__ == "__main__":
    sys.exit(main())
