"""The libraries log, under their modules' names, and the commands show it as they have always printed it."""

import argparse
import ast
import errno
import logging
from pathlib import Path

import pytest

from crossvit.system import failures
from crossvit.system.failures import guarded

ROOT = Path(__file__).resolve().parents[2]
# What prints on purpose: the report that is asked for by name, and accelerate's where no logger would show it.
PRINTING = {"crossvit_kernels/backends/reporting.py": 1, "crossvit_kernels/accelerate.py": 1}


def logs(options: argparse.Namespace) -> int:
    """A command whose libraries have something to say."""
    logging.getLogger("crossvit.training.loop").info("epoch %d", 3)
    logging.getLogger("crossvit.training.loading").warning("skipped %s", "x\udce9.png")
    logging.getLogger("crossvit.weights.fitting").info("resampled")
    logging.getLogger("crossvit.weights.fitting").warning("odd")
    logging.getLogger("crossvit_kernels.accelerate").info("swapped")
    return 0


def state() -> list:
    loggers = [logging.getLogger(name) for name in failures.LOGGED]
    return [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]


def test_a_command_shows_progress_and_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    """Progress of training on standard output, warnings of all on standard error, nothing else; and the loggers are
    afterwards as they were."""
    before = state()
    assert guarded("test", logs, argparse.Namespace()) == 0
    assert capsys.readouterr() == ("epoch 3\n", "skipped x\\xe9.png\nodd\n")
    assert state() == before


def test_a_log_that_cannot_be_written_ends_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with all else that a command prints."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "standard output")

    monkeypatch.setattr(failures, "print_line", full)
    monkeypatch.setattr(failures, "_stop_writing", lambda: None)
    before = state()
    assert guarded("test", logs, argparse.Namespace()) == 1
    assert "No space left on device: 'standard output'" in capsys.readouterr().err
    assert state() == before


def test_the_libraries_do_not_print() -> None:
    """Neither by print nor by what the commands print with, nor to sys.stdout."""
    found: dict[str, int] = {}
    for package in ("crossvit", "crossvit_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name.startswith(("crossvit/cli/", "crossvit/system/")):
                continue
            tree = ast.parse(path.read_text())
            calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
            count = sum(isinstance(call, ast.Name) and call.id in ("print", "print_line", "say") for call in calls)
            streams = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("stdout", "stderr")]
            if count + len(streams):
                found[name] = count + len(streams)
    assert found == PRINTING
