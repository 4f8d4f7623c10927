"""What `crossvit_kernels.accelerate` makes of timm's own models: images per second before and after, in turn.

python -m benchmarks.accelerated --model crossvit_9_240,deit_tiny_patch16_224 --batch 1,8 --dtype float32 --json PATH

Before a row is timed its logits agree with the plain model's within benchmarks.throughput's tolerance.
"""

import argparse
import copy
import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from tqdm import tqdm

from crossvit_kernels import accelerate

from . import peers, timing
from .photographs import photographs
from .session import DTYPES, RESULTS, counts, names, rounds
from .throughput import LOGIT_TOLERANCE

# SigLIP's has attention pooling with one query; "base" is the smallest that timm knows.
MODELS = [
    *timm.list_models("crossvit_*"),
    "cait_xxs24_224",
    "deit_tiny_patch16_224",
    "vit_base_patch16_siglip_224",
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0, 1 where logits disagreed, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerated", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=names(timm.list_models()), default=MODELS, help="timm's names")
    parser.add_argument("--batch", type=counts, default=[1, 8], help="images per call: 1,8")
    parser.add_argument("--dtype", type=names(list(DTYPES)), default=["float32"], help=", ".join(DTYPES))
    parser.add_argument("--rounds", type=rounds, default=timing.MIN_ROUNDS, help="at least 9")
    parser.add_argument("--json", type=Path, default=RESULTS / "accelerated.json")
    options = parser.parse_args(arguments)
    cells = list(itertools.product(options.model, options.batch, options.dtype))
    rows: list[dict[str, Any]] = []
    status = 0
    with tqdm(cells, unit="cell", dynamic_ncols=True) as bar:
        try:
            for name, batch, dtype in bar:
                bar.set_description(f"{name}, batch {batch}, {dtype}")
                pair = _compare(name, batch, DTYPES[dtype], options.rounds)
                status |= not pair
                rows += pair
                timing.write_json(options.json, rows)
        except KeyboardInterrupt:
            status = 130
    print(timing.environment())
    print(f"{'model':28} {'batch':>5} {'dtype':9} {'timm-eager':>11} {'accelerated':>11} {'ratio':>6}")
    ratios = []
    for plain, fast in zip(rows[::2], rows[1::2]):
        before, after = (row["images_per_second"]["median"] for row in (plain, fast))
        ratios.append(after / before)
        cell = f"{plain['model']:28} {plain['batch']:>5} {plain['dtype']:9}"
        print(f"{cell} {before:>11.4g} {after:>11.4g} {ratios[-1]:>6.2f}")
    if ratios:
        print(f"geometric mean: {statistics.geometric_mean(ratios):.2f}; written: {options.json}")
    return status


def _compare(name: str, batch: int, dtype: torch.dtype, at_least: int) -> list[dict[str, Any]]:
    """The rows of timm's model and of the accelerated one; none where their logits disagree."""
    model = peers.timm_model(name)
    images = photographs(batch, model.default_cfg["input_size"][-2:])
    with torch.inference_mode():
        expected = model(images)
    plain = model.to(dtype)
    fast = accelerate(copy.deepcopy(plain), verbose=False)
    runs = {
        "timm-eager": peers.inference(plain, images.to(dtype)),
        "accelerated": peers.inference(fast, images.to(dtype)),
    }
    off = ((runs["accelerated"]().float() - expected).abs().max() / expected.abs().max()).item()
    if not off <= LOGIT_TOLERANCE[dtype]:
        print(f"left out: {name}: its logits are {off:.2g} of the largest off, {LOGIT_TOLERANCE[dtype]:g} is allowed")
        return []
    seconds: dict[str, list[float]] = {run: [] for run in runs}
    for run, taken, _ in timing.interleaved(runs, min_rounds=at_least, budget_seconds=6.0):
        if isinstance(taken, Exception):
            raise taken
        seconds[run].append(taken)
    facts = {"model": name, "batch": batch, "dtype": str(dtype).removeprefix("torch."), "mode": "inference"}
    where = {"device": timing.device_name(), "threads": torch.get_num_threads(), "versions": timing.versions()}
    return [
        facts
        | {
            "implementation": run,
            "images_per_second": timing.spread([batch / s for s in taken]),
            "rounds": len(taken),
            **where,
        }
        for run, taken in seconds.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
