"""`crossvit explain`: what the model looks at, drawn over the pictures."""

import argparse
import math
import os
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ..attention.drawing import Panel, draw_panels, panel_size
from ..attention.maps import AttentionMap, attention_maps
from ..attention.rollout import attention_rollout
from ..data.datasets import SUFFIXES
from ..data.images import ImageError, load_image
from ..models.crossvit import CrossViT
from ..system.failures import CommandError, say
from ..system.files import replacing
from ..system.text import print_line, printable
from .commands import Loaded, add_class_argument, add_model_arguments, check_fits, check_folder, load, progress
from .pictures import add_loading_arguments, batches, find_files, of_files
from .predict import best


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a file, a folder (all of its files, deep), a glob in quotes, or - for paths from standard input",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        default="explained",
        help="where the PNGs go, one per picture, of its name: made if it is not there, and a PNG of that name is "
        "replaced (default: %(default)s)",
    )
    parser.add_argument("--heads", action="store_true", help="head by head instead of their mean")
    parser.add_argument("--all-stages", action="store_true", help="every stage of the model, not the last alone")
    add_class_argument(parser)
    add_loading_arguments(parser, batch_size=8)
    add_model_arguments(parser)
    parser.epilog = (
        "Drawn are, over what the model saw of the picture: attention rollout, which follows attention through all "
        "layers back to the patches of all branches; the attention of each branch's CLS token to its own patches (last "
        "block); that of each cross-attention to the other branch's patches."
    )


def run(options: argparse.Namespace) -> int:
    """0, or 1 where files could not be read, or a folder or glob had none: they are named with the reason."""
    folder = Path(options.output)
    if folder.suffix.lower() in SUFFIXES and not folder.is_dir():
        raise CommandError(f"--output {folder}: expected a folder, for a PNG of each picture, got a picture's name")
    check_folder("--output", folder)
    loaded = load(options)
    tokens = 1 + max(math.prod(grid) for grid in loaded.model.position_grids().values())
    check_fits(f"attention rollout over {tokens:,} tokens an image (--image-size)", 12 * tokens**2)
    files, without = find_files(options.images)
    for text in without:
        say(text)
    images = of_files(files)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output {folder}: {error.strerror or error}") from error
    names, failed = _names(files), 0
    with torch.inference_mode(), progress(total=len(files), unit="image") as bar:
        for batch in batches(images, loaded, options):
            for index, reason in batch.failures:
                say(f"{printable(files[index])}  error: {reason}")
                failed += 1
            if batch.indices:
                maps, rollout = (
                    attention_maps(loaded.model, batch.images),
                    attention_rollout(loaded.model, batch.images),
                )
                logits = loaded.model(batch.images)
                for i, index in enumerate(batch.indices):
                    try:
                        picture = _seen(load_image(files[index]), loaded, options.crop_ratio)
                    except (OSError, ImageError) as error:  # it was there a moment ago
                        say(f"{printable(files[index])}  error: {error}")
                        failed += 1
                        continue
                    rows = panels(_of_image(maps, i), [[x[i] for x in own] for own in rollout], loaded, options)
                    path = folder / names[index]
                    with replacing(path) as temporary:
                        draw_panels(picture, rows, _title(files[index], loaded, logits[i]), temporary)
                    bar.clear()
                    print_line(printable(path), flush=True)
            bar.update(len(batch.indices) + len(batch.failures))
    if failed:
        say(f"{failed} of {len(files)} files could not be read")
    return 1 if failed or without else 0


def panels(
    maps: list[AttentionMap], rollout: list[list[Tensor]], loaded: Loaded, options: argparse.Namespace
) -> list[list[Panel]]:
    """What is drawn of one image: the picture, attention rollout, and the means of the maps' heads; with --heads a row
    of its heads for each map.

    maps: of one image, weights (1, H, T); rollout: per branch (rows, columns) per branch that it goes back to.
    """
    last = max((found.stage for found in maps), default=0)
    stages = [options.all_stages or found.stage == last for found in maps]
    chosen = [found for found, wanted in zip(maps, stages) if wanted]
    several = options.all_stages and last > 0
    first = [Panel("the picture, as the model sees it"), Panel("attention rollout", _by_place(rollout))]
    drawn: dict[tuple[int, bool], list[list[Panel]]] = {}  # by stage, and whether a fusion's
    for found in chosen:
        for other, heads in zip(found.reads, found.pictures()):
            name, place = _describe(found, other, loaded), [f"stage {found.stage + 1}"] * several
            place += [f"layer {found.layer + 1}"] * (found.layer > 0)
            own = [_panel([*place, f"head {h}"], name, head) for h, head in enumerate(heads[0])]
            mean = [_panel(place, name, heads[0].mean(dim=0))]
            drawn.setdefault((found.stage, found.kind != "self"), []).append(own if options.heads else mean)
    if options.heads:
        return [first, *(row for rows in drawn.values() for row in rows)]
    rows = [[panel for row in several_rows for panel in row] for several_rows in drawn.values()]
    if len(rows) == 2 and len(rows[0]) == len(rows[1]):
        return [[first[0], *rows[0]], [first[1], *rows[1]]]
    return [first + rows[0]] if len(rows) == 1 else [first, *rows]


def _by_place(rollout: list[list[Tensor]]) -> Tensor:
    """The mean of all branches' rollout, by place in the picture: shares of its area, whatever the patches' size."""
    parts = [x * x.numel() for own in rollout for x in own]
    size = max(x.shape[0] for x in parts), max(x.shape[1] for x in parts)
    return torch.stack([interpolate(x[None, None], size, mode="bilinear")[0, 0] for x in parts]).mean(dim=0)


def _describe(found: AttentionMap, other: int, loaded: Loaded) -> str:
    """Who reads what, in words."""
    if not isinstance(loaded.model, CrossViT):
        return "the CLS token's attention"
    return f"{_branch(found.branch, loaded)} reads {'itself' if found.kind == 'self' else _branch(other, loaded)}"


def _panel(place: list[str], name: str, weights: Tensor) -> Panel:
    shares = f"{weights.min():.1%} to {weights.max():.1%} a patch"
    return Panel("\n".join([", ".join(place)] * bool(place) + [name, shares]), weights)


def _branch(b: int, loaded: Loaded) -> str:
    patches = loaded.model.patch_size if isinstance(loaded.model, CrossViT) else (0,)
    return f"branch {b} ({patches[b]} px)"


def _of_image(maps: list[AttentionMap], i: int) -> list[AttentionMap]:
    return [replace(found, weights=found.weights[i : i + 1]) for found in maps]


def _title(file: str, loaded: Loaded, logits: Tensor) -> str:
    name = printable(os.path.basename(file))
    if not logits.numel() or loaded.model.num_classes == 0:
        return name
    answers = best(loaded, logits[None], 3)[0]
    return f"{name}:  " + ",  ".join(
        f"{printable(answer['class'])} ({answer['probability']:.0%})" for answer in answers
    )


def _seen(image: Image.Image, loaded: Loaded, crop_ratio: float | None) -> Image.Image:
    """The part of the picture that the model sees, as large as it is drawn."""
    height, width = loaded.model.image_size
    ratio = loaded.crop_ratio if crop_ratio is None else crop_ratio
    scale = min(image.width * ratio / width, image.height * ratio / height)  # of the picture's pixels per input pixel
    box_width, box_height = min(width * scale, image.width), min(height * scale, image.height)
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return image.resize(panel_size(height, width), Image.Resampling.BICUBIC, box)


def _names(files: list[str]) -> list[str]:
    """A PNG's name per file, without its folders; those that would be the same are numbered."""
    names: list[str] = []
    taken: set[str] = set()
    for file in files:
        stem, number = _cut(Path(file).stem) or "image", 1
        name = f"{stem}.png"
        while name in taken:
            number += 1
            name = f"{stem}-{number}.png"
        taken.add(name)
        names.append(name)
    return names


def _cut(name: str) -> str:
    """The beginning of a name that leaves room for a number and a suffix: names have at most 255 bytes."""
    while len(os.fsencode(name)) > 230:
        name = name[:-1]
    return name
