"""`crossvit predict`: the likeliest classes of images."""

import argparse
import json
import sys
from typing import Any

import torch
from torch import Tensor

from .commands import CommandError, Loaded, add_class_argument, add_model_arguments, check_writable, load, progress
from .files import write_text
from .pictures import add_loading_arguments, batches, find_files, of_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a file, a folder (all of its files, deep), a glob in quotes, or - for paths from standard input",
    )
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes per image (default: %(default)s)")
    parser.add_argument(
        "--format", choices=("table", "json"), default="table", help="how they are printed (default: %(default)s)"
    )
    parser.add_argument("--output", metavar="FILE", help="write there instead of printing")
    add_class_argument(parser)
    add_loading_arguments(parser)
    add_model_arguments(parser)
    parser.epilog = "Exit status: 0, or 1 where a file could not be read; it is named, and the rest goes on."


def run(options: argparse.Namespace) -> int:
    """0, or 1 where files could not be read: they are reported with the reason."""
    if options.top < 1:
        raise CommandError(f"--top must be at least 1, got {options.top}")
    check_writable("--output", options.output)
    loaded = load(options)
    if loaded.model.num_classes == 0:
        raise CommandError("the model has no head (num_classes=0): it has no classes to choose from")
    files = find_files(options.images)
    rows: dict[int, dict[str, Any]] = {}
    shown = 0  # rows are printed in the order asked for, as soon as that can be
    with torch.inference_mode(), progress(total=len(files), unit="image") as bar:
        for batch in batches(of_files(files), loaded, options):
            for index, reason in batch.failures:
                rows[index] = {"file": files[index], "error": reason}
            if batch.indices:
                answers = best(loaded, loaded.model(batch.images), options.top)
                rows |= {i: {"file": files[i], "predictions": own} for i, own in zip(batch.indices, answers)}
            if options.format == "table" and not options.output:
                bar.clear()
                for index in range(shown, len(rows)):
                    _print_row(rows[index])
                shown = len(rows)
            bar.update(len(batch.indices) + len(batch.failures))
    ordered = [rows[index] for index in sorted(rows)]
    if options.format == "json" or options.output:
        text = json.dumps(ordered, indent=1) if options.format == "json" else "\n".join(map(_row, ordered))
        if options.output:
            write_text(options.output, text + "\n")
        else:
            print(text)
    failed = [row for row in ordered if "error" in row]
    if failed:
        if options.format == "json" or options.output:
            for row in failed:
                print(_row(row), file=sys.stderr)
        print(f"{len(failed)} of {len(ordered)} files could not be read", file=sys.stderr)
    return 1 if failed else 0


def best(loaded: Loaded, logits: Tensor, top: int) -> list[list[dict[str, Any]]]:
    """For each of logits (B, classes) the `top` likeliest classes, likeliest first: index, name and probability (of a
    model of several labels each class's own).
    """
    logits = logits.float()
    probabilities = logits.sigmoid() if loaded.multi_label else logits.softmax(dim=1)
    values, indices = probabilities.topk(min(top, logits.shape[1]), dim=1)
    return [
        [{"index": i, "class": loaded.class_name(i), "probability": p} for p, i in zip(own, which)]
        for own, which in zip(values.tolist(), indices.tolist())
    ]


def _row(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['file']}  error: {row['error']}"
    return f"{row['file']}  " + "  ".join(f"{p['class']} ({p['probability']:.1%})" for p in row["predictions"])


def _print_row(row: dict[str, Any]) -> None:
    # Errors belong where they are seen even if the table goes to a file or a pipe.
    print(_row(row), file=sys.stderr if "error" in row else sys.stdout, flush=True)
