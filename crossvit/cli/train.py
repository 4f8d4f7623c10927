"""`crossvit train`: a model from a folder of images, by a published recipe or one's own."""

import argparse
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

from ..system.failures import Parser, guarded, prepared, say
from ..system.text import printable
from ..training.distributed import STRATEGIES, processes
from ..training.loop import Stop
from ..training.recipes import add_recipe_arguments
from .commands import FAILURES, add_building_arguments, add_config_argument, of_options
from .config import parse
from .train_setup import prepare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Trains a model. One process needs no launcher; several, on one machine or many, are started with torchrun: "
        "torchrun --nproc-per-node 8 -m crossvit train …. The folder --out gets last.pth (everything, to resume from), "
        "best.pth (the weights that scored best), metrics.jsonl, curves.png and args.yaml (the options, for --config). "
        "Ctrl-C saves and ends with status 130."
    )
    parser.add_argument(
        "data",
        help="folder with train/ and val/, each of one folder of images per class, or with a labels.csv for several "
        "labels per image; or cifar10:FOLDER, cifar100:FOLDER as torchvision stores them",
    )
    parser.add_argument("--out", type=Path, default=Path("run"), metavar="FOLDER", help="where everything goes (run)")
    add_config_argument(parser)
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
            raise of_options(error, options) from error
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


def main(arguments: list[str] | None = None) -> int:
    """`crossvit train` alone: what it is given are its own arguments."""
    parser = Parser("crossvit train")
    add_arguments(parser)
    given = sys.argv[1:] if arguments is None else arguments
    return guarded("train", run, prepared(lambda: parse(parser, parser, given), "train"))


if __name__ == "__main__":
    sys.exit(main())
