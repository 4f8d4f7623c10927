"""The commands: python -m crossvit COMMAND, or crossvit COMMAND."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec

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
PACKAGES = "torchvision, Pillow, safetensors, tqdm and matplotlib: pip install crossvit-kernels[models]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns 0, 1 where a part of the work failed, 2 for what the command line got wrong, 130 after
    Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = {name: text for name, text in COMMANDS.items() if find_spec(f"{__package__}.{name}")}
    parser = argparse.ArgumentParser(prog="crossvit", description="CrossViT on fused kernels.")
    commands_parser = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in commands.items():
        sub = commands_parser.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if given[:1] != [name]:
            continue
        try:
            module = importlib.import_module(f"{__package__}.{name}")
        except ImportError as error:
            print(f"crossvit {name}: error: {error} (the commands need {PACKAGES})", file=sys.stderr)
            return 2
        except KeyboardInterrupt:  # importing takes seconds
            return 130
        module.add_arguments(sub)
    options = parser.parse_args(given)
    return _run(module.run, options)


def _run(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    from .commands import CommandError, say_warnings

    say_warnings()
    try:
        return run(options)
    except CommandError as error:
        print(f"crossvit {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a full disk, a folder that may not be written to
        print(f"crossvit {options.command}: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
