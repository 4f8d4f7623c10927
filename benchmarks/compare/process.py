"""The side that asks: a worker's process, with this tree's benchmarks and the packages of the tree that it times."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
PACKAGES = ("crossvit", "crossvit_kernels")  # of the tree that is timed
WORKER = ("-m", "benchmarks.compare.worker")  # Python's arguments


class TreeError(RuntimeError):
    """A tree's process failed at what it was asked for; the message says why, in a line."""


class Process:
    """A process that times `tree`, started at once; `close` ends it, also as a context.

    A request raises TreeError where the process does not start, answers with an error, or dies; a dead one is started
    again for the next request.
    """

    def __init__(self, tree: Path, device: str, threads: int, kernels: str) -> None:
        self.tree = tree.resolve()
        self.words = [device, str(threads), kernels]
        self.folder = tempfile.TemporaryDirectory(prefix="crossvit-compare-")
        path = Path(self.folder.name)
        (path / "benchmarks").symlink_to(BENCHMARKS)
        for package in PACKAGES:
            (path / package).symlink_to(self.tree / package)
        self.process: subprocess.Popen[str] | None = None
        self._start()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request of worker.py's."""
        if self.process is None:
            self._start()
        if not self.greeted:
            self._greet()
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            self._died()
        return self._answer()

    def close(self) -> None:
        """Ends the process, whatever it does."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.said.close()
            self.process = None
        self.folder.cleanup()

    def _start(self) -> None:
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        paths = [self.folder.name, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, *WORKER, *self.words],
            cwd=self.folder.name,  # which -m looks in first
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
        )
        self.greeted = False

    def _greet(self) -> None:
        """Waits until it has imported what it needs, and sees to it that this was the tree's."""
        if (found := self._answer()["tree"]) != str(self.tree):
            raise TreeError(f"the process imports crossvit_kernels of {found} instead of {self.tree}")
        self.greeted = True

    def _answer(self) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            self._died()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise TreeError(answer["error"])
        return answer

    def _died(self) -> None:
        """Raises TreeError with its exit status and the last line that it wrote."""
        assert self.process is not None
        status = self.process.wait()
        self.said.seek(0)
        lines = self.said.read().strip().splitlines()
        self.said.close()
        self.process = None
        raise TreeError(f"the process ended with {status}" + (f": {lines[-1][:200]}" if lines else ""))
