"""What both benchmarks share: arguments, and a run with one progress bar that survives failures and Ctrl-C."""

import argparse
import math
import time
import traceback
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from crossvit_kernels.backends import BACKENDS

from . import STARTED, timing
from .devices import Host, no_gpu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KERNELS = ("auto", *BACKENDS)
GRAPH = "-graph"  # ends the name of what is replayed as a CUDA graph
GRAPHS = tuple(name + GRAPH for name in KERNELS if name != "cpu")
RESULTS = Path(__file__).with_name("results")


class LeftOutError(RuntimeError):
    """A candidate has no row, for a reason that needs no name of an exception beside it."""


class UnsupportedError(LeftOutError):
    """It has no way to do what was asked, as opposed to failing at it."""


class DisagreementError(LeftOutError):
    """It computes something else than the reference."""


class Session:
    """A context in which cells of candidates are prepared, checked and timed; Ctrl-C ends it and sets `interrupted`.

    `left_out` says why a candidate of a cell has no figures. A turn lasts at least `turn_seconds`; there are more
    rounds than asked for where they fit into `cell_seconds`. No cell is begun after `seconds` on the way, which counts
    as no failure, nor once `device` is `lost`, which does.
    """

    def __init__(
        self,
        candidates: int,
        rounds: int,
        turn_seconds: float,
        cell_seconds: float,
        device: Host | None = None,
        seconds: float = math.inf,
    ) -> None:
        self.rounds, self.turn_seconds, self.cell_seconds = rounds, turn_seconds, cell_seconds
        self.device, self.seconds, self.end = device or Host(), seconds, STARTED + seconds
        self.left_out: dict[tuple[Hashable, str], str] = {}
        self.unreached: list[Hashable] = []
        self.lost: str | None = None
        self.interrupted = False
        self.bar = tqdm(total=candidates * (1 + rounds), unit="step", smoothing=0.05, dynamic_ncols=True)

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self.bar.close()
        self.interrupted = kind is KeyboardInterrupt
        return self.interrupted

    def begin(self, cell: Hashable) -> bool:
        """Whether this cell is still to be done."""
        if self.lost is None and time.monotonic() < self.end:
            return True
        self.unreached.append(cell)
        return False

    def compare(
        self,
        cell: Hashable,
        builders: Mapping[str, Callable[[], Callable[[], object]]],
        seconds: dict[str, list[float]],
    ) -> None:
        """Build every candidate's call, then time them in turn; `seconds` holds what was measured so far at any moment.

        A builder or a call that raises costs its candidate its figures, and the others go on.
        """
        runs: dict[str, Callable[[], object]] = {}
        for name, build in builders.items():
            self.bar.set_description(f"{cell}: prepare {name}")
            try:
                runs[name] = build()
            except Exception as error:
                self._leave_out(cell, name, error, steps_saved=self.rounds)
                if self.lost is not None:
                    return
            self.bar.update()
        self.bar.set_description(f"{cell}: time")
        planned = self.rounds
        for name, taken, rounds in timing.interleaved(
            runs,
            min_rounds=self.rounds,
            turn_seconds=self.turn_seconds,
            budget_seconds=self.cell_seconds,
            warm_up_seconds=self.device.warm_up_seconds,
            stopwatch=self.device.seconds,
        ):
            self.bar.total += (rounds - planned) * len(runs)
            planned = rounds
            if isinstance(taken, Exception):
                self._leave_out(cell, name, taken, steps_saved=rounds - len(seconds.pop(name, [])))
                del runs[name]
            else:
                seconds.setdefault(name, []).append(taken)
                self.bar.update()

    def _leave_out(self, cell: Hashable, name: str, error: Exception, steps_saved: int) -> None:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        self.left_out[cell, name] = reason if isinstance(error, LeftOutError) else f"{type(error).__name__}: {reason}"
        self.bar.total -= steps_saved
        if self.bar.disable and not isinstance(error, LeftOutError):  # there is no bar to be torn by it
            traceback.print_exception(error)
        self.lost = self.device.lost()

    def conclude(
        self, draw: Callable[[list[dict[str, Any]], Path], None] | None, rows: list[dict[str, Any]], path: Path
    ) -> None:
        """Say what was left out, draw the rows beside `path`, and say what was written and whether all of it was."""
        for (cell, name), reason in self.left_out.items():
            print(f"left out: {name} ({cell}): {reason}")
        why = f"{self.seconds:.0f} seconds were over" if self.lost is None else f"the device is lost: {self.lost}"
        for cell in self.unreached:
            print(f"not reached: {cell}: {why}")
        if rows:
            picture = path.with_suffix(".png")
            if draw is not None:
                draw(rows, picture)
            print(f"\nWritten: {path}" + (f" and {picture}" if draw is not None else ""))
        if self.interrupted:
            print(
                "Interrupted: what was measured until then is kept; the last cell may have fewer rounds than asked for."
            )

    def exit_status(self, kernels: Sequence[str]) -> int:
        """0, or 1 where one of our kernels has no row, or 130 after Ctrl-C."""
        return (
            130 if self.interrupted else int(self.lost is not None or any(name in kernels for _, name in self.left_out))
        )


def add_shared_arguments(
    parser: argparse.ArgumentParser, peers: Sequence[str], name: str, kernels: Sequence[str] = KERNELS
) -> None:
    """The arguments that do not depend on what is timed; the rows go to results/<name>.json by default."""
    parser.add_argument("--dtype", type=names(list(DTYPES)), default=["float32", "bfloat16"], help=", ".join(DTYPES))
    parser.add_argument("--kernels", type=names(kernels), default=["reference", "auto"], help=", ".join(kernels))
    parser.add_argument("--peers", type=names(peers, peers), default=list(peers), help=f"all, none, {', '.join(peers)}")
    parser.add_argument("--threads", type=counts, default=[torch.get_num_threads()], help="of every candidate: 1,2")
    parser.add_argument(
        "--rounds", type=rounds, default=timing.MIN_ROUNDS, help="at least 9; more are made where they are quick"
    )
    parser.add_argument("--json", type=Path, help=f"the plot goes beside it (benchmarks/results/{name}.json)")
    parser.add_argument("--no-plot", action="store_true", help="draw none")


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to run, and for how long."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: an NVIDIA GPU")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing more so long after the start")


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """Ends the program where there is no such device."""
    if device == "cuda" and (reason := no_gpu()) is not None:
        parser.error(f"argument --device: {reason}")


def where(device: str, threads: int) -> str:
    """A cell's device in a word: the CPU by its threads."""
    return f"{threads} threads" if device == "cpu" else device


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 as the rows and arguments name it: "float32"."""
    return str(dtype).removeprefix("torch.")


def names(known: Sequence[str], every: Sequence[str] | None = None) -> Callable[[str], list[str]]:
    """An argument's type: a comma-separated list of known names; where `every` is given also "all" of it and "none"."""

    def parse(text: str) -> list[str]:
        if every is not None and text in ("all", "none"):
            return list(every) if text == "all" else []
        chosen = list(dict.fromkeys(text.split(",")))
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(map(repr, unknown))}, expected of {', '.join(known)}")
        return chosen

    return parse


def counts(text: str) -> list[int]:
    """An argument's type: a comma-separated list of numbers of at least 1."""
    numbers = [int(number) if number.isdecimal() else 0 for number in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers of at least 1")
    return list(dict.fromkeys(numbers))


def rounds(text: str) -> int:
    """An argument's type: a number of rounds, at least timing.MIN_ROUNDS."""
    if not text.isdecimal() or int(text) < timing.MIN_ROUNDS:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of at least {timing.MIN_ROUNDS}")
    return int(text)
