"""The commands: python -m crossvit COMMAND, or crossvit COMMAND."""

import importlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from ..system.failures import STATUSES, Parser, guarded, prepared, report, say

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
    """Runs a command. Returns its exit status, which `failures` decides on; argparse's SystemExit passes."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = {name: text for name, text in COMMANDS.items() if find_spec(f"{__package__}.{name}")}
    parser = Parser(prog="crossvit", description="CrossViT on fused kernels.", epilog=STATUSES)
    commands_parser = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in commands.items():
        sub = commands_parser.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if given[:1] != [name]:
            continue
        try:
            module = importlib.import_module(f"{__package__}.{name}")
        except ImportError as error:
            say(f"crossvit {name}: error: {error} (the commands need {PACKAGES})")
            return 2
        except BaseException as error:  # importing takes seconds, in which Ctrl-C may come
            return report(name, error)
        module.add_arguments(sub)
        sub.epilog = " ".join(filter(None, (sub.epilog, STATUSES)))
        for word in given:  # argparse before Python 3.13 makes an empty list of it
            if word.startswith("--") and word.endswith("=--"):
                sub.error(f"argument {word.removesuffix('=--')}: expected a value, got '--'")
    options = prepared(lambda: parser.parse_args(given))
    return guarded(options.command, module.run, options)


if __name__ == "__main__":
    sys.exit(main())
