"""What the README tells a reader to type works."""

import argparse
import importlib
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "Makefile").is_file():
    pytest.skip("no source tree beside the tests", allow_module_level=True)
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_its_python_runs(code: str) -> None:
    pytest.importorskip("timm")
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_its_commands_exist() -> None:
    commands = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines() if line]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands:
        words = [word for word in shlex.split(command, comments=True) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
        if words[0] == "make":
            assert set(words[1:]) <= targets, command
        elif "-m" in words and words[0] in ("python", "torchrun"):
            name, *rest = words[words.index("-m") + 1 :]
            assert find_spec(name), command
            if name == "crossvit":
                parser = argparse.ArgumentParser()
                importlib.import_module(f"crossvit.cli.{rest[0]}").add_arguments(parser)
                parser.parse_args(rest[1:])  # exits where an option does not exist
        else:
            assert words[0] in ("pip", "python"), command
