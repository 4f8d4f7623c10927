"""What the commands share: which model, on what, and how errors and progress are shown."""

import argparse
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crossvit_kernels import backends

from ..data.label_files import read_names
from ..factory import create_model, load_model
from ..models.crossvit import CrossViT
from ..models.single_branch import VisionTransformer
from ..models.variants import canonical_name, default_crop_ratio
from ..system.failures import CommandError, of_the_command_line
from ..system.files import try_to_write
from ..system.memory import check_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FAILURES = (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError, OverflowError)  # of what was asked
LARGEST = 65_535  # side of an input


class ModelError(CommandError):
    """No model can be built of what was given."""


@dataclass(frozen=True)
class Loaded:
    """A model to be used: in eval mode, on its device, in its dtype; `crop_ratio` is that of its evaluation."""

    model: CrossViT | VisionTransformer
    classes: list[str] | None
    crop_ratio: float
    multi_label: bool
    device: torch.device
    dtype: torch.dtype

    def class_name(self, index: int) -> str:
        return self.classes[index] if self.classes else str(index)


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """The argument that `config.parse` reads."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML with options by name, such as batch_size: 32; an option on the command line wins over the file",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `load` reads, and --config."""
    add_config_argument(parser)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="weights: .safetensors or .pth of timm's, the authors' or ours, or a name on timm's hub",
    )
    group.add_argument(
        "--model", metavar="NAME", help="which model the weights are for, where they do not say (crossvit_15_240, …)"
    )
    group.add_argument("--device", default=None, help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    group.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="what the model computes in (default: %(default)s)"
    )
    add_building_arguments(group)


def add_building_arguments(parser: argparse._ActionsContainer) -> None:
    """The arguments that say how a model is built, whose values are those of `create_model`."""
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        type=assignment,
        help="another argument of create_model, such as fusion=none or depth=[[1,2,0]] (may be repeated)",
    )
    parser.add_argument("--image-size", metavar="SIZE", type=size, help="the input's side, or HEIGHTxWIDTH")
    parser.add_argument(
        "--kernels",
        choices=("auto", *backends.BACKENDS),
        default="auto",
        help="which backend the ops use (default: %(default)s, the fastest that is here)",
    )


def add_class_argument(parser: argparse.ArgumentParser) -> None:
    """The argument that names the classes where the weights do not."""
    parser.add_argument(
        "--classes",
        metavar="FILE",
        help="the classes' names, in the order of the logits: one a line, or a JSON list or object by index",
    )


def load(options: argparse.Namespace, *, needs_weights: bool = True) -> Loaded:
    """The model that `options` ask for. Raises CommandError for whatever does not fit, ModelError where no model can be
    built.

    needs_weights: a model of initial weights will not do.
    """
    device, settings = _device(options.device), dict(options.set)
    check_kernels(options.kernels, device)
    if options.checkpoint is None and needs_weights and options.model is not None:
        raise CommandError(f"--model {options.model} names no weights: expected --checkpoint FILE too")
    if options.checkpoint is None and (needs_weights or options.model is None):
        expected = "--checkpoint FILE" if needs_weights else "--checkpoint FILE or --model NAME"
        raise CommandError(f"no model given: expected {expected}")
    try:
        shared: dict[str, Any] = dict(image_size=options.image_size, kernels=options.kernels)
        notes: dict[str, Any] = {}
        if options.checkpoint is None:
            model = create_model(options.model, **shared, **settings)
        else:
            name = options.model and canonical_name(options.model)
            model, notes = load_model(options.checkpoint, name=name, **shared, **settings)
    except FAILURES as error:
        raise ModelError(str(of_options(error, options))) from error
    given = getattr(options, "classes", None)
    classes = read_classes(given) if given else notes.get("classes")
    if classes is not None and len(classes) != model.num_classes:
        kind = CommandError if given else ModelError
        raise kind(f"{len(classes)} class names were given, but the model has {model.num_classes} classes")
    dtype = DTYPES[options.dtype]
    crop_ratio = notes.get("crop_ratio", default_crop_ratio(model.variant))
    multi_label = notes.get("multi_label", False)
    try:
        model.eval().to(device, dtype)
    except RuntimeError as error:  # a GPU that is full
        raise of_the_command_line(error) from error
    return Loaded(model, classes, crop_ratio, multi_label, device, dtype)


def read_classes(path: str) -> list[str]:
    """Names from a file of one per line, or of JSON: a list, or an object by index (values that are lists, as
    ImageNet's, end in the name). Raises CommandError.
    """
    try:
        return read_names(path)
    except OSError as error:
        raise CommandError(f"--classes {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CommandError(f"--classes {path}: {error}") from error


def check_writable(option: str, path: str | None) -> None:
    """Raises CommandError, before any work, where a file cannot be written: its folder is missing or read-only, its
    name too long.
    """
    if path is None or path == "-":
        return
    if Path(path).is_dir():
        raise CommandError(f"{option} must be a file, {path} is a folder")
    if not Path(path).parent.is_dir():
        raise CommandError(f"{option} {path}: there is no folder {Path(path).parent}")
    try:
        try_to_write(path)
    except OSError as error:
        raise CommandError(f"{option} {path}: {error.strerror or error}") from error


def check_folder(option: str, path: Path) -> None:
    """Raises CommandError, before any work, where no folder is or can be made at `path`, or none can be written to."""
    there = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    try:
        try_to_write(there / "x")
    except OSError as error:
        raise CommandError(f"{option} {path}: {error.strerror or error}") from error


def check_kernels(kernels: str, device: torch.device | str) -> None:
    """Raises CommandError where the backend that --kernels names is not here, or takes no tensors on `device`."""
    if kernels in ("auto", "reference"):
        return
    if (why := backends.reason(kernels)) is not None:
        raise CommandError(f"--kernels {kernels} is not available: {why}")
    if torch.device(device).type not in (found := backends.devices(kernels)):
        raise CommandError(f"--kernels {kernels} takes tensors on {' and '.join(found)}, the device is {device}")


def of_options(error: BaseException, options: argparse.Namespace) -> CommandError:
    """`error`, of a library that names its arguments, as one that names the option that the argument comes from."""
    text = str(of_the_command_line(error))
    found = re.match(r"(\w+)(?:='(\w+)')?(?= must be | needs )", text)
    if found and found[1] not in ("data", "set") and hasattr(options, found[1]):
        value = f" {found[2]}" if found[2] else ""
        text = f"--{found[1].replace('_', '-')}{value}{text[found.end() :]}"
    return CommandError(text)


def check_fits(what: str, size: int) -> None:
    """Raises CommandError, naming what they are for, if `size` bytes are more than there are."""
    try:
        check_memory(what, size)
    except ValueError as error:
        raise CommandError(str(error)) from error


def progress(steps: Iterable[Any] | None = None, *, total: int, unit: str, shown: bool = True) -> Any:
    """tqdm's bar on standard error, over `steps` or to be moved by hand; none where nobody watches."""
    from tqdm import tqdm

    return tqdm(steps, total=total, unit=unit, disable=None if shown else True, leave=False, dynamic_ncols=True)


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if float(torch.ones(1, device=device).add(1)) != 2:
            raise RuntimeError("it does not compute")
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError, ImportError) as error:
        reason = (str(error).splitlines() or ["there is no such device here"])[0]
        raise CommandError(f"--device {name}: {reason}") from error
    return device


def size(text: str) -> int | tuple[int, int]:
    """The value of an option --image-size: a side, or (height, width)."""
    match = re.fullmatch(r"(\d+)(?:[x×](\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected a side or HEIGHTxWIDTH, such as 240 or 384x288, got {text!r}")
    sides = [int(side) for side in match.groups() if side is not None and len(side) <= 9]
    if len(sides) != 1 + (match[2] is not None) or min(sides) < 1 or max(sides) > LARGEST:
        raise argparse.ArgumentTypeError(f"expected sides from 1 to {LARGEST}, got {text[:80]!r}")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def assignment(text: str) -> tuple[str, Any]:
    """The value of an option --set: a name and, read as JSON where it is, a value."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    if name in ("image_size", "kernels", "checkpoint", "name"):
        option = "model" if name == "name" else name.replace("_", "-")
        raise argparse.ArgumentTypeError(f"{name} has an option of its own, --{option}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
    except RecursionError as error:
        raise argparse.ArgumentTypeError(f"expected a value of {name} that is not nested so deep") from error
