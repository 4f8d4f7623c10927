"""How an exception becomes a line on standard error and an exit status: the one place that decides it. Warnings and
what the libraries log become lines too.

    0    everything was done
    1    a part failed, which is named: a file that cannot be read or written, memory, a run that diverged
    2    the command line, or a file that it names, cannot be as it is; nothing was done
    130  Ctrl-C (143: SIGTERM, of train)
    141  whoever read the output had enough

With CROSSVIT_TRACEBACK=1 in the environment a failure's traceback is shown too.
"""

import argparse
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from .text import flush_output, print_line, use_any_encoding, utf8

STATUSES = (
    "Exit status: 0; 1 where a part failed, which is named on standard error; 2 for what the command line got wrong; "
    "130 after Ctrl-C, 143 after SIGTERM (train); 141 where the reader of the output had enough."
)
REPORT = "a fault of crossvit's own, not of what was asked: please report it with the lines above and the command line"
# The loggers whose records the commands show, and from which level on.
LOGGED = {"crossvit": logging.WARNING, "crossvit_kernels": logging.WARNING, "crossvit.training": logging.INFO}
_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|bad_alloc|cannot allocate memory"
    r"|storage size calculation overflowed|invalid size|overflow when unpacking|numel",
    re.IGNORECASE,
)
# What torch raises as RuntimeError that is no fault of the program's
_CAUSES = re.compile(r"DataLoader worker|can't start new thread|unable to (mmap|open|write|resize)|NCCL|Gloo|connect")


class CommandError(Exception):
    """What whoever typed the command can mend; shown without a traceback."""


def of_the_command_line(error: BaseException) -> CommandError:
    """`error`, of what the command line named, as one that says so."""
    return CommandError(words(error) or str(error) or type(error).__name__)


def guarded(name: str, run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """`run(options)`, whatever comes of it: the exit status. Warnings are lines on standard error, and so is what the
    libraries log, but progress, which is one on standard output."""
    warnings.showwarning = _say_warning
    try:
        with shown_logs():
            status = run(options)
        flush_output()
        return status
    except BaseException as error:
        return report(name, error)


class CommandHandler(logging.Handler):
    """Shows messages as they are, without a time or a level. A standard output that cannot be written raises, as it
    does for all else that a command prints."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record's message, a warning on standard error."""
        if record.levelno >= logging.WARNING:
            say(record.getMessage())
        else:
            print_line(record.getMessage(), flush=True)


@contextmanager
def shown_logs() -> Iterator[None]:
    """Has a `CommandHandler`, and nothing else, show what the packages log within the block."""
    handler = CommandHandler()
    loggers = {name: logging.getLogger(name) for name in LOGGED}
    before = {name: (logger.level, logger.propagate) for name, logger in loggers.items()}
    for name, logger in loggers.items():
        logger.setLevel(LOGGED[name])
        if "." not in name:
            logger.addHandler(handler)
            logger.propagate = False
    try:
        yield
    finally:
        for name, logger in loggers.items():
            level, logger.propagate = before[name]
            logger.setLevel(level)
            logger.removeHandler(handler)


class Parser(argparse.ArgumentParser):
    """argparse's, which swallows that its help could not be written."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is None or file is sys.stderr:
            say(message.rstrip("\n"))
        else:
            print_line(message, end="")


def prepared(parse: Callable[[], argparse.Namespace], name: str = "") -> argparse.Namespace:
    """The options that `parse` returns. Raises SystemExit, as argparse does after help and errors, also where the help
    could not be written, and after a CommandError, which is said of the command `name`."""
    use_any_encoding()
    try:
        try:
            return parse()
        except SystemExit:
            flush_output()
            raise
    except (OSError, CommandError) as error:
        raise SystemExit(report(name, error)) from None


def report(name: str, error: BaseException) -> int:
    """Says what happened on standard error. Returns the exit status. Raises SystemExit and GeneratorExit again."""
    if isinstance(error, SystemExit | GeneratorExit):
        raise error
    if isinstance(error, KeyboardInterrupt):
        say("interrupted")
        return 130
    if isinstance(error, BrokenPipeError):
        _stop_writing()
        return 141
    if isinstance(error, OSError) and error.filename == "standard output":
        _stop_writing()
    text = words(error)
    if text is None or os.environ.get("CROSSVIT_TRACEBACK") == "1":
        say("".join(traceback.format_exception(error)).rstrip())
    said = f"{type(error).__name__}: {error}; {REPORT}" if text is None else text
    say(f"{' '.join(('crossvit', name)).strip()}: error: {said}")
    return 2 if isinstance(error, CommandError) else 1


def words(error: BaseException) -> str | None:
    """What a foreseen failure is in words; None for what nobody foresaw."""
    text = _from_worker(str(error))
    if isinstance(error, CommandError):
        return text
    if isinstance(error, OSError):
        return text or type(error).__name__
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError | TypeError) and _MEMORY.search(text)):
        return f"not enough memory: {_first_line(text)}" if text else "not enough memory"
    if isinstance(error, RecursionError):
        return None
    if isinstance(error, ValueError | TypeError | OverflowError | ImportError):
        return text or type(error).__name__
    if isinstance(error, RuntimeError) and (type(error) is not RuntimeError or _CAUSES.search(text)):
        return None if isinstance(error, NotImplementedError) else text
    return None


def say(text: str) -> None:
    """A line on standard error, where there is one."""
    with suppress(OSError, ValueError, AttributeError):  # nobody may be left to read it
        print(utf8(text), file=sys.stderr, flush=True)


def _say_warning(message: Warning | str, *rest: Any, **named: Any) -> None:
    say(f"warning: {message}")


def _first_line(text: str) -> str:
    line = text.strip().splitlines()[0] if text.strip() else ""
    return re.sub(r"^\[enforce fail at [^]]*\]\s*(err == 0\.\s*)?", "", line)


def _from_worker(text: str) -> str:
    """The message of an exception, also of one in a process that reads images, which has its traceback in front."""
    if not text.startswith("Caught ") or "DataLoader worker" not in text:
        return text
    return re.sub(r"^[\w.]+: ", "", text.strip().splitlines()[-1])


def _stop_writing() -> None:
    """Sends standard output nowhere, so that the end of the program does not try to write the rest."""
    with suppress(OSError, ValueError, AttributeError):  # it may be no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
