"""pytest in several processes beside one another, on one GPU, by nothing that would have to be installed.

python -m benchmarks.gpu.shards WORKERS [arguments of pytest]

A process runs the tests whose names fall to it. One that dies, or whose GPU is lost, is started again for the tests
that it had left: after an illegal access every later CUDA call fails, and one wrong kernel would fail all tests behind
it. Ends with one line of counts, as pytest does, and with pytest's exit status. As a plugin: a process's own part.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

SHARE = "CROSSVIT_TEST_SHARE"  # which of how many shares, and the journal's file, as JSON
NOTHING_RUN = 5  # pytest's exit statuses
INTERRUPTED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """pytest's exit status: 0, 1 where a test failed or a process did not come to its end, 2, or 5 without tests."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    start, count, status = time.monotonic(), int(words[0]), 0
    with tempfile.TemporaryDirectory(prefix="crossvit-shards-") as folder:
        shards = [Shard(share, count, Path(folder), words[1:]) for share in range(count)]
        try:
            running = shards
            while running := [shard for shard in running if not shard.over()]:
                time.sleep(0.05)
        except KeyboardInterrupt:  # they were interrupted too
            status = INTERRUPTED
            for shard in shards:
                shard.process.wait()
        outcomes = Counter(outcome for shard in shards for outcome in shard.outcomes())
        statuses = {shard.status() for shard in shards}
    counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
    print(f"\n{counts or 'no tests ran'} in {time.monotonic() - start:.1f}s", flush=True)
    return status or max(statuses - {NOTHING_RUN}, default=NOTHING_RUN)


class Shard:
    """A share of the tests in a process of its own, started again as often as it dies in a test."""

    def __init__(self, share: int, count: int, folder: Path, words: Sequence[str]) -> None:
        self.journal = folder / f"{share}.jsonl"
        self.journal.touch()
        self.command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu.shards", *words]
        self.environment = {**os.environ, SHARE: json.dumps([share, count, str(self.journal)])}
        self.begun = 0
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, env=self.environment, stdin=subprocess.DEVNULL)

    def over(self) -> bool:
        """Whether it has ended for good."""
        if self.process.poll() is None:
            return False
        before, self.begun = self.begun, len(begun(self.journal))
        if self.ended() or self.begun == before:
            return True
        self.start()
        return False

    def ended(self) -> bool:
        """Whether it came to its end, with the tests that it had left."""
        return any("status" in entry for entry in entries(self.journal))

    def status(self) -> int:
        """pytest's; 1 too where a process died."""
        found = [entry["status"] for entry in entries(self.journal) if "status" in entry]
        failed = {"failed", "error", "died"} & set(self.outcomes())
        return 1 if failed or not found else found[-1]

    def outcomes(self) -> list[str]:
        """What became of each of its tests; "died" where the process did not survive one."""
        found = {entry["test"]: entry["outcome"] for entry in entries(self.journal) if "outcome" in entry}
        return [found.get(test, "died") for test in begun(self.journal)]


def entries(journal: Path) -> list[dict[str, Any]]:
    """What was written so far, a line each; a line that a process died over is none."""
    return [json.loads(line) for line in journal.read_text().splitlines(keepends=True) if line.endswith("\n")]


def begun(journal: Path) -> list[str]:
    return list(dict.fromkeys(entry["test"] for entry in entries(journal) if "test" in entry))


class Plugin:
    """In a process: its share of the tests, and the journal of what became of them."""

    def __init__(self, config: pytest.Config, share: int, count: int, journal: str) -> None:
        self.config, self.share, self.count, self.journal = config, share, count, Path(journal)

    def write(self, **entry: Any) -> None:
        with self.journal.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        done = set(begun(self.journal))
        mine = [i for i in items if zlib.crc32(i.nodeid.encode()) % self.count == self.share and i.nodeid not in done]
        self.config.hook.pytest_deselected(items=[item for item in items if item not in mine])
        items[:] = mine

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(test=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Says at once which test failed and why: where the time is up there is no summary."""
        outcome = self.config.hook.pytest_report_teststatus(report=report, config=self.config)[0]
        if outcome:
            self.write(test=report.nodeid, outcome=outcome)
        if report.failed:
            lines = [line for line in report.longreprtext.splitlines() if line.startswith("E  ")]
            print(f"\nFAILED {report.nodeid} " + " | ".join(line[1:].strip() for line in lines[:4])[:500], flush=True)

    @pytest.hookimpl(trylast=True)
    def pytest_exception_interact(self, node: pytest.Item, report: pytest.TestReport) -> None:
        """Ends the process whose GPU is lost."""
        if (torch := sys.modules.get("torch")) is None:
            return
        from ..devices import DEVICES  # imports torch

        if torch.cuda.is_available() and (lost := DEVICES["cuda"].lost()) is not None:
            print(f"\nGPU LOST in {node.nodeid}: {lost}\n{report.longreprtext}", file=sys.__stderr__, flush=True)
            os._exit(1)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.write(status=int(exitstatus))


def pytest_configure(config: pytest.Config) -> None:
    """The plugin, where this process has a share."""
    if SHARE in os.environ:
        config.pluginmanager.register(Plugin(config, *json.loads(os.environ[SHARE])), "share")


if __name__ == "__main__":
    sys.exit(main())
