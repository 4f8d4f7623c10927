"""`crossvit --print-completion SHELL`: what the shell needs to complete commands, options and the names of models."""

import argparse
from collections.abc import Iterable

import shtab

from ..factory import list_models

DEVICES = ("cpu", "cuda")
_FOLDERS = ("data",)  # positional arguments that are folders without saying so


def script(parser: argparse.ArgumentParser, commands: Iterable[argparse.ArgumentParser], shell: str) -> str:
    """The script for `shell`, "bash" or "zsh". parser: that of the whole command line; commands: the sub-parsers in it,
    with all their options. Both are good for nothing else afterwards.
    """
    for command in commands:
        for action in command._actions:
            _describe(action)
    return shtab.complete(parser, shell)


def _describe(action: argparse.Action) -> None:
    """Says what completes the values of this argument, where its choices do not."""
    metavar = str(action.metavar)
    if action.dest in ("model", "what"):
        action.choices = list_models()
    elif action.dest == "device" and action.choices is None:
        action.choices = DEVICES
    elif "FOLDER" in metavar or action.dest in _FOLDERS:
        action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    elif "FILE" in metavar or "IMAGE" in metavar:
        action.complete = shtab.FILE  # type: ignore[attr-defined]
