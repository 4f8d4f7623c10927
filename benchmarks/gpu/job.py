"""Everything there is to do on a machine with an NVIDIA GPU, in one command, without a network: `make gpu`.

python -m benchmarks.gpu [--out DIR] [--minutes 8] [--stages build,test,sanitize,models,ops,train,compiled] [--smoke]

Builds the extension for this machine, runs the tests that need a GPU and compute-sanitizer over every op, times ops and
models beside their peers. Uses the torch of the Python that runs it and installs nothing. Writes gpu.json (rows of
`benchmarks.throughput`, of `benchmarks.ops` and of the stages), gpu.log and plots to DIR; prints the tables last.
"""

import argparse
import functools
import json
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import timing
from . import report
from .stages import Outcome, Runner, Stage

ROOT = Path(__file__).resolve().parents[2]
GROUPS = ("build", "test", "sanitize", "models", "ops", "train", "compiled")


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where a stage failed or ran out of time, or where there is no GPU; 130 after Ctrl-C."""
    options = _parse(arguments)
    if (reason := missing()) is not None:
        print(f"make gpu needs an NVIDIA GPU and a torch, 2.11 or newer, that can use it: {reason}.", file=sys.stderr)
        return 1
    from .plan import planned  # imports torch

    for number in (signal.SIGINT, signal.SIGTERM):  # nothing is left running; SIGINT also reaches who ignored it
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="crossvit-gpu-") as folder:
        stages = [stage for stage in planned(ROOT, Path(folder), options.smoke) if stage.group in options.stages]
        return run(stages, 60 * options.minutes, Path(folder), options.out)


def run(stages: Sequence[Stage], seconds: float, folder: Path, out: Path) -> int:
    """Run the stages, which put their rows into `folder`; write what came of them to `out` and print it."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu.log"
    log.write_text("")
    outcomes: list[Outcome] = []

    def done(outcome: Outcome) -> None:
        outcomes.append(outcome)
        with log.open("a") as file:
            file.write(f"=== {outcome.stage.name}: {outcome.status} {outcome.note}\n{outcome.output}\n")
        timing.write_json(out / "gpu.json", _rows(folder) + [o.row() | facts() for o in outcomes])

    runner = Runner(seconds, ROOT, done, lambda line: print(line, file=sys.stderr, flush=True))
    runner.run(stages)
    rows = _rows(folder)
    written = [out / "gpu.json", log, *report.draw(rows, out)]
    print(report.failures(outcomes), report.models(rows), report.ops(rows), report.stages(outcomes), sep="\n")
    print(" ".join(f"{key} {value}," for key, value in facts().items()), "written:", *written)
    return 130 if runner.interrupted else int(any(outcome.failed for outcome in outcomes))


def missing() -> str | None:
    """What keeps this from running here, or None."""
    try:
        import torch
    except ModuleNotFoundError:
        return f"there is no torch in {sys.executable}"
    from ..devices import no_gpu

    version = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    return f"this is torch {torch.__version__}" if version < (2, 11) else no_gpu()


@functools.cache
def facts() -> dict[str, Any]:
    """Device, driver and date, as the rows have them."""
    from ..devices import DEVICES

    return DEVICES["cuda"].facts()


def _rows(folder: Path) -> list[dict[str, Any]]:
    """What the stages have written so far, oldest first."""
    files = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    return report.merged([json.loads(file.read_text()) for file in files])


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def groups(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in GROUPS]:
            raise argparse.ArgumentTypeError(
                f"unknown {', '.join(map(repr, unknown))}, expected of {', '.join(GROUPS)}"
            )
        return chosen

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="benchmarks/results")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together: 8")
    parser.add_argument("--stages", type=groups, default=list(GROUPS), help=", ".join(GROUPS))
    parser.add_argument("--smoke", action="store_true", help="as little as possible of everything, to see that it runs")
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    return options
