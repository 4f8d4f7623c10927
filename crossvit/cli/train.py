"""`crossvit train`: a model from a folder of images, by a published recipe or one's own."""

import argparse
import os
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3

from ..data.datasets import Images, open_dataset
from ..data.transforms import IMAGENET_MEAN, IMAGENET_STD, evaluation_transform, training_transform
from ..factory import create_model
from ..models.classifier import Classifier
from ..system.failures import Parser, guarded, of_the_command_line, prepared, say
from ..system.files import remove_unfinished, try_to_write
from ..system.text import print_line, printable
from ..training.distributed import STRATEGIES, Processes, processes, replicate, shard
from ..training.files import Log, load
from ..training.loading import EpochSampler, Seeded, Shard, evaluation_loader, training_loader
from ..training.loop import Stop, Trainer
from ..training.objective import Objective, Teacher
from ..training.optimizer import Schedule, build_optimizer
from ..training.recipes import Recipe, add_recipe_arguments, recipe_from
from ..training.state import Run, seed_generators
from .commands import FAILURES, add_building_arguments

# Arguments of create_model that a run has from elsewhere
SETTLED = {
    "num_classes": "the data",
    "in_chans": "the images, which are RGB",
    "drop_rate": "--drop",
    "drop_path_rate": "--drop-path",
}

# Options of a run that its checkpoints note beside the model's and the recipe's
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Trains a model. One process needs no launcher; several, on one machine or many, are started with torchrun: "
        "torchrun --nproc-per-node 8 -m crossvit train …. The folder --out gets last.pth (everything, to resume from), "
        "best.pth (the weights that scored best), metrics.jsonl and curves.png. Ctrl-C saves and ends with status 130."
    )
    parser.add_argument(
        "data",
        help="folder with train/ and val/, each of one folder of images per class, or with a labels.csv for several "
        "labels per image; or cifar10:FOLDER, cifar100:FOLDER as torchvision stores them",
    )
    parser.add_argument("--out", type=Path, default=Path("run"), metavar="FOLDER", help="where everything goes (run)")
    parser.add_argument(
        "--model",
        default="crossvit_9_240",
        metavar="NAME",
        help="one of those that crossvit info lists (crossvit_9_240)",
    )
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="weights to start from, or a name on timm's hub; another head starts anew"
    )
    add_building_arguments(parser)
    parser.add_argument(
        "--resume",
        metavar="auto|FILE",
        help="go on from a last.pth, with the options that the run had; auto: --out's, if there is one",
    )
    parser.add_argument("--teacher", metavar="NAME", help="timm's model to distil from, with --distillation")
    parser.add_argument("--teacher-checkpoint", metavar="FILE", help="its weights; without, timm fetches them")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, order and augmentation (0)")
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="auto is cuda where there is one; under torchrun each process has its own",
    )
    parser.add_argument("--strategy", default="auto", choices=STRATEGIES, help="auto is ddp, with several processes")
    parser.add_argument("--deterministic", action="store_true", help="on a GPU too, the same run gives the same bits")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that read images, beside each that computes (as the cores allow)",
    )
    parser.add_argument("--eval-batch-size", type=int, metavar="N", help="per process; by default training's")
    parser.add_argument(
        "--on-broken",
        default="stop",
        choices=("stop", "skip"),
        help="what an image that is broken, not there or not readable does to the run (stop)",
    )
    parser.add_argument(
        "--allow-empty-classes", action="store_true", help="a folder without images is a class too, not an error"
    )
    parser.add_argument(
        "--log-every", type=int, default=50, metavar="STEPS", help="between two lines of metrics.jsonl (50)"
    )
    parser.add_argument(
        "--checkpoint-every",
        type=int,
        default=0,
        metavar="STEPS",
        help="write last.pth this often within an epoch too (0: at its end alone)",
    )
    add_recipe_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Trains as the parsed options say. Returns the exit status: 0, 2 for what cannot be as it was asked, 1 for a run
    that failed on its way, 130 after Ctrl-C (143 after SIGTERM), with everything saved.
    """
    with ExitStack() as stack:
        stop = stack.enter_context(Stop())
        try:
            place = stack.enter_context(processes(options.device))
            trainer = prepare(options, place, stop)
        except FAILURES as error:
            raise of_the_command_line(error) from error
        try:
            status = trainer.train()
        except Exception:
            if place.first and (options.out / "last.pth").exists():
                say(f"what was saved is kept; go on with --resume {printable(options.out / 'last.pth')}")
            raise
        finally:
            with suppress(OSError):  # a full disk has been said
                trainer.log.close()
        if status and place.first:
            say(f"stopped; go on with --resume {printable(options.out / 'last.pth')}")
        return status


def prepare(options: argparse.Namespace, place: Processes, stop: Stop) -> Trainer:
    """Everything that a run needs, resumed where that is asked for. Raises what the options' values raise: ValueError,
    TypeError, OSError, RuntimeError, ImportError, naming the option.
    """
    _check(options)
    recipe = recipe_from(options)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if place.first:
        _check_out(options.out)
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
            ema.foreach = False  # torch's fused form of it is not there for sharded tensors
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


def _check_out(out: Path) -> None:
    """Raises ValueError where nothing can be written to the folder, or made of it where it is not there yet."""
    there = next(folder for folder in (out, *out.absolute().parents) if os.path.lexists(folder))
    try:
        try_to_write(there / "last.pth")
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}") from error


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
    recipe, place = run.recipe, run.place
    parameters = sum(p.numel() for p in run.model.parameters())
    strategy = "" if place.world == 1 else f" ({'fsdp' if options.strategy == 'fsdp' else 'ddp'})"
    return (
        f"{options.model}, {parameters:,} parameters, {'×'.join(map(str, run.model.image_size))}; "
        f"{len(run.training)} images of {len(run.training.classes)} classes, "
        f"{0 if validation is None else len(validation)} to validate; batch {recipe.batch_size}, "
        f"learning rate {recipe.scaled_lr:.3g}, {recipe.precision}; {place.world} × {place.device.type}{strategy}, "
        f"{workers} workers, kernels {options.kernels}"
    )


def main(arguments: list[str] | None = None) -> int:
    """`crossvit train` alone: what it is given are its own arguments."""
    parser = Parser("crossvit train")
    add_arguments(parser)
    return guarded("train", run, prepared(lambda: parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
