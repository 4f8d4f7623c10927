"""The snippets of README.md, CONTRIBUTING.md and docs/: how they are run, and the only list of those that are not.

Sybil finds the blocks; those of one page share a namespace and a folder. Python runs as it stands, and prompts (`>>>`)
are doctests. Of shell blocks every line is run, `crossvit` in this process and the rest by bash, unless NOT_RUN says
that no test can run it: then what NOT_RUN says is checked instead.
"""

import argparse
import doctest
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

from packaging.requirements import Requirement
from sybil import Document, Example, Region, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

from commands import command as crossvit

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120  # that a command of a page may take
# What commands get behind their own arguments, so that they end soon.
SHORTER = {
    "train": ["--epochs", "1", "--warmup-epochs", "0", "--workers", "0"],
    **{name: ["--workers", "0"] for name in ("evaluate", "predict", "explain")},
    "bench": ["--rounds", "1"],
}
# Commands that end with another status than 0, as their page says: by a word of theirs.
STATUSES = {"notes.jpg": 1}
# Pages whose blocks another test follows, and languages of blocks that say nothing to a shell or to Python.
ELSEWHERE = {"docs/add-an-op.md": "tests/package/test_add_an_op.py"}
NO_CODE = {"text": "what a command prints"}


@dataclass(frozen=True)
class NotRun:
    """Commands that no test can run: what they begin with, why, and what is checked instead."""

    pattern: str
    why: str
    check: Callable[[list[str]], None]


def target_exists(words: list[str]) -> None:
    """make TARGET … NAME=value: the Makefile has the targets and reads the variables."""
    makefile = (ROOT / "Makefile").read_text()
    for word in words[1:]:
        name, is_variable, _ = word.partition("=")
        found = rf"\$\([^)]*\b{name}\b" if is_variable else rf"^{name}:"
        assert re.search(found, makefile, re.MULTILINE), f"the Makefile has no {name}"


def packages_are_ours(words: list[str]) -> None:
    """pip install … or uninstall …: pip has the options, pyproject.toml the extras, and it names the packages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    several = [project["project"]["dependencies"], project["build-system"]["requires"], *extras.values()]
    ours = {Requirement(text).name for texts in several for text in texts} | {"crossvit-kernels"}
    for word in words[words.index("pip") + 2 :]:
        if word.startswith("-"):
            assert re.search(rf"(^|[\s,]){re.escape(word)}\b", pip_help()), f"pip install has no {word}"
            continue
        requirement = Requirement(re.sub(r"^\.", "crossvit-kernels", word))
        assert requirement.name in ours, f"pyproject.toml does not name {requirement.name}"
        assert requirement.extras <= extras.keys(), f"pyproject.toml has no such extra: {word}"


@cache
def pip_help() -> str:
    """What `pip install --help` says."""
    command = [sys.executable, "-m", "pip", "install", "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def arguments_parse(words: list[str]) -> None:
    """[torchrun …] python -m MODULE … or crossvit …: the program takes the arguments."""
    if "-m" in words:
        name, *rest = words[words.index("-m") + 1 :]
    else:
        name, *rest = words
    parsed = []

    class Parsed(BaseException):
        """Ends a program that has parsed its arguments."""

    def parse(self: argparse.ArgumentParser, *given: object, **named: object) -> None:
        parsed.append(original(self, *given, **named))
        raise Parsed

    def guarded(*_: object) -> None:
        parsed.append("by the command, which is not run")
        raise Parsed

    original = argparse.ArgumentParser.parse_args
    if name == "crossvit":
        name, place, replacement = "crossvit.cli.main", "crossvit.cli.main.guarded", guarded
    else:
        if hasattr(importlib.import_module(name), "__path__"):
            name += ".__main__"
        place, replacement = "argparse.ArgumentParser.parse_args", parse
    with mock.patch.object(sys, "argv", [name, *rest]), mock.patch(place, replacement):
        try:
            importlib.import_module(name).main()
        except Parsed:
            pass
        except SystemExit as ended:
            raise AssertionError(f"{name} does not take {shlex.join(rest)}") from ended
    assert parsed, f"{name} parses no arguments"


def has_benchmarks(words: list[str]) -> None:
    """python -m pytest FOLDER …: the folder has tests that pytest-benchmark times."""
    found = [path for path in sorted((ROOT / words[3]).glob("test_*.py")) if "benchmark" in path.read_text()]
    assert found, f"{words[3]} has no benchmarks"


NOT_RUN = (
    NotRun(r"make ", "sets up an environment of its own, and takes minutes", target_exists),
    NotRun(r"(python -m )?pip (un)?install ", "would change the environment that the tests run in", packages_are_ours),
    NotRun(r"torchrun ", "is for eight processes; tests/training has two", arguments_parse),
    NotRun(r"python -m benchmarks\.", "takes minutes; tests/benchmarks has them small", arguments_parse),
    NotRun(r"python -m pytest benchmarks ", "takes minutes; tests/benchmarks runs a slice of them", has_benchmarks),
    NotRun(r"python -m crossvit train (imagenet|pets|flowers) ", "the images are not here", arguments_parse),
)


def pages() -> list[str]:
    """The pages with snippets, relative to the root."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [str(path.relative_to(ROOT)) for path in found]


def shell_commands(text: str, prompt: str = "") -> list[str]:
    """The commands of a shell block, without comments; lines that end with a backslash go on. With a prompt, lines
    that do not begin with it are what the command before them printed."""
    lines = text.replace("\\\n", " ").splitlines()
    lines = [line.removeprefix(prompt) for line in lines if line.startswith(prompt)]
    found = [shlex.join(shlex.split(line, comments=True)) and line for line in lines]
    return [line for line in found if line]


def not_run(command: str) -> NotRun | None:
    """The entry of NOT_RUN that a command falls under."""
    return next((entry for entry in NOT_RUN if re.match(entry.pattern, command)), None)


def run(command: str) -> None:
    """Runs a command in the current folder, or checks what stands for that."""
    words = shlex.split(command, comments=True)
    if entry := not_run(command):
        entry.check(words)
        return
    expected = next((status for word, status in STATUSES.items() if word in words), 0)
    program = words[2:] if words[:2] == ["python", "-m"] else words
    if program[0] == "crossvit" and not set(command.partition("#")[0]) & set("|&;<>$`"):
        finished = crossvit(*program[1:], *SHORTER.get(program[1], []))
        assert finished.status == expected, f"{command}\n{finished.out}{finished.err}"
        return
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    bash = ["bash", "-euo", "pipefail", "-c", command]
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(bash, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == expected, f"{command}\n{done.stdout}{done.stderr}"


def evaluate_shell(example: Example) -> None:
    """Runs the commands of a block."""
    prompt = "$ " if example.parsed.lstrip().startswith("$ ") else ""
    for command in shell_commands(example.parsed, prompt):
        run(command)


SHELLS = ("bash", "console")
SYBIL = Sybil(
    [
        PythonCodeBlockParser(doctest_optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE),
        *(CodeBlockParser(language, evaluate_shell) for language in SHELLS),
    ],
    path=str(ROOT),
)


def parse(page: str) -> Document:
    """A page with its examples, which share a namespace."""
    return SYBIL.parse(ROOT / page)


def fences(document: Document) -> Iterator[Region]:
    """Every fenced block of a page; its `language` is a lexeme."""
    yield from RawFencedCodeBlockLexer(re.compile(r"(?P<language>[^\n]*)\n"))(document)
