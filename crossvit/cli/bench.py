"""`crossvit bench`: images per second of a model with the kernels and without, in turns in one process."""

import argparse
import logging
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from crossvit_kernels import backends

from ..system.failures import CommandError
from ..system.files import write_text
from ..system.text import print_line, to_json
from .commands import Loaded, add_model_arguments, check_fits, check_writable, load, progress
from .export import TOLERANCE

ROUNDS, TURN_SECONDS = 9, 0.1  # the fewest turns that each takes, and how long one lasts at least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=_counts, default=[1, 8], metavar="N,N", help="images per call (default: 1,8)")
    parser.add_argument(
        "--rounds", metavar="N", type=int, default=ROUNDS, help="turns that each takes (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--peers",
        metavar="NAMES",
        help="compare with others too (timm-eager, onnxruntime, …): hands --model, --batch, --dtype, --kernels, "
        "--device and --json on to python -m benchmarks.throughput, which is in the repository and not in the "
        "installed package",
    )
    add_model_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """0; with --peers, the exit status of benchmarks.throughput."""
    if options.rounds < 1:
        raise CommandError(f"--rounds must be at least 1, got {options.rounds}")
    check_writable("--json", options.json)
    if options.peers:
        return _with_peers(options)
    loaded = load(options, needs_weights=False)
    rows = []
    for batch in options.batch:
        numbers = batch * loaded.model.in_chans * math.prod(loaded.model.image_size)
        check_fits(f"--batch {batch}: its images", 4 * numbers)
    for batch in options.batch:
        rows += _compare(loaded, batch, options)
    if options.json:
        write_text(options.json, to_json(rows, indent=1))
    return 0


def _compare(loaded: Loaded, batch: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times the model on `options.kernels` and on the reference; prints and returns a row for each."""
    model = loaded.model
    images = torch.randn(batch, model.in_chans, *model.image_size, device=loaded.device).to(loaded.dtype)
    names = ["reference"] + [options.kernels] * (options.kernels != "reference")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        outputs = {name: _on(loaded, name, images)() for name in names}
        expected = outputs["reference"].double()
        for name, output in outputs.items():
            off = float((output.double() - expected).abs().max() / expected.abs().max())
            if not off <= TOLERANCE[loaded.dtype]:
                raise CommandError(f"kernels={name}: its outputs are {off:.2g} of the largest off the reference's")
        for _ in progress(range(options.rounds), total=options.rounds, unit="round"):
            for name in names:
                seconds[name].append(_time(_on(loaded, name, images)))
    base = statistics.median(seconds["reference"])
    called = {name: _called(name, loaded) for name in names}
    width = max(10, *map(len, called.values()))
    print_line(f"{model.variant}, batch {batch}, {options.dtype}, {loaded.device}, {torch.get_num_threads()} threads")
    for name, own in seconds.items():
        middle, fastest, slowest = (batch / x for x in (statistics.median(own), min(own), max(own)))
        gain = base / statistics.median(own)
        print_line(f"  {called[name]:<{width}} {middle:>9.1f} images/s  ({slowest:.1f} to {fastest:.1f})  {gain:.2f} ×")
        rows.append(
            {
                "model": model.variant,
                "batch": batch,
                "dtype": options.dtype,
                "mode": "inference",
                "implementation": name,
                "backend": "+".join(backends.served_by(name, loaded.device.type, loaded.dtype)),
                "images_per_second": {"median": middle, "min": slowest, "max": fastest},
                "rounds": len(own),
                "device": str(loaded.device),
                "threads": torch.get_num_threads(),
            }
        )
    return rows


def _called(kernels: str, loaded: Loaded) -> str:
    """What --kernels says and, of "auto", what that is here."""
    if kernels != "auto":
        return kernels
    return f"auto ({backends.in_words(kernels, loaded.device.type, loaded.dtype)})"


def _on(loaded: Loaded, kernels: str, images: Tensor) -> Callable[[], Tensor]:
    loaded.model.set_kernels(kernels)
    return lambda: loaded.model(images)


def _time(call: Callable[[], Tensor]) -> float:
    """Seconds per call, over as many as fill a turn, after some that are not counted."""
    timer = _timer()("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=TURN_SECONDS).median


def _timer() -> Any:
    """torch's Timer, imported without what it says of a machine that has nvcc and no GPU."""
    log = logging.getLogger("torch.utils.cpp_extension")
    before, log.disabled = log.disabled, True
    try:
        from torch.utils.benchmark import Timer
    finally:
        log.disabled = before
    return Timer


def _with_peers(options: argparse.Namespace) -> int:
    if options.checkpoint or options.set or options.image_size or not options.model:
        raise CommandError(
            "--peers times timm's models by name: expected --model NAME, and no --checkpoint, --set or --image-size"
        )
    try:
        found = find_spec("benchmarks.throughput") is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise CommandError(
            "--peers needs the repository's benchmarks: run it in the repository, with pip install "
            "--no-build-isolation '.[bench]'; without --peers nothing more is needed"
        )
    handed = ["--model", options.model, "--batch", ",".join(map(str, options.batch)), "--dtype", options.dtype]
    handed += ["--kernels", ",".join(dict.fromkeys(("reference", options.kernels))), "--peers", options.peers]
    handed += ["--rounds", str(options.rounds)] + ["--json", options.json] * bool(options.json)
    handed += ["--device", options.device] * bool(options.device)
    return subprocess.call([sys.executable, "-m", "benchmarks.throughput", *handed])


def _counts(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"expected positive integers with commas between, such as 1,8, got {text!r}")
    return found
