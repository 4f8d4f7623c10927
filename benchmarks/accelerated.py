"""What `crossvit_kernels.accelerate` makes of timm's own models: images per second before and after, in turn.

python -m benchmarks.accelerated --model crossvit_9_240,deit_tiny_patch16_224 --batch 1,8 --dtype float32 --json PATH

Before a row is timed its logits agree with the plain model's within benchmarks.models' tolerance.
"""

import argparse
import copy
import functools
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from crossvit_kernels import accelerate

from . import peers, timing
from .labels import WORDS, backend
from .models import LOGIT_TOLERANCE
from .photographs import photographs
from .session import DTYPES, RESULTS, counts, names, rounds

TURN_SECONDS = 0.05
CELL_SECONDS = 3.0  # more rounds than asked for are made where they fit into this
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
    cells = list(itertools.product(options.model, options.dtype, options.batch))
    rows: list[dict[str, Any]] = []
    status = 0
    with tqdm(cells, unit="cell", dynamic_ncols=True) as bar:
        try:
            for name, dtype, batch in bar:
                bar.set_description(f"{name}, {dtype}, batch {batch}")
                pair = _compare(name, batch, dtype, options.rounds)
                status |= not pair
                rows += pair
                timing.write_json(options.json, rows)
        except KeyboardInterrupt:
            status = 130
    print(timing.environment())
    for line in table(rows):
        print(line)
    if rows:
        print(f"\nWritten: {options.json}")
    return status


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of Markdown: images per second of each pair of rows, and their ratios' geometric mean."""
    ran = dict.fromkeys(name for row in rows for name in row.get("backend", "").split("+") if name)
    by = f" ({' and '.join(WORDS[name] for name in ran)})" if ran else ""
    yield f"\n| model | dtype | batch | timm, images/s | accelerated{by} | ratio |"
    yield "| --- | --- | --- | --- | --- | --- |"
    ratios = []
    for plain, fast in zip(rows[::2], rows[1::2]):
        before, after = (row["images_per_second"]["median"] for row in (plain, fast))
        ratios.append(after / before)
        cell = " | ".join(str(plain[key]) for key in ("model", "dtype", "batch"))
        yield f"| {cell} | {before:.4g} | {after:.4g} | {ratios[-1]:.2f} |"
    if ratios:
        yield f"\nGeometric mean of the ratios: {statistics.geometric_mean(ratios):.2f}, at least {min(ratios):.2f}"


@functools.lru_cache(maxsize=1)
def _models(name: str, dtype: str) -> tuple[dict[str, nn.Module], Tensor]:
    """timm's model and the accelerated one, and the plain one's float32 logits of the first photograph."""
    model = peers.timm_model(name)
    expected = peers.inference(model, _images(model, 1))()
    plain = model.to(DTYPES[dtype])
    return {"timm-eager": plain, "accelerated": accelerate(copy.deepcopy(plain), verbose=False)}, expected


def _images(model: Any, batch: int) -> Tensor:
    return photographs(batch, model.default_cfg["input_size"][-2:])


def _compare(name: str, batch: int, dtype: str, at_least: int) -> list[dict[str, Any]]:
    """The rows of timm's model and of the accelerated one; none where their logits disagree."""
    models, expected = _models(name, dtype)
    images, allowed = _images(models["timm-eager"], batch).to(DTYPES[dtype]), LOGIT_TOLERANCE[DTYPES[dtype]]
    runs = {key: peers.inference(model, images) for key, model in models.items()}
    off = ((runs["accelerated"]()[:1].float() - expected).abs().max() / expected.abs().max()).item()
    if not off <= allowed:
        tqdm.write(f"left out: {name}: its logits are {off:.2g} of the largest off, {allowed:g} is allowed")
        return []
    seconds: dict[str, list[float]] = {run: [] for run in runs}
    for run, taken, _ in timing.interleaved(
        runs, min_rounds=at_least, turn_seconds=TURN_SECONDS, budget_seconds=CELL_SECONDS
    ):
        if isinstance(taken, Exception):
            raise taken
        seconds[run].append(taken)
    facts = {"model": name, "batch": batch, "dtype": dtype, "mode": "inference"}
    where = {"device": timing.device_name(), "threads": torch.get_num_threads(), "versions": timing.versions()}
    return [
        facts
        | {
            "implementation": run,
            **(backend("auto", "cpu", DTYPES[dtype]) if run == "accelerated" else {}),
            "images_per_second": timing.spread([batch / s for s in taken]),
            "rounds": len(taken),
            **where,
        }
        for run, taken in seconds.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
