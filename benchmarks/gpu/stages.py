"""Stages of a long run: each a command in a process of its own, with a time limit, reported whatever became of others.

Stages that follow one another and are `beside` run at the same time. The time there is goes to the stages by their
weights, and what one leaves over to those after it.
"""

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GRACE_SECONDS = 8.0  # between being asked to end and being killed
LEAST_SECONDS = 5.0  # less than this is not worth a start
FAILURES = ("failed", "timed out", "not run", "interrupted")

Verdict = tuple[str, str]  # "ok", "failed" or "unavailable", and a word more


def by_last_line(status: int, output: str) -> Verdict:
    """By the exit status alone; the note of a failed one is its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return ("ok", "") if status == 0 else ("failed", lines[-1] if lines else f"exit status {status}")


@dataclass(frozen=True)
class Stage:
    """A command; `weight` is the seconds that it is expected to take, "{seconds}" in the command those it may take.

    `optional`: running out of time is no failure. `missing`: why it cannot run here. `judge` turns exit status and
    output into a verdict.
    """

    name: str
    group: str
    command: Sequence[str]
    weight: float
    beside: bool = False
    optional: bool = False
    missing: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    judge: Callable[[int, str], Verdict] = by_last_line


@dataclass
class Outcome:
    """What became of a stage: "ok", "unavailable", "out of time" or one of FAILURES, and in a line why."""

    stage: Stage
    status: str
    seconds: float = 0.0
    limit: float = 0.0
    note: str = ""
    output: str = ""

    @property
    def failed(self) -> bool:
        return self.status in FAILURES

    def row(self) -> dict[str, Any]:
        return {
            "stage": self.stage.name,
            "status": self.status,
            "seconds": round(self.seconds, 1),
            "limit_seconds": round(self.limit, 1),
            "note": self.note,
        }


class Runner:
    """Runs stages in `folder` within `seconds` altogether; `done` is called after each, `say` gets the progress.

    Ctrl-C ends the running stages as a terminal would, keeps their outcomes and sets `interrupted`.
    """

    def __init__(
        self,
        seconds: float,
        folder: Path,
        done: Callable[[Outcome], None] = lambda outcome: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.folder, self.done, self.say = folder, done, say
        self.start = time.monotonic()
        self.end = self.start + seconds
        self.outcomes: list[Outcome] = []
        self.interrupted = False

    def run(self, stages: Sequence[Stage]) -> list[Outcome]:
        """The stages' outcomes, in the order in which they ended."""
        batches: list[list[Stage]] = []
        for stage in stages:
            if batches and stage.beside and batches[-1][-1].beside:
                batches[-1].append(stage)
            else:
                batches.append([stage])
        for i, batch in enumerate(batches):
            weights = [max(stage.weight for stage in later) for later in batches[i:]]
            remaining = self.end - time.monotonic()
            self._run_batch(batch, remaining * weights[0] / sum(weights), remaining)
        return self.outcomes

    def _run_batch(self, batch: Sequence[Stage], limit: float, remaining: float) -> None:
        processes = []
        for stage in batch:
            if stage.missing is not None:
                self._finish(Outcome(stage, "unavailable", note=stage.missing))
            elif self.interrupted or remaining < LEAST_SECONDS:
                status = "out of time" if stage.optional and not self.interrupted else "not run"
                self._finish(Outcome(stage, status, note="interrupted" if self.interrupted else "no time was left"))
            else:
                self.say(f"{self._clock()} {stage.name}: begins, at most {limit:.0f} s")
                processes.append(_Process(stage, limit, self.folder))
        try:
            while processes:
                time.sleep(0.05)
                for process in list(processes):
                    if process.over():
                        processes.remove(process)
                        self._finish(process.outcome("timed out"))
        except KeyboardInterrupt:
            self.interrupted = True
            self._interrupt(processes)

    def _interrupt(self, processes: "list[_Process]") -> None:
        self.say(f"{self._clock()} interrupted")
        for process in processes:
            process.ask_to_end()
        for process in processes:
            try:
                while not process.over():
                    time.sleep(0.05)
            except KeyboardInterrupt:  # once more: no patience left
                process.kill()
            self._finish(process.outcome("interrupted"))

    def _finish(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        note = f": {outcome.note}" if outcome.note else ""
        self.say(f"{self._clock()} {outcome.stage.name}: {outcome.status}, {outcome.seconds:.0f} s{note}")
        self.done(outcome)

    def _clock(self) -> str:
        return f"[{time.monotonic() - self.start:4.0f} of {self.end - self.start:.0f} s]"


class _Process:
    """A running stage, in a session of its own, so that all that it started can be ended with it."""

    def __init__(self, stage: Stage, limit: float, folder: Path) -> None:
        self.stage, self.limit, self.start = stage, limit, time.monotonic()
        self.asked: float | None = None
        self.file = tempfile.TemporaryFile()  # noqa: SIM115  closed with its outcome
        patience = limit - min(20, limit / 4)  # what is begun until then may end in time
        command = [word.replace("{seconds}", f"{patience:.0f}") for word in stage.command]
        environment = os.environ | dict(stage.environment)
        self.error: OSError | None = None
        try:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=self.file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            self.error = error

    def over(self) -> bool:
        """Whether it has ended; asks it to at its limit, and after GRACE_SECONDS ends it."""
        if self.error is not None or self.process.poll() is not None:
            return True
        now = time.monotonic()
        if self.asked is None and now - self.start > self.limit:
            self.ask_to_end()
        elif self.asked is not None and now - self.asked > GRACE_SECONDS:
            self.kill()
        return False

    def ask_to_end(self) -> None:
        """As Ctrl-C does."""
        self.asked = time.monotonic()
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.error is None:
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                return

    def outcome(self, cut: str) -> Outcome:
        """`cut` is its status where it was asked to end."""
        seconds = time.monotonic() - self.start
        if self.error is not None:
            return Outcome(self.stage, "failed", seconds, self.limit, str(self.error))
        status = self.process.wait()
        self.kill()  # what it may have left behind
        self.file.seek(0)
        output = self.file.read().decode(errors="replace")
        self.file.close()
        verdict, note = self.stage.judge(status, output)
        if self.asked is not None and cut == "timed out":
            verdict = "out of time" if self.stage.optional else cut
            note = f"did not end within {self.limit:.0f} s" + (f"; {note}" if note else "")
        elif self.asked is not None:
            verdict = cut
        return Outcome(self.stage, verdict, seconds, self.limit, re.sub(r"\s+", " ", note)[:200], output)
