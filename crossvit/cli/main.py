"""The commands: python -m crossvit COMMAND, or crossvit COMMAND."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NoReturn

from ..system.failures import STATUSES, CommandError, Parser, guarded, prepared, report, say
from ..system.text import print_line

# Each command is a module with add_arguments(parser) and run(options) -> exit status, imported when it is asked for.
COMMANDS = {
    "train": "train a model on a folder of images",
    "evaluate": "accuracy on a folder of images: top-1, top-5, each branch, confusion matrix",
    "predict": "classes of images, folders, globs or paths from standard input",
    "explain": "what the model looks at, drawn over the pictures",
    "info": "what a model or a checkpoint file holds: parts, parameters, multiply-adds",
    "export": "weights for timm or the authors' code, ONNX, torch.export",
    "bench": "images per second with the kernels and without",
}
PACKAGES = (
    "torch, torchvision, Pillow, safetensors, tqdm, matplotlib, timm, PyYAML and shtab: in a checkout "
    "source .venv/bin/activate, where make set that up, or pip install torch setuptools wheel and then "
    "pip install --no-build-isolation '.[models]'"
)
SHELLS = ("bash", "zsh")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns its exit status, which `failures` decides on; argparse's SystemExit passes."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    given = given[1:] if given[:1] == ["--"] else given
    parser, commands = _parsers()
    if not given or given[0] not in commands:
        prepared(lambda: parser.parse_args(given))  # help, a version, an error: it ends here
    name, command = given[0], commands[given[0]]
    try:
        module = _fill(name, command)
        from .config import parse
    except ImportError as error:
        say(f"crossvit {name}: error: {error} (the commands need {PACKAGES})")
        return 2
    except BaseException as error:  # importing takes seconds, in which Ctrl-C may come
        return report(name, error)
    for word in given:  # argparse before Python 3.13 makes an empty list of it
        if word.startswith("--") and word.endswith("=--"):
            command.error(f"argument {word.removesuffix('=--')}: expected a value, got '--'")
    options = prepared(lambda: parse(parser, command, given), name)
    return guarded(name, module.run, options)


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole command line, and those of the commands, which know none of their options yet."""
    parser = Parser(prog="crossvit", description="CrossViT on fused kernels.", epilog=STATUSES)
    parser.add_argument("--version", action=_Version, help="print the versions of this package and of torch")
    parser.add_argument(
        "--print-completion",
        action=_Completion,
        choices=SHELLS,
        help="print a script with which that shell completes commands, options and the names of models",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands = {}
    for name, text in COMMANDS.items():
        if find_spec(f"{__package__}.{name}"):
            commands[name] = subparsers.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    return parser, commands


def _fill(name: str, command: Parser) -> Any:
    """The module of a command, whose options `command` knows from now on."""
    module = importlib.import_module(f"{__package__}.{name}")
    module.add_arguments(command)
    command.epilog = " ".join(filter(None, (command.epilog, STATUSES)))
    return module


class _Version(argparse.Action):
    """Prints the versions in one line, and ends."""

    def __init__(self, **named: Any) -> None:
        super().__init__(nargs=0, default=argparse.SUPPRESS, **named)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        import torch

        from crossvit_kernels.version import VERSION

        print_line(f"crossvit-kernels {VERSION}, torch {torch.__version__}")
        parser.exit()


class _Completion(argparse.Action):
    """Prints a shell's script, made from the parsers of all commands, and ends."""

    def __init__(self, **named: Any) -> None:
        super().__init__(metavar="SHELL", default=argparse.SUPPRESS, **named)

    def __call__(self, parser: argparse.ArgumentParser, _: Any, shell: Any, *__: Any) -> NoReturn:
        whole, commands = _parsers()
        try:
            from .completion import script

            for name, command in commands.items():
                _fill(name, command)
        except ImportError as error:
            raise CommandError(f"{error} (--print-completion needs {PACKAGES})") from error
        print_line(script(whole, commands.values(), shell))
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
