"""`crossvit predict`: the likeliest classes of images."""

import argparse
from typing import Any

import torch
from torch import Tensor

from ..system.failures import CommandError, report, say
from ..system.files import write_text
from ..system.text import print_line, printable, to_json
from .commands import Loaded, add_class_argument, add_model_arguments, check_writable, load, progress
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
    parser.epilog = (
        "A file that cannot be read, or a folder without files, is named, and the rest goes on; what was found before "
        "Ctrl-C or a failure is kept."
    )


def run(options: argparse.Namespace) -> int:
    """0, or 1 where files could not be read, a folder or glob had none, or --output could not be written: they are
    reported with the reason."""
    if options.top < 1:
        raise CommandError(f"--top must be at least 1, got {options.top}")
    check_writable("--output", options.output)
    loaded = load(options)
    if loaded.model.num_classes == 0:
        raise CommandError("the model has no head (num_classes=0): it has no classes to choose from")
    files, without = find_files(options.images)
    for text in without:
        say(text)
    rows: dict[int, dict[str, Any]] = {}
    try:
        _predict(loaded, files, rows, options)
    except BaseException:  # an hour's rows are not lost with the one that failed
        _write(rows, options)
        raise
    status = _write(rows, options)
    failed = [rows[index] for index in sorted(rows) if "error" in rows[index]]
    if failed:
        if options.format == "json" or options.output:
            for row in failed:
                say(_row(row))
        say(f"{len(failed)} of {len(rows)} files could not be read")
    return 1 if failed or without else status


def _predict(loaded: Loaded, files: list[str], rows: dict[int, dict[str, Any]], options: argparse.Namespace) -> None:
    """Fills `rows` by the files' indices; prints those of a table in the order asked for, as soon as that can be."""
    shown = 0
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


def _write(rows: dict[int, dict[str, Any]], options: argparse.Namespace) -> int:
    """Writes what has not been printed row by row: the exit status. What --output does not take is printed."""
    if not rows or (options.format == "table" and not options.output):
        return 0
    ordered = [rows[index] for index in sorted(rows)]
    text = to_json(ordered, indent=1) if options.format == "json" else "\n".join(map(_row, ordered))
    if options.output:
        try:
            write_text(options.output, text + "\n")
            return 0
        except OSError as error:
            status = report("predict", error)
            print_line(text)
            return status
    print_line(text)
    return 0


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
    file = printable(row["file"])
    if "error" in row:
        return f"{file}  error: {row['error']}"
    return f"{file}  " + "  ".join(f"{printable(p['class'])} ({p['probability']:.1%})" for p in row["predictions"])


def _print_row(row: dict[str, Any]) -> None:
    if "error" in row:  # belongs where it is seen even if the table goes to a file or a pipe
        say(_row(row))
    else:
        print_line(_row(row), flush=True)
