"""`crossvit evaluate`: how often a model is right on a folder of images, exactly, on one process or under torchrun."""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.datasets import SPLITS, Images, open_dataset, open_folder
from ..models.crossvit import CrossViT
from ..models.single_branch import VisionTransformer
from ..system.failures import CommandError, of_the_command_line, report, say
from ..system.files import replacing, write_text
from ..system.text import print_line, printable, to_json
from ..training.distributed import Processes, processes
from ..training.evaluation import mean_average_precision
from .commands import (
    Loaded,
    add_class_argument,
    add_model_arguments,
    check_fits,
    check_writable,
    load,
    progress,
)
from .draw_confusion import draw_confusion
from .metrics import Counts
from .pictures import Batch, add_loading_arguments, batches


@dataclass
class Tally:
    """What one process has seen: counts or, of several labels per image, scores and targets; what it could not read."""

    counts: Counts
    scores: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    waited: float = 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        help="a folder with one folder of images per class, or one that holds such a val/ (test/, validation/); with a "
        "labels.csv for several labels per image; or cifar10:FOLDER, cifar100:FOLDER as torchvision stores them",
    )
    parser.add_argument(
        "--allow-empty-classes", action="store_true", help="a folder without images is a class too, not an error"
    )
    parser.add_argument("--split", choices=("val", "train"), default="val", help="which of them (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the results there; - prints them instead of the table")
    parser.add_argument("--confusion", metavar="FILE", help="draw the confusion matrix there, as PNG")
    add_class_argument(parser)
    add_loading_arguments(parser)
    add_model_arguments(parser)
    parser.epilog = (
        "Under torchrun every process takes its share of the images, none twice: the counts are those of one."
    )


def run(options: argparse.Namespace) -> int:
    """0, or 1 where files could not be read, which are named and left out, or --json or --confusion not be written:
    the table, and what else can be, is written all the same.
    """
    check_writable("--json", options.json)
    check_writable("--confusion", options.confusion)
    with processes("cpu" if options.device == "cpu" else "auto") as group:
        if group.group:
            options.device = str(group.device)
        loaded = load(options)
        if loaded.model.num_classes == 0:
            raise CommandError("the model has no head (num_classes=0): nothing to be right about")
        data = _open(options, loaded)
        tally = _evaluate(options, loaded, data, group)
        together = _together(tally, group)
    if not group.first:
        return 0
    for file, reason in together.failures:
        say(f"{printable(file)}: {reason}")
    if len(together.failures) == len(data):
        raise CommandError(f"none of the {len(data)} images of {options.data} could be read")
    result = _result(options, loaded, data, together, group)
    text = to_json(result)  # in one line: a thousand classes have a million pairs
    statuses = [1 if result["failed"] else 0]
    if options.json and options.json != "-":
        statuses.append(_attempt(lambda: write_text(options.json, text)))
    if options.confusion and not data.multi_label:
        statuses.append(_attempt(lambda: _draw(result, data, options.confusion)))
    print_line(text if options.json == "-" else _table(result))
    return max(statuses)


def _attempt(write: Callable[[], None]) -> int:
    """The exit status of writing something that is not all that there is to write."""
    try:
        write()
        return 0
    except Exception as error:
        return report("evaluate", error)


def _draw(result: dict[str, Any], data: Images, path: str) -> None:
    with replacing(path) as temporary:
        draw_confusion(torch.tensor(result["confusion"]), data.classes, temporary)


def _open(options: argparse.Namespace, loaded: Loaded) -> Images:
    root = Path(options.data)
    splits = [name for names in SPLITS.values() for name in names]
    try:
        if root.is_dir() and not any((root / name).is_dir() for name in splits):
            data = open_folder(root, loaded.classes, allow_empty=options.allow_empty_classes)
        else:
            data = open_dataset(options.data, options.split, loaded.classes, allow_empty=options.allow_empty_classes)
    except (OSError, ValueError) as error:
        raise of_the_command_line(error) from error
    if len(data.classes) != loaded.model.num_classes:
        raise CommandError(
            f"{options.data} has {len(data.classes)} classes, the model {loaded.model.num_classes}: say with --classes "
            "which folder is which of the model's"
        )
    return data


def _evaluate(options: argparse.Namespace, loaded: Loaded, data: Images, group: Processes) -> Tally:
    model, share = loaded.model, range(group.rank, len(data), group.world)  # each image is one process's
    branches = model.num_branches if isinstance(model, CrossViT) else 0
    check_fits(f"the confusion matrix of {model.num_classes:,} classes", 8 * model.num_classes**2)
    tally = Tally(Counts(model.num_classes, branches, loaded.device))
    targets = torch.as_tensor(data.targets)
    bar = progress(total=len(share), unit="image", shown=group.first)
    began = asked = time.perf_counter()
    with torch.inference_mode(), bar:
        for batch in batches(data, loaded, options, share):
            tally.waited += time.perf_counter() - asked
            _count(tally, model, batch, targets[batch.indices].to(loaded.device))
            tally.failures += [(str(data.paths[index]), reason) for index, reason in batch.failures]
            bar.update(len(batch.indices) + len(batch.failures))
            asked = time.perf_counter()
        tally.seconds = asked - began
    return tally


def _count(tally: Tally, model: CrossViT | VisionTransformer, batch: Batch, targets: Tensor) -> None:
    if not batch.indices:
        return
    if isinstance(model, CrossViT):
        branches = model.forward_branches(batch.images)
        logits = [torch.stack(branches).mean(dim=0), *branches]
    else:
        logits = [model(batch.images)]
    if targets.dim() == 1:
        tally.counts.add(logits, targets)
        torch.cuda.current_stream().synchronize() if targets.is_cuda else None
    else:
        tally.scores.append(torch.stack([own.float() for own in logits]).cpu())
        tally.targets.append(targets.cpu())


def _together(tally: Tally, group: Processes) -> Tally:
    """All processes' tallies as one: times are those of the slowest."""
    counts = tally.counts
    group.sum(counts.values)
    group.sum(counts.confusion)
    empty = torch.empty(len(counts.accuracies()), 0, len(counts.confusion)), torch.empty(0, len(counts.confusion))
    scores = torch.cat(tally.scores, dim=1) if tally.scores else empty[0]
    targets = torch.cat(tally.targets) if tally.targets else empty[1]
    rest = group.gather((scores, targets, tally.failures, tally.seconds, tally.waited))
    all_scores, all_targets, failures, seconds, waited = zip(*rest)
    failed = [failure for several in failures for failure in several]
    return Tally(counts, list(all_scores), list(all_targets), failed, max(seconds), max(waited))


def _result(
    options: argparse.Namespace, loaded: Loaded, data: Images, tally: Tally, group: Processes
) -> dict[str, Any]:
    model, counts = loaded.model, tally.counts
    height, width = model.image_size
    patches = model.patch_size if isinstance(model, CrossViT) else ()
    crop_ratio = loaded.crop_ratio if options.crop_ratio is None else options.crop_ratio
    result: dict[str, Any] = {
        "model": model.variant,
        "checkpoint": str(options.checkpoint),
        "data": str(options.data),
        "images": counts.images,
        "failed": tally.failures,
        "processes": group.world,
        "device": str(loaded.device),
        "dtype": options.dtype,
        "kernels": options.kernels,
        "image_size": [height, width],
        "crop_ratio": crop_ratio,
    }
    if data.multi_label:
        scores, targets = torch.cat(tally.scores, dim=1), torch.cat(tally.targets)
        result["images"] = len(targets)
        mean, *alone = (100 * mean_average_precision(own, targets) for own in scores)
        result |= {"mean_average_precision": mean}
        result["branches"] = [
            {"patch_size": patch, "mean_average_precision": own} for patch, own in zip(patches, alone)
        ]
        result["classes"] = {
            name: 100 * mean_average_precision(scores[0][:, c : c + 1], targets[:, c : c + 1])
            for c, name in enumerate(data.classes)
        }
    else:
        (top1, top5), *branches = counts.accuracies()
        right = counts.values[1:].tolist()
        result |= {"top1": top1, "top5": top5, "correct": {"top1": right[0], "top5": right[1]}}
        result["branches"] = [
            {
                "patch_size": patch,
                "top1": one,
                "top5": five,
                "correct": {"top1": right[2 * b], "top5": right[2 * b + 1]},
            }
            for b, (patch, (one, five)) in enumerate(zip(patches, branches), 1)
        ]
        per_class = 100 * counts.confusion.diagonal().double() / counts.confusion.sum(dim=1)
        result["classes"] = dict(zip(data.classes, per_class.tolist()))  # NaN, null in JSON, where there is no image
        result["confusion"] = counts.confusion.tolist()
    result["images_per_second"] = result["images"] / tally.seconds if tally.seconds else None
    result["waiting_for_images"] = tally.waited / tally.seconds if tally.seconds else None
    return result


def _table(result: dict[str, Any]) -> str:
    lines = [f"{result['model'] or 'model'} on {result['images']:,} images of {printable(result['data'])}"]
    rows = [("model", result)]
    rows += [(f"branch {b} alone, patches {x['patch_size']}", x) for b, x in enumerate(result["branches"])]
    if "top1" in result:
        lines.append(f"{'':<28}{'top-1':>8}{'top-5':>8}")
        lines += [f"{name:<28}{own['top1']:>8.2f}{own['top5']:>8.2f}" for name, own in rows]
    else:
        lines.append(f"{'':<28}{'mAP':>8}")
        lines += [f"{name:<28}{own['mean_average_precision']:>8.2f}" for name, own in rows]
    if result["images_per_second"]:
        count, waiting = result["processes"], result["waiting_for_images"]
        where = f"{count} processes" if count > 1 else "1 process"
        lines.append(f"{result['images_per_second']:.1f} images/s on {result['device']}, {where}")
        if waiting > 0.2 and waiting * result["images"] / result["images_per_second"] > 2:  # seconds
            lines.append(f"{waiting:.0%} of the time the model waited for images to be read: more --workers may help")
    if result["failed"]:
        lines.append(f"{len(result['failed'])} files could not be read and are left out")
    return "\n".join(lines)
