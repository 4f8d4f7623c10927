"""Time of each op on our kernels beside its reference, compiled or not, and beside its floor, at CrossViT-15's sizes.

python -m benchmarks.ops --op all [--dtype float32,bfloat16] [--batch 1,32] [--kernels reference,auto] [--backward]
    [--device cuda]

An implementation is timed only after its output (and, with --backward, every gradient) agreed with the float64
reference on the same inputs within AGREEMENT. Calls rotate over as many sets of inputs as exceed the caches twice.
On a GPU one CUDA graph holds the calls of one rotation, and its replays are timed.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import floor, timing
from .agreement import AGREEMENT, check
from .cases import (
    BRANCHES,
    EXTREMES,
    INFERENCE_ONLY,
    OPS,
    Cell,
    call,
    inputs,
    output_gradient,
    results,
    sdpa,
    usual_batch,
)
from .devices import DEVICES, captured, use
from .labels import backend, labels
from .plots import bars as plot
from .session import (
    DTYPES,
    RESULTS,
    DisagreementError,
    Session,
    add_device_arguments,
    add_shared_arguments,
    check_device,
    counts,
    dtype_name,
    names,
    where,
)

PEERS = ("reference-compiled", "sdpa")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
TURN_SECONDS = 0.05  # how long a candidate's turn lasts at least
CELL_SECONDS = 3.0  # more rounds than asked for are made where they fit into this
GPU_TURN_SECONDS, GPU_CELL_SECONDS = 0.003, 0.3


@dataclass
class Result:
    """One implementation in one cell, with its time per call for each round."""

    cell: Cell
    implementation: str
    floor_seconds: float
    seconds: list[float]

    def microseconds(self) -> dict[str, float]:
        return timing.spread([1e6 * seconds for seconds in self.seconds])

    def row(self) -> dict[str, Any]:
        branch = self.cell.sizes
        return {
            "op": self.cell.op,
            "branch": self.cell.branch,
            "tokens": branch.tokens,
            "width": branch.width,
            "batch": self.cell.batch,
            "dtype": dtype_name(self.cell.dtype),
            "mode": self.cell.mode,
            "implementation": self.implementation,
            **backend(self.implementation, self.cell.device, self.cell.dtype),
            "microseconds": self.microseconds(),
            "floor_microseconds": float(f"{1e6 * self.floor_seconds:.4g}"),
            "rounds": len(self.seconds),
            **DEVICES[self.cell.device].facts(),
            "threads": self.cell.threads,
            "versions": DEVICES[self.cell.device].versions(),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0, or 1 where one of our kernels has no row, or 130 after Ctrl-C."""
    options = _parse(arguments)
    device = use(options.device)
    modes = [False, True] if options.both else [options.backward]
    cells = [
        Cell(op, branch, batch, DTYPES[dtype], backward, threads, options.device)
        for op, backward, branch in itertools.product(options.op, modes, options.branch)
        for threads, dtype in itertools.product(options.threads, options.dtype)
        for batch in options.batch or [usual_batch(op)]
        if not (backward and op in INFERENCE_ONLY) or options.plan
    ]
    if options.plan:
        from .inspect import plan  # imports triton

        torch.backends.cuda.matmul.allow_tf32 = options.tf32
        kept = [replace(cell, backward=cell.backward and cell.op not in INFERENCE_ONLY) for cell in cells]
        cells = list(dict.fromkeys(kept))
        kernels = [name for name in options.kernels if name in ("triton", "cuda")] or ["triton", "cuda"]
        plan.show(cells, options.architecture, options.json, options.autocast, kernels)
        return 0
    candidates = {cell: [*options.kernels, *(peer for peer in options.peers if _has(cell, peer))] for cell in cells}
    results: list[Result] = []
    turns = (TURN_SECONDS, CELL_SECONDS) if options.device == "cpu" else (GPU_TURN_SECONDS, GPU_CELL_SECONDS)
    steps = sum(map(len, candidates.values()))
    with Session(steps, options.rounds, *turns, device, options.seconds) as session:
        for cell in cells:
            torch.set_num_threads(cell.threads)
            if not session.begin(cell):
                continue
            inputs = _rotation(cell)
            moved = _moved(cell, inputs[0])
            flops: dict[str, int] = {}
            seconds: dict[str, list[float]] = {}
            builders = {name: functools.partial(_build, cell, name, inputs, flops) for name in candidates[cell]}
            try:
                session.compare(cell, builders, seconds)
            finally:
                if seconds:
                    least = _floor(cell, moved, min(flops.values(), default=0))
                    calls = 1 if cell.device == "cpu" else len(inputs)
                    results += [Result(cell, name, least, [s / calls for s in t]) for name, t in seconds.items()]
                timing.write_json(options.json, [result.row() for result in results])
    _print(results, options.device)
    session.conclude(None if options.no_plot else plot.ops, [result.row() for result in results], options.json)
    return session.exit_status(options.kernels)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__.partition("\n")[0])
    parser.add_argument("--op", type=names(OPS, OPS), default=list(OPS), help=f"all, {', '.join(OPS)}")
    parser.add_argument(
        "--batch", type=counts, help="1,8 (by default 32 for the ops on the CLS token, 8 for the others)"
    )
    parser.add_argument("--backward", action="store_true", help="time forward and backward together")
    parser.add_argument("--both", action="store_true", help="time the forward alone, then with the backward")
    branches = [*BRANCHES, *EXTREMES]
    parser.add_argument("--branch", type=names(branches), default=list(BRANCHES), help=", ".join(branches))
    parser.add_argument("--plan", action="store_true", help="what the GPU kernels will do, without a GPU")
    parser.add_argument("--autocast", action="store_true", help="of --plan: inputs as under autocast to the dtype")
    parser.add_argument("--tf32", action="store_true", help="of --plan: float32 products in TF32")
    parser.add_argument("--architecture", type=names(ARCHITECTURES, ARCHITECTURES), default=["sm_90"], help="of --plan")
    add_shared_arguments(parser, PEERS, "ops")
    add_device_arguments(parser)
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    if not options.plan:
        options.json = options.json or RESULTS / ("ops_backward.json" if options.backward else "ops.json")
    return options


def _has(cell: Cell, peer: str) -> bool:
    """Whether there is such a peer; self_attention's reference is SDPA itself."""
    return peer == "reference-compiled" or cell.op == "cls_cross_attention"


def _rotation(cell: Cell) -> list[dict[str, Tensor]]:
    """As many sets of inputs as exceed the last cache twice, at least two."""
    first = inputs(cell, 0)
    sets = max(2, -(-2 * DEVICES[cell.device].cache_bytes() // _bytes(first.values())))
    return [first, *(inputs(cell, seed) for seed in range(1, sets))]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _build(cell: Cell, name: str, inputs: list[dict[str, Tensor]], flops: dict[str, int]) -> Callable[[], object]:
    """The call to be timed, a set of inputs further each time; `flops` gets its operations where they can be seen."""
    function: Callable[..., Tensor]
    if name == "sdpa":
        function = functools.partial(sdpa, num_heads=cell.sizes.heads)
    elif name == "reference-compiled":
        torch.compiler.reset()
        mode = None if cell.device == "cpu" else "max-autotune-no-cudagraphs"
        function = torch.compile(cell.reference(), dynamic=False, mode=mode)
    else:
        function = cell.function(name)
    check(cell, function, inputs[0])
    gradient = output_gradient(cell, function, inputs[0])
    run = call(cell, function, inputs, gradient)
    if name != "reference-compiled":
        flops[name] = floor.executed_flops(run)
    return run if cell.device == "cpu" else _captured(run, len(inputs), [] if gradient is None else [gradient])


def _captured(run: Callable[[], object], calls: int, given: Sequence[Tensor]) -> Callable[[], object]:
    """So many calls as one CUDA graph, whose results all stay in memory of their own."""
    replay = captured(lambda: [run() for _ in range(calls)], given, warm_up=run)
    for result in replay():
        for tensor in [result] if isinstance(result, Tensor) else result:
            if not tensor.isfinite().all():
                raise DisagreementError("a replay of its CUDA graph does not write all of its results")
    return replay


def _moved(cell: Cell, tensors: dict[str, Tensor]) -> int:
    """Bytes of a call that reads or writes every tensor once."""
    out = results(cell, cell.reference(), tensors)
    moved = _bytes(tensors.values()) + _bytes(out[:1])
    if cell.backward:  # reads the inputs and the output's gradient again, writes the gradients
        moved += _bytes(tensors.values()) + _bytes(out)
    return moved


def _floor(cell: Cell, moved: int, flops: int) -> float:
    """Seconds below which no implementation gets that moves so many bytes from memory and does so many operations."""
    device = DEVICES[cell.device]
    rate, _ = device.flop_rate(cell.dtype, cell.threads)
    return max(moved / device.bandwidth(cell.threads), flops / rate)


def _print(results: list[Result], kind: str) -> None:
    device = DEVICES[kind]
    called = labels([result.row() for result in results])
    width = max(map(len, called.values()), default=0)
    for cell, group in itertools.groupby(results, key=lambda result: result.cell):
        rows = list(group)
        medians = {row.implementation: row.microseconds()["median"] for row in rows}
        against = [name for name in ("reference", *PEERS) if name in medians]
        ratios = "".join(f"{'× ' + name:>21}" for name in against)
        print(f"\n{cell}: floor {1e6 * rows[0].floor_seconds:.0f} µs")
        print(f"  {'':{width}}  {'µs':>8} {'min':>8} {'max':>8}  rounds  × floor{ratios}")
        for row in rows:
            figures = row.microseconds()
            ratios = "".join(f"{medians[name] / figures['median']:21.2f}" for name in against)
            print(
                f"  {called[row.implementation]:{width}}"
                f"  {figures['median']:8.1f} {figures['min']:8.1f} {figures['max']:8.1f}"
                f"  {len(row.seconds):6d}  {figures['median'] / 1e6 / row.floor_seconds:7.1f}{ratios}"
            )
    print()
    for dtype, threads in dict.fromkeys((result.cell.dtype, result.cell.threads) for result in results):
        rate, by = device.flop_rate(dtype, threads)
        print(f"{dtype_name(dtype)}, {where(kind, threads)}: peak {rate / 1e9:.0f} GFLOP/s ({by})")
    for threads in dict.fromkeys(result.cell.threads for result in results):
        print(f"memory, {where(kind, threads)}: {device.bandwidth(threads) / 1e9:.1f} GB/s, read plus written")
    print(
        f"agreement: rms error against float64 at most {AGREEMENT} × the reference's in the dtype plus {AGREEMENT} ulp"
    )
    print(device.environment())


if __name__ == "__main__":
    sys.exit(main())
