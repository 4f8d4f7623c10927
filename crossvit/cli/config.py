"""--config: a command's options from a YAML file, under those of the command line, and back into one."""

import argparse
import difflib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from crossvit_kernels.version import VERSION

from ..factory import list_models
from ..models.checks import shown
from ..system.failures import CommandError
from ..system.files import read_file
from ..system.text import printable
from .commands import assignment

_MOST = 1 << 18  # bytes of a file of options: a longer one is something else
_EXPECTED = {int: "an integer", float: "a number", None: "text", Path: "text"}
_OWN = ("config", "command", "help", argparse.SUPPRESS)  # what a file of options does not say


def parse(
    parser: argparse.ArgumentParser, command: argparse.ArgumentParser, given: Sequence[str]
) -> argparse.Namespace:
    """The options that the words `given` say and, where they say nothing, the file behind --config.

    parser: that of the whole command line; command: of the options, itself or a sub-parser, whose defaults become the
    file's values. Raises CommandError, naming the file and the option, for a file that cannot be read, unknown names
    and values of another type than the option's; SystemExit as argparse does.
    """
    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument("--config", nargs="?")
    path = finder.parse_known_args(given)[0].config
    if path is not None:
        _set_defaults(command, path)
    options, rest = parser.parse_known_args(given)
    if rest:
        command.error(_unrecognized(command, rest))
    return options


def to_yaml(options: argparse.Namespace) -> str:
    """The text of a file from which --config reads these options again, each as it is."""
    values = {name: _plain(name, value) for name, value in vars(options).items() if name not in _OWN}
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None)
    return f"# The options of a run of crossvit-kernels {VERSION}: --config reads them.\n{text}"


def _plain(name: str, value: Any) -> Any:
    if name == "set":
        return dict(value)
    if isinstance(value, tuple):  # --image-size: "HEIGHTxWIDTH" is what it takes
        return "x".join(map(str, value))
    return str(value) if isinstance(value, Path) else value


def _set_defaults(command: argparse.ArgumentParser, path: str) -> None:
    actions = {action.dest: action for action in command._actions if action.dest not in _OWN}
    said: set[str] = set()
    for key, value in _read(path).items():
        name = str(key).replace("-", "_")
        if name not in actions:
            near = difflib.get_close_matches(name, actions, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise CommandError(f"--config {path}: there is no option {printable(shown(key))}{hint}")
        if name in said:
            raise CommandError(f"--config {path}: {name} is there twice")
        said.add(name)
        action = actions[name]
        try:
            action.default = _value(action, value)
        except ValueError as error:
            raise CommandError(f"--config {path}: {name}{printable(error)}") from error
        action.required = False
        if not action.option_strings and action.nargs in (None, "+"):  # argparse's word for "may be left out"
            action.nargs = "?" if action.nargs is None else "*"


def _read(path: str) -> dict[Any, Any]:
    try:
        content = yaml.load(read_file(path, _MOST, "a file of options").decode("utf-8-sig"), _Loader)
    except OSError as error:
        raise CommandError(f"--config {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise CommandError(f"--config {path}: expected text in UTF-8, got the byte {byte:#04x}") from error
    except RecursionError as error:
        raise CommandError(f"--config {path}: it is nested too deep") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        reason = printable(" ".join(str(error).split()))
        raise CommandError(f"--config {path}: {reason[:300]}") from error
    if content is not None and not isinstance(content, dict):
        got = printable(shown(content))
        raise CommandError(f"--config {path}: expected options by name, as in 'epochs: 30', got {got}")
    return content or {}


class _Loader(yaml.SafeLoader):
    """YAML with every key once, and without aliases, by which a few lines may mean gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("expected values, got an alias of one")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        counts = Counter(str(key.value) for key, _ in node.value)
        if twice := [key for key, count in counts.items() if count > 1]:
            raise yaml.YAMLError(f"{shown(twice[0])} is there twice")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _value(action: argparse.Action, value: Any) -> Any:
    """What the option makes of a value of YAML. Raises ValueError, with the end of a message behind its name."""
    if value is None and action.default is None:
        return None
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise _wrong("true or false", value)
        return value
    if action.type is assignment:
        if not isinstance(value, dict):
            raise _wrong("values by name, as in 'set: {fusion: none}'", value)
        return [_assigned(name, entry) for name, entry in value.items()]
    if action.nargs is None:
        return _single(action, value)
    if not isinstance(value, list) or (isinstance(action.nargs, int) and len(value) != action.nargs):
        raise _wrong(f"a list of {action.nargs}" if isinstance(action.nargs, int) else "a list", value)
    return [_single(action, entry) for entry in value]


def _single(action: argparse.Action, value: Any) -> Any:
    kind: Any = action.type
    expected = _EXPECTED.get(kind, "a number or text")
    if action.choices is not None:
        expected = f"one of {', '.join(map(str, action.choices))}"
    fits = isinstance(value, str | int | float) and not isinstance(value, bool)
    if kind is int:
        fits = fits and isinstance(value, int)
    elif kind in (None, Path):
        fits = isinstance(value, str)
    if not fits:
        raise _wrong(expected, value)
    try:
        converted = value if kind is None else kind(str(value))  # YAML reads 1e-3 as text
    except argparse.ArgumentTypeError as error:
        raise ValueError(f": {error}") from error
    except (ValueError, TypeError) as error:
        raise _wrong(expected, value) from error
    if action.choices is not None and converted not in action.choices:
        raise _wrong(expected, value)
    return converted


def _assigned(name: Any, value: Any) -> tuple[str, Any]:
    try:
        return assignment(f"{name}={json.dumps(value)}")
    except argparse.ArgumentTypeError as error:
        raise ValueError(f": {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f": expected a plain value of {printable(name)}, got {shown(value)}") from error


def _wrong(expected: str, value: Any) -> ValueError:
    return ValueError(f" must be {expected}, got {shown(value)}")


def _unrecognized(command: argparse.ArgumentParser, words: Sequence[str]) -> str:
    """argparse's message, and what may have been meant."""
    text, first = f"unrecognized arguments: {' '.join(words)}", words[0].partition("=")[0]
    options = [option for action in command._actions for option in action.option_strings]
    if near := difflib.get_close_matches(first, options, n=1) if first.startswith("-") else []:
        return f"{text} (did you mean {near[0]}?)"
    return f"{text} (a model is named by --model)" if first in list_models() and "--model" in options else text
