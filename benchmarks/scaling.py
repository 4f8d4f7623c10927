"""How time and memory grow: over batches, image sizes and threads, ours beside timm's, and the peak of memory.

python -m benchmarks.scaling [--quick] [--model crossvit_15_dagger_240,crossvit_9_240] [--batch 1,4,16,64]
    [--image 240,360,480,600,720,816] [--threads 1,2] [--dtype float32] [--kernels auto] [--json PATH]

Batches are of the first image size; other sizes are of one image. Implementations take turns in one process; each
cell's logits agreed with timm's in float32 within benchmarks.models' tolerance before. Memory is measured each in
a fresh process (benchmarks.memory), for inference and for a training step.
"""

import argparse
import copy
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import memory, peers, timing
from .labels import labels
from .models import LOGIT_TOLERANCE
from .photographs import photographs
from .plots import scaling as plot_scaling
from .session import DTYPES, KERNELS, RESULTS, counts, names

PEER = "timm-eager"
DEFAULTS: dict[str, Any] = {
    "model": ["crossvit_15_dagger_240", "crossvit_9_240"],
    "batch": [1, 4, 16, 64],
    "image": [240, 360, 480, 600, 720, 816],
    "threads": [1, 2],
    "memory_batch": 8,
}
QUICK: dict[str, Any] = {
    "model": ["crossvit_tiny_240"],
    "batch": [1, 2],
    "image": [240, 360],
    "threads": [1],
    "memory_batch": 2,
}
ROUNDS = (3, 9)  # at least, however long they take; at most
CELL_SECONDS, TURN_SECONDS = 3.0, 0.05
AT_ONCE = 2  # processes that measure memory


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0, 1 where something has no figures, 130 after Ctrl-C."""
    options = _parse(arguments)
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    status, threads = 0, torch.get_num_threads()
    try:
        _time(options, rows, left_out)
        if not options.no_memory:
            _remember(options, rows, left_out)
    except KeyboardInterrupt:
        status = 130
    finally:
        torch.set_num_threads(threads)
    print(timing.environment())
    for line in [*tables(rows), *left_out]:
        print(line)
    if rows:
        picture = options.json.with_suffix(".png")
        if not options.no_plot:
            plot_scaling.scaling(rows, picture)
        print(f"\nWritten: {options.json}" + ("" if options.no_plot else f" and {picture}"))
    return status or int(bool(left_out))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=names(memory.MODELS), help=", ".join(memory.MODELS))
    parser.add_argument("--batch", type=counts, help="images per call: 1,4,16,64")
    parser.add_argument("--image", type=counts, help="sides of the images: 240,480,816")
    parser.add_argument("--threads", type=counts, help="1,2")
    parser.add_argument("--dtype", type=names(list(DTYPES)), default=["float32"], help=", ".join(DTYPES))
    parser.add_argument("--kernels", type=names(KERNELS), default=["auto"], help=", ".join(KERNELS))
    parser.add_argument("--memory-batch", type=int, help="images per call where memory is measured")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--quick", action="store_true", help="a small model, few cells")
    parser.add_argument("--json", type=Path, default=RESULTS / "scaling.json", help="the plot goes beside it")
    parser.add_argument("--no-plot", action="store_true", help="draw none")
    options = parser.parse_args(arguments)
    if options.memory_batch is not None and options.memory_batch < 1:
        parser.error(f"argument --memory-batch: expected at least 1, got {options.memory_batch}")
    for name, value in (QUICK if options.quick else DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


# --- time ---


def _time(options: argparse.Namespace, rows: list[dict[str, Any]], left_out: list[str]) -> None:
    """Appends a row per implementation and cell, and writes the file after each cell."""
    grid = list(itertools.product(options.model, options.image, options.dtype))
    cells = sum(len(_batches(options, side)) * len(options.threads) for _, side, _ in grid)
    with tqdm(total=cells, unit="cell", dynamic_ncols=True) as bar:
        for name, side, dtype in grid:
            models = _models(name, side, options.kernels)
            expected = peers.inference(models[PEER], photographs(1, (side, side)))()
            models = {key: model.to(DTYPES[dtype]) for key, model in models.items()}
            for threads, batch in itertools.product(options.threads, _batches(options, side)):
                bar.set_description(f"{name}, {side}², batch {batch}, {dtype}, {threads} threads")
                torch.set_num_threads(threads)
                images = photographs(batch, (side, side)).to(DTYPES[dtype])
                runs = {key: peers.inference(model, images) for key, model in models.items()}
                cell = {"model": name, "batch": batch, "image": side, "dtype": dtype, "threads": threads}
                for key, run in list(runs.items()):
                    if (why := _wrong(run(), expected, DTYPES[dtype])) is not None:
                        left_out.append(f"left out: {key}, {cell}: {why}")
                        del runs[key]
                for key, seconds in in_turn(runs).items():
                    spread = timing.spread([batch / s for s in seconds])
                    row = memory.row_of(cell | {"mode": "inference", "implementation": key})
                    rows.append(row | {"images_per_second": spread, "rounds": len(seconds)})
                timing.write_json(options.json, rows)
                bar.update()


def _batches(options: argparse.Namespace, side: int) -> list[int]:
    return options.batch if side == options.image[0] else [1]


def _models(name: str, side: int, kernels: Sequence[str]) -> dict[str, nn.Module]:
    """timm's model, with weights that all count, and ours with the same."""
    plain = memory.model_at(name, side, PEER).eval()
    state, weights = plain.state_dict(), peers.timm_model(name).state_dict()
    generator = torch.Generator().manual_seed(0)
    for key, value in weights.items():
        same = value.shape == state[key].shape  # positions are as many as patches
        state[key] = value if same else 0.02 * torch.randn(state[key].shape, generator=generator)
    models = {PEER: plain}
    plain.load_state_dict(state)
    for kernel in kernels:
        models[kernel] = memory.model_at(name, side, kernel).eval()
        models[kernel].load_state_dict(copy.copy(state))
    return models


def _wrong(logits: Tensor, expected: Tensor, dtype: torch.dtype) -> str | None:
    """Why the logits of the first image are not those of timm's float32 model."""
    off = ((logits[:1].float() - expected).abs().max() / expected.abs().max()).item()
    allowed = LOGIT_TOLERANCE[dtype]
    return None if off <= allowed else f"its logits are {off:.2g} of the largest off, {allowed:g} is allowed"


def in_turn(runs: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds per call of each of these, which are warm, in every round. Calls that take long make few rounds."""
    alone = {key: timing.host_seconds(run, 1) for key, run in runs.items()}
    calls = {key: max(1, math.ceil(TURN_SECONDS / seconds)) for key, seconds in alone.items()}
    whole = sum(alone[key] * calls[key] for key in runs)
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(CELL_SECONDS / max(whole, 1e-9))))
    # The call that said how long it takes is a round of its own where no round has more.
    taken = {key: [seconds] if calls[key] == 1 else [] for key, seconds in alone.items()}
    while any(len(seconds) < rounds for seconds in taken.values()):
        for key, run in runs.items():
            if len(taken[key]) < rounds:
                taken[key].append(timing.host_seconds(run, calls[key]) / calls[key])
    return taken


# --- memory ---


def _remember(options: argparse.Namespace, rows: list[dict[str, Any]], left_out: list[str]) -> None:
    """Appends a row per implementation, model, dtype and mode; of inference also one of the largest image alone."""
    small, large, threads = options.image[0], max(options.image), max(options.threads)
    places = [
        ("inference", options.memory_batch, small),
        ("inference", 1, large),
        ("train", options.memory_batch, small),
    ]
    cells = [
        dict(model=name, implementation=key, mode=mode, batch=batch, image=side, dtype=dtype, threads=threads)
        for name, dtype, (mode, batch, side), key in itertools.product(
            options.model, options.dtype, dict.fromkeys(places), (PEER, *options.kernels)
        )
    ]
    with tqdm(total=len(cells), unit="process", desc="memory", dynamic_ncols=True) as bar:
        for first in range(0, len(cells), AT_ONCE):
            started = [(cell, memory.start(cell)) for cell in cells[first : first + AT_ONCE]]
            for cell, process in started:
                try:
                    rows.append(memory.finish(process))
                except RuntimeError as error:
                    left_out.append(f"left out: memory of {cell}: {error}")
                bar.update()
            timing.write_json(options.json, rows)


# --- what is printed ---


def tables(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of Markdown: images per second by batch and by image size, then peaks of memory."""
    timed, called = [row for row in rows if "images_per_second" in row], labels(rows)
    for name, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in timed):
        here = [row for row in timed if (row["model"], row["dtype"]) == (name, dtype)]
        keys = list(dict.fromkeys((row["threads"], row["implementation"]) for row in here))
        yield f"\n{name}, {dtype}, images per second (threads, implementation; in brackets times {PEER})\n"
        yield "| image | batch | " + " | ".join(f"{t}, {called[key]}" for t, key in keys) + " |"
        yield "| --- | --- |" + " --- |" * len(keys)
        for side, batch in dict.fromkeys((row["image_size"], row["batch"]) for row in here):
            found = {
                (row["threads"], row["implementation"]): row["images_per_second"]["median"]
                for row in here
                if (row["image_size"], row["batch"]) == (side, batch)
            }
            figures = [_figure(found, key) for key in keys]
            yield f"| {side} | {batch} | " + " | ".join(figures) + " |"
    measured = [row for row in rows if "peak_bytes" in row]
    if measured:
        keys = list(dict.fromkeys(row["implementation"] for row in measured))
        yield f"\nPeak of memory over the weights, MB (in brackets times {PEER})\n"
        yield "| model | dtype | mode | image | batch | " + " | ".join(called[key] for key in keys) + " |"
        yield "| --- | --- | --- | --- | --- |" + " --- |" * len(keys)
        place = ("model", "dtype", "mode", "image_size", "batch")
        for cell in dict.fromkeys(tuple(row[k] for k in place) for row in measured):
            peaks = {
                (0, row["implementation"]): row["peak_bytes"] / 1e6
                for row in measured
                if tuple(row[k] for k in place) == cell
            }
            yield f"| {' | '.join(map(str, cell))} | " + " | ".join(_figure(peaks, (0, key)) for key in keys) + " |"


def _figure(found: dict[tuple[int, str], float], key: tuple[int, str]) -> str:
    """A figure and its ratio to the peer's under the same threads."""
    peer = found.get((key[0], PEER))
    if key not in found:
        return "–"
    ratio = "" if peer is None or key[1] == PEER else f" ({found[key] / peer:.2f})"
    return f"{found[key]:.3g}{ratio}"


if __name__ == "__main__":
    sys.exit(main())
