"""`crossvit info`: a model's parts and sizes, what a checkpoint file holds, which models and kernels there are."""

import argparse
import os
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from crossvit_kernels import backends

from ..factory import list_models
from ..system.failures import CommandError, of_the_command_line
from ..system.text import print_line, printable, to_json
from ..weights.checkpoint_file import read_contents
from ..weights.identify import identify
from ..weights.notes import read_notes
from ..weights.wording import describe
from .commands import (
    FAILURES,
    Loaded,
    ModelError,
    add_class_argument,
    add_model_arguments,
    check_kernels,
    load,
)

_NAMES = 5  # classes that are spelled out
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="?",
        metavar="MODEL|FILE",
        help="a model's name, or a checkpoint: short for --model or --checkpoint",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_class_argument(parser)
    add_model_arguments(parser)
    parser.epilog = "Without a model or a checkpoint: the models that there are, and the kernels of this machine."


def run(options: argparse.Namespace) -> int:
    """0. A file whose model cannot be built is still described."""
    _name(options)
    if options.checkpoint is None and options.model is None:
        check_kernels(options.kernels, "cuda" if torch.cuda.is_available() else "cpu")
        found: dict[str, Any] = {"models": list_models(), "kernels": backends.BACKENDS}
        found["kernels"] = {name: backends.reason(name) or "available" for name in backends.BACKENDS}
        print_line(to_json(found, indent=1) if options.json else _overview(found))
        return 0
    found = {}
    if options.checkpoint is not None:
        found["checkpoint"] = _checkpoint(options.checkpoint)
    problem = None
    try:
        loaded = load(options, needs_weights=False)
        found["model"] = _model(loaded)
    except ModelError as error:
        if options.checkpoint is None:
            raise
        problem = str(error)
        found["problem"] = problem
    if options.json:
        print_line(to_json(found, indent=1))
        return 0
    if options.checkpoint is not None:
        print_line(_checkpoint_table(found["checkpoint"]) + "\n")
    if problem is not None:
        print_line(f"no model is built of it: {problem}")
        return 0
    print_line(f"{loaded.model.describe()}\n")
    print_line(_settings(found["model"]))
    return 0


def _name(options: argparse.Namespace) -> None:
    """Has `options.model` or `options.checkpoint` be what stands there without an option. Raises CommandError where
    both are said."""
    if options.what is None:
        return
    file = "/" in options.what or os.path.lexists(options.what) or options.what.endswith(_SUFFIXES)
    name = "checkpoint" if file else "model"
    if getattr(options, name) is not None:
        raise CommandError(f"--{name} {getattr(options, name)} and {options.what} are two: expected one of them")
    setattr(options, name, options.what)


def _checkpoint(path: str) -> dict[str, Any]:
    try:
        contents = read_contents(path)
    except FAILURES as error:
        raise of_the_command_line(error) from error
    state = contents.state
    return {
        "file": str(path),
        "bytes": os.path.getsize(path) if os.path.exists(path) else None,
        "holds": identify(state),
        "tensors": len(state),
        "parameters": sum(value.numel() for value in state.values()),
        "dtypes": dict(Counter(_dtype(value) for value in state.values())),
        "classes": next((v.shape[0] for key, v in state.items() if key.startswith("head") and v.dim() == 2), 0),
        "notes": read_notes(contents.metadata),
        "weights": contents.source,
        "averaged": contents.averaged,
        "beside": {name: describe(value) for name, value in contents.beside.items()},
    }


def _model(loaded: Loaded) -> dict[str, Any]:
    model, description = loaded.model, loaded.model.describe()
    return {
        "name": model.variant,
        "parameters": description.parameters,
        "multiply_adds": description.multiply_adds,
        "attention_multiply_adds": description.attention,
        "parts": [vars(part) for part in description.parts],
        "image_size": list(model.image_size),
        "crop_ratio": loaded.crop_ratio,
        "num_classes": model.num_classes,
        "classes": loaded.classes,
        "multi_label": loaded.multi_label,
        "device": str(loaded.device),
        "dtype": _dtype(next(model.parameters())),
        "bytes": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
    }


def _overview(found: dict[str, Any]) -> str:
    lines = ["models:", *(f"  {name}" for name in found["models"]), "kernels:"]
    return "\n".join(lines + [f"  {name:<10} {state}" for name, state in found["kernels"].items()])


def _checkpoint_table(found: dict[str, Any]) -> str:
    dtypes = ", ".join(found["dtypes"])
    size = "" if found["bytes"] is None else f", {found['bytes'] / 1e6:.1f} MB"
    lines = [
        f"{printable(found['file'])}{size}",
        f"  {found['holds']}: {found['tensors']} tensors of {dtypes}, {found['parameters']:,} numbers",
    ]
    for name, value in found["notes"].items():
        lines.append(f"  {name}: {_short(value) if name == 'classes' else printable(value)}")
    if found["weights"]:
        averaged = ", averaged over steps" if found["averaged"] else ""
        lines.append(f"  the weights are its {printable(found['weights'])}{averaged}")
    if found["beside"]:
        beside = (f"    {printable(name)}: {printable(text)}" for name, text in found["beside"].items())
        lines += ["  it also holds", *beside]
    return "\n".join(lines)


def _settings(found: dict[str, Any]) -> str:
    height, width = found["image_size"]
    several = ", several labels per image" if found["multi_label"] else ""
    names = f" ({_short(found['classes'])})" if found["classes"] else ""
    return "\n".join(
        [
            f"input {height}×{width}, crop ratio {found['crop_ratio']:g}",
            f"{found['num_classes']} classes{names}{several}",
            f"weights {found['bytes'] / 1e6:.1f} MB in {found['dtype']} on {found['device']}",
        ]
    )


def _short(names: list[str]) -> str:
    return ", ".join(map(printable, names[:_NAMES])) + (f", … ({len(names)})" if len(names) > _NAMES else "")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
