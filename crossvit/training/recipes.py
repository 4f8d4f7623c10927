"""The settings of a training run, and the published recipes as presets of them."""

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

from ..data.transforms import check_crop_ratio
from ..models.checks import shown

OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = ("float32", "bfloat16", "float16")
LOSSES = ("cross_entropy", "bce")
UNITS = ("step", "epoch")
METAVARS: dict[Any, str] = {int: "N", float: "X", str: "NAME"}


def _option(default: Any, text: str, *choices: str) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices or None})


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is learnt, apart from the model and the data. Rates are probabilities, angles and
    sizes as the options' help says. Raises ValueError naming the setting that is out of range.
    """

    epochs: int = _option(300, "passes over the training images")
    batch_size: int = _option(4096, "images per step of the optimizer, over all processes and accumulated pieces")
    accumulate: int = _option(1, "pieces that a process computes its part of a batch in, one after the other")
    optimizer: str = _option("adamw", "AdamW, or SGD with Nesterov's momentum", *OPTIMIZERS)
    lr: float = _option(0.004, "highest learning rate; given here it is not scaled")
    lr_batch: int = _option(
        0, "the batch size that the learning rate is for, which scales it to another; 0: no scaling"
    )
    betas: tuple[float, float] = _option((0.9, 0.999), "AdamW's two decay rates")
    eps: float = _option(1e-8, "AdamW's epsilon")
    momentum: float = _option(0.9, "SGD's momentum")
    weight_decay: float = _option(0.05, "of weights; biases, norms, CLS tokens and positions have none")
    layer_decay: float = _option(1.0, "factor of the learning rate per layer away from the head")
    warmup_epochs: float = _option(30.0, "epochs of linear warm-up; the cosine counts from the first epoch")
    warmup_lr: float = _option(1e-6, "learning rate at the first step")
    min_lr: float = _option(1e-5, "learning rate at the end of the cosine")
    schedule_unit: str = _option("step", "what the learning rate changes with", *UNITS)
    clip_grad: float = _option(0.0, "largest norm of all gradients together; 0: no limit")
    ema: float = _option(0.0, "decay of the weights' exponential moving average, which is then evaluated; 0: none")
    ema_warmup: bool = _option(False, "let that decay grow from 0, for short runs")
    precision: str = _option("float32", "16-bit types mean autocast, float16 with a gradient scaler", *PRECISIONS)
    grad_checkpointing: bool = _option(False, "compute blocks again in the backward instead of keeping them")
    loss: str = _option("cross_entropy", "bce: one binary decision per class", *LOSSES)
    label_smoothing: float = _option(0.1, "of the targets")
    drop_path: float = _option(0.1, "stochastic depth of the last block")
    drop: float = _option(0.0, "dropout in front of the head")
    mixup: float = _option(0.8, "alpha of mixup; 0: none")
    cutmix: float = _option(1.0, "alpha of cutmix; 0: none")
    mix_prob: float = _option(1.0, "how often a batch is mixed at all")
    mix_switch: float = _option(0.5, "how often by cutmix, where both are on")
    augment: bool = _option(True, "random crops, flips, colours, erasing; off: images as in evaluation")
    auto_augment: str = _option("rand-m9-mstd0.5-inc1", "timm's name of a policy, such as RandAugment's; none")
    color_jitter: float = _option(0.4, "strength, where auto_augment is none")
    flip: float = _option(0.5, "how often an image is mirrored")
    crop_scale: float = _option(0.08, "smallest share of the image's area that a random crop takes")
    erasing: float = _option(0.25, "how often a rectangle is erased (random pixels)")
    repeats: int = _option(1, "times that an image is drawn in a row, each augmented anew (repeated augmentation)")
    shuffle: bool = _option(True, "a new order every epoch")
    crop_ratio: float = _option(0.875, "side of the centre crop over the resized image's, in evaluation")
    distillation: str = _option("none", "from a teacher: its probabilities or its decisions", "none", "soft", "hard")
    distillation_alpha: float = _option(0.5, "weight of the teacher's part of the loss")
    distillation_tau: float = _option(3.0, "temperature of soft distillation")

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float | int | tuple):
                most = 2**31 - 1 if f.type is int else 1e30
                numbers = value if isinstance(value, tuple) else (value,)
                self._check(f.name, all(abs(number) <= most for number in numbers), f"a number up to {most:g}")
        for name in ("epochs", "batch_size", "accumulate", "repeats"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "layer_decay", "eps", "distillation_tau"):
            self._check(name, getattr(self, name) > 0, "more than 0")
        for name in (
            "lr_batch",
            "weight_decay",
            "warmup_epochs",
            "warmup_lr",
            "min_lr",
            "clip_grad",
            "mixup",
            "cutmix",
            "color_jitter",
        ):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        for name in ("ema", "label_smoothing", "drop_path", "drop", "momentum"):
            self._check(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        for name in ("mix_prob", "mix_switch", "flip", "erasing", "distillation_alpha"):
            self._check(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        for name in ("crop_scale", "crop_ratio"):
            self._check(name, 0 < getattr(self, name) <= 1, "above 0 and at most 1")
        check_crop_ratio(self.crop_ratio)
        self._check("warmup_epochs", self.warmup_epochs <= self.epochs, f"at most epochs, {self.epochs}")
        self._check("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers from 0 to 1")
        for f in fields(self):
            if choices := f.metadata["choices"]:
                self._check(f.name, getattr(self, f.name) in choices, f"one of {', '.join(choices)}")

    def _check(self, name: str, fine: bool, expected: str) -> None:
        if not fine:
            raise ValueError(f"{name} must be {expected}, got {shown(getattr(self, name))}")

    @property
    def scaled_lr(self) -> float:
        """The highest learning rate at this batch size."""
        return self.lr * self.batch_size / self.lr_batch if self.lr_batch else self.lr


# Where the paper's Table 9 is silent, the authors' code decides. Their code takes the batch as 8 processes of 256, and
# float16; the paper has repeated augmentation for CrossViT-18 alone, which `recipe` sees to.
PAPER: dict[str, Any] = dict(lr=0.004, lr_batch=4096)
PRESETS: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    "code": dict(
        batch_size=2048, lr=5e-4, lr_batch=512, warmup_epochs=5.0, repeats=3, precision="float16", schedule_unit="epoch"
    ),
    # The paper says 30 epochs; the rest is DeiT's, whose model stays in eval mode: no drop path.
    "finetune_384": dict(
        epochs=30,
        batch_size=512,
        lr=5e-6,
        lr_batch=512,
        min_lr=5e-6,
        warmup_epochs=5.0,
        weight_decay=1e-8,
        drop_path=0.0,
        repeats=3,
        crop_ratio=1.0,
    ),
    "transfer": dict(
        epochs=1000,
        batch_size=768,
        optimizer="sgd",
        lr=0.01,
        lr_batch=768,
        weight_decay=1e-4,
        warmup_epochs=5.0,
        erasing=0.0,
        drop_path=0.0,
    ),
    # Not published: for some thousand images and a small model, on one machine.
    "small": dict(
        epochs=100,
        batch_size=128,
        lr=1e-3,
        lr_batch=128,
        warmup_epochs=5.0,
        min_lr=1e-5,
        mixup=0.0,
        cutmix=0.0,
        auto_augment="none",
        crop_scale=0.5,
        erasing=0.0,
    ),
}


def recipe(preset: str, model: str = "", **changes: Any) -> Recipe:
    """A preset's recipe for the model of that name, with settings changed by keyword.

    A changed `lr` is meant for the batch size at hand, whatever the preset's was for, unless `lr_batch` is given too.
    Raises ValueError for an unknown preset or a setting out of range, TypeError for an unknown setting.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    settings = dict(PRESETS[preset])
    if preset == "paper" and "_18_" in model:
        settings["repeats"] = 3
    if "lr" in changes:
        settings["lr_batch"] = 0
    if "epochs" in changes and "warmup_epochs" not in changes:  # a short trial of a long recipe
        whole = Recipe(**settings)
        share = changes["epochs"] / whole.epochs if changes["epochs"] < whole.epochs else 1.0
        settings["warmup_epochs"] = whole.warmup_epochs * max(0.0, share)
    return Recipe(**(settings | changes))


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """One option per setting of `Recipe`, absent unless given, and --preset."""
    parser.add_argument(
        "--preset",
        default="paper",
        choices=PRESETS,
        help="what the options below are by default: the paper's Table 9; the authors' code, where it differs; the "
        "paper's fine-tuning at 384 pixels and its transfer to other data; or, unpublished, for some thousand images",
    )
    group = parser.add_argument_group("recipe (defaults are the preset's; here: the paper's)")
    paper = recipe("paper")
    for f in fields(Recipe):
        name, value = "--" + f.name.replace("_", "-"), getattr(paper, f.name)
        options: dict[str, Any] = dict(default=None, help=f"{f.metadata['help']} ({_shown(value)})")
        if f.type is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, **options)
        elif isinstance(f.default, tuple):
            group.add_argument(name, nargs=len(f.default), type=float, metavar="X", **options)
        elif f.metadata["choices"]:
            group.add_argument(name, choices=f.metadata["choices"], **options)
        else:
            group.add_argument(name, type=f.type, metavar=METAVARS[f.type], **options)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else f"{value}"


def recipe_from(options: argparse.Namespace) -> Recipe:
    """The recipe that the parsed options of `add_recipe_arguments` and `options.model` ask for. Raises as `recipe`."""
    given = {f.name: getattr(options, f.name) for f in fields(Recipe) if getattr(options, f.name) is not None}
    if "betas" in given:
        given["betas"] = tuple(given["betas"])
    return recipe(options.preset, options.model, **given)
