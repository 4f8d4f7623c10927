"""What `crossvit train` makes of its options: models, data, optimizer and all that a run needs."""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3

from crossvit_kernels.backends import in_words

from ..data.datasets import Images, open_dataset
from ..data.transforms import IMAGENET_MEAN, IMAGENET_STD, evaluation_transform, training_transform
from ..factory import create_model
from ..models.classifier import Classifier
from ..system.files import remove_unfinished, write_text
from ..system.text import print_line, printable
from ..training.distributed import Processes, replicate, shard
from ..training.files import Log, load
from ..training.loading import EpochSampler, Seeded, Shard, evaluation_loader, training_loader
from ..training.loop import Stop, Trainer
from ..training.objective import Objective, Teacher
from ..training.optimizer import Schedule, build_optimizer
from ..training.recipes import Recipe, recipe_from
from ..training.state import Run, seed_generators
from .commands import check_folder, check_kernels
from .config import to_yaml

# These arguments of create_model come from elsewhere in a run.
SETTLED = {
    "num_classes": "the data",
    "in_chans": "the images, which are RGB",
    "drop_rate": "--drop",
    "drop_path_rate": "--drop-path",
}

# A run's checkpoints note these options beside the model's and the recipe's.
SETTINGS = (
    "seed",
    "kernels",
    "teacher",
    "teacher_checkpoint",
    "device",
    "strategy",
    "deterministic",
    "workers",
    "eval_batch_size",
    "on_broken",
    "log_every",
    "checkpoint_every",
)


def prepare(options: argparse.Namespace, place: Processes, stop: Stop) -> Trainer:
    """Everything that a run needs, resumed where that is asked for. Raises what the options' values raise: ValueError,
    TypeError, OSError, RuntimeError, ImportError, naming the option.
    """
    _check(options)
    check_kernels(options.kernels, place.device)
    recipe = recipe_from(options)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if place.first:
        check_folder("--out", options.out)
    training, validation = _datasets(options)
    seed_generators(options.seed)  # the same initial weights everywhere
    model = _model(options, recipe, training)
    model.to(place.device)
    teacher = _teacher(options, model, place)
    objective = Objective(recipe, model.num_classes, training.multi_label, teacher)
    sampler = EpochSampler(
        len(training),
        recipe.batch_size,
        pieces=recipe.accumulate,
        rank=place.rank,
        world=place.world,
        seed=options.seed,
        shuffle=recipe.shuffle,
        repeats=recipe.repeats,
    )
    evaluation = evaluation_transform(model.image_size, recipe.crop_ratio)
    augmented = training_transform(
        model.image_size,
        crop_scale=recipe.crop_scale,
        flip=recipe.flip,
        auto_augment=recipe.auto_augment,
        color_jitter=recipe.color_jitter,
        erasing=recipe.erasing,
    )
    training.transform = augmented if recipe.augment else evaluation
    # More of them than batches would have nothing to do.
    workers, pin = min(_workers(options, place), sampler.steps * recipe.accumulate), place.device.type == "cuda"
    loader = training_loader(Seeded(training, options.seed, options.on_broken), sampler, workers, pin)
    validating = None
    if validation is not None:
        validation.transform = evaluation
        each = options.eval_batch_size or recipe.batch_size // (place.world * recipe.accumulate)
        part = Shard(validation, place.rank, place.world, options.on_broken)
        validating = evaluation_loader(part, min(each, len(part)), workers, pin)

    ema = ModelEmaV3(model, decay=recipe.ema, use_warmup=recipe.ema_warmup) if recipe.ema else None
    model.train()
    if place.group and options.strategy == "fsdp":
        shard(model, place)
        if ema is not None:
            shard(ema.module, place)
            ema.foreach = False  # torch has no fused form of it for sharded tensors
    network = model if options.strategy == "fsdp" else replicate(model, place)
    optimizer = build_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(place.device.type, enabled=recipe.precision == "float16")
    seed_generators(options.seed, 1 + place.rank)
    run = Run(model, optimizer, scaler, ema, recipe, training, place, settings=_settings(options, place, workers))
    if place.first:
        options.out.mkdir(parents=True, exist_ok=True)
        remove_unfinished(options.out)
    place.wait()
    _resume(options, run)
    place.wait()  # all have looked into the folder
    metrics = options.out / "metrics.jsonl" if place.first else None
    log = Log(metrics, run.position.steps, tensorboard=options.out / "tensorboard")
    if place.first:
        write_text(options.out / "args.yaml", to_yaml(options))
        print_line(_summary(run, options, workers, validation), flush=True)
    return Trainer(
        run=run,
        network=network,
        objective=objective,
        schedule=Schedule(optimizer, recipe, sampler.steps),
        sampler=sampler,
        training=loader,
        validation=validating,
        folder=options.out,
        log=log,
        log_every=options.log_every,
        checkpoint_every=options.checkpoint_every,
        stop=stop,
    )


def _check(options: argparse.Namespace) -> None:
    for name, least in (("log_every", 1), ("checkpoint_every", 0), ("workers", 0), ("eval_batch_size", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    for name, _ in options.set:
        if name in SETTLED:
            raise ValueError(f"--set {name}=… cannot be: {name} is given by {SETTLED[name]}")
    if options.strategy == "fsdp" and "WORLD_SIZE" not in os.environ:
        raise ValueError("--strategy fsdp needs processes to shard over: start it with torchrun -m crossvit train …")


def _datasets(options: argparse.Namespace) -> tuple[Images, Images | None]:
    training = open_dataset(options.data, "train", allow_empty=options.allow_empty_classes)
    try:
        return training, open_dataset(options.data, "val", training.classes)
    except FileNotFoundError:
        return training, None


def _model(options: argparse.Namespace, recipe: Recipe, training: Images) -> Classifier:
    model = create_model(
        options.model,
        checkpoint=options.checkpoint,
        num_classes=len(training.classes),
        image_size=options.image_size,
        drop_rate=recipe.drop,
        drop_path_rate=recipe.drop_path,
        kernels=options.kernels,
        **dict(options.set),
    )
    model.set_grad_checkpointing(recipe.grad_checkpointing)
    return model


def _teacher(options: argparse.Namespace, model: Classifier, place: Processes) -> Teacher | None:
    if options.teacher is None:
        return None
    teacher = Teacher(
        options.teacher, model.num_classes, model.image_size, IMAGENET_MEAN, IMAGENET_STD, options.teacher_checkpoint
    )
    return teacher.to(place.device)


def _workers(options: argparse.Namespace, place: Processes) -> int:
    """As many as cores for each process of this machine, up to 8; on a CPU the model wants most of them."""
    if options.workers is not None:
        return options.workers
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, cores if place.device.type == "cuda" else cores // 4)


def _settings(options: argparse.Namespace, place: Processes, workers: int) -> dict[str, Any]:
    """The options that neither the model nor the recipe has, but where things are, for the run's checkpoints."""
    given = {name: getattr(options, name) for name in SETTINGS}
    return given | {"device": place.device.type, "workers": workers}


def _resume(options: argparse.Namespace, run: Run) -> None:
    last = options.out / "last.pth"
    if options.resume is None:
        if last.exists() or (options.out / "metrics.jsonl").exists():
            raise ValueError(f"--out {options.out} holds a run already: --resume auto goes on with it")
        return
    path = last if options.resume == "auto" else Path(options.resume)
    if options.resume == "auto" and not path.exists():
        return
    if path.is_dir():
        raise ValueError(f"--resume {path} is a directory, expected a file such as {path / 'last.pth'}")
    content = load(path)
    try:
        told = run.restore(content)
    except ValueError as error:
        raise ValueError(f"--resume {path}: {error}") from error
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"--resume {path} holds a damaged run, or one of another version: {error}") from error
    if run.place.first:
        print_line("; ".join([f"resumed from {printable(path)} at step {run.position.steps}", *told]), flush=True)


def _summary(run: Run, options: argparse.Namespace, workers: int, validation: Images | None) -> str:
    recipe, place, dtype = run.recipe, run.place, getattr(torch, run.recipe.precision)
    parameters = sum(p.numel() for p in run.model.parameters())
    strategy = "" if place.world == 1 else f" ({'fsdp' if options.strategy == 'fsdp' else 'ddp'})"
    return (
        f"{options.model}, {parameters:,} parameters, {'×'.join(map(str, run.model.image_size))}; "
        f"{len(run.training)} images of {len(run.training.classes)} classes, "
        f"{0 if validation is None else len(validation)} to validate; batch {recipe.batch_size}, "
        f"learning rate {recipe.scaled_lr:.3g}, {recipe.precision}; {place.world} × {place.device.type}{strategy}, "
        f"{workers} workers, kernels {options.kernels} ({in_words(options.kernels, place.device.type, dtype)})"
    )
