"""How everything here is timed: candidates in turn in one process; and on what machine, with which packages."""

import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

MIN_ROUNDS = 9
WARM_UP_SECONDS = 0.3
PACKAGES = ("torch", "timm", "onnxruntime", "openvino", "crossvit-kernels")

Stopwatch = Callable[[Callable[[], object], int], float]  # (a call, how many of them) -> seconds, all together


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = 25,
    turn_seconds: float = 0.1,
    budget_seconds: float = 8.0,
    warm_up_seconds: float | None = None,
    stopwatch: Stopwatch | None = None,
) -> Iterator[tuple[str, float | Exception, int]]:
    """Time `candidates` in turn, A B C A B C …, and yield (name, seconds per call, rounds planned) after each turn.

    A turn is as many calls as fill `turn_seconds`, at least one; before them, where they are short, one untimed call
    that takes caches and cores back from the candidate before it. There are `min_rounds` rounds, and more, up to
    `max_rounds`, where they fit into `budget_seconds`. A candidate that raises is yielded once with its exception and
    then left out. Python's garbage collector is off while a turn is timed. `stopwatch` measures the seconds of so many
    calls, by default `host_seconds`; warming up takes `warm_up_seconds`, by default WARM_UP_SECONDS.
    """
    if min_rounds < MIN_ROUNDS:
        raise ValueError(f"min_rounds must be at least {MIN_ROUNDS}, got {min_rounds}")
    stopwatch = stopwatch or host_seconds
    live = dict(candidates)
    calls: dict[str, int] = {}
    round_seconds = 0.0
    for name, run in candidates.items():
        try:
            seconds = warm_up(run, WARM_UP_SECONDS if warm_up_seconds is None else warm_up_seconds, stopwatch)
        except Exception as error:
            del live[name]
            yield name, error, min_rounds
            continue
        calls[name] = max(1, math.ceil(turn_seconds / seconds))
        round_seconds += seconds * (calls[name] + (calls[name] > 1))
    rounds = max(min_rounds, min(max_rounds, int(budget_seconds / max(round_seconds, 1e-9))))
    for _ in range(rounds):
        for name in list(live):
            try:
                yield name, turn(live[name], calls[name], stopwatch), rounds
            except Exception as error:
                del live[name]
                yield name, error, rounds


def host_seconds(run: Callable[[], object], calls: int) -> float:
    """Seconds that so many calls take by the host's clock."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - start


def warm_up(run: Callable[[], object], seconds: float, stopwatch: Stopwatch = host_seconds) -> float:
    """Seconds of the fastest call of at least three, which go on for `seconds`."""
    fastest, end, done = math.inf, time.perf_counter() + seconds, 0
    while done < 3 or time.perf_counter() < end:
        fastest = min(fastest, stopwatch(run, 1))
        done += 1
    return fastest


def turn(
    run: Callable[[], object], calls: int, stopwatch: Stopwatch = host_seconds, settle_seconds: float = 0.0
) -> float:
    """Seconds per call of so many calls, without Python's garbage collector. Before them, where there are several,
    untimed calls go on for `settle_seconds`, at least one: they take caches and cores back from whoever ran before."""
    if calls > 1:
        end = time.perf_counter() + settle_seconds
        run()
        while time.perf_counter() < end:
            run()
    collecting = gc.isenabled()
    gc.disable()
    try:
        return stopwatch(run, calls) / calls
    finally:
        if collecting:
            gc.enable()


def spread(samples: list[float]) -> dict[str, float]:
    """{"median", "min", "max"} of the samples, to four significant digits."""
    figures = {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}
    return {key: float(f"{value:.4g}") for key, value in figures.items()}


def device_name() -> str:
    """The processor's name and the cores this process may use, e.g. "AMD EPYC (2 cores)"."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name} ({cores} cores)"


def versions() -> dict[str, str]:
    """Python's version and that of each of PACKAGES that is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment() -> str:
    """Device and versions in a line."""
    return f"{device_name()}; " + ", ".join(f"{name} {version}" for name, version in versions().items())


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows, one a line, under a temporary name and rename it, so that a reader never meets half a file."""
    write_text(path, "[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]\n")


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
