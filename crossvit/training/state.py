"""Everything that a run is at a step, as a checkpoint, and back."""

import random
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
import torch
from timm.utils import ModelEmaV3

from ..data.datasets import Images
from ..models.classifier import Classifier
from ..weights.notes import notes, plain, read_notes, whole_arguments
from .distributed import Processes, load_optimizer, load_whole, whole
from .recipes import Recipe

# What a run's checkpoint has at least, and of which type
PARTS = dict(
    position=dict, recipe=dict, model=dict, optimizer=dict, scaler=dict, generators=list, images=int, classes=str
)
IN_MODEL = ("drop", "drop_path")  # settings of the recipe that are arguments of the model


@dataclass
class Position:
    """Where a run is: `step` steps into `epoch`, `steps` in all; the loss summed since the log's last line; the best
    score so far."""

    epoch: int = 0
    step: int = 0
    steps: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    best: float = float("-inf")


@dataclass
class Run:
    """The parts of a run that change. `model` is the bare one, without DDP around it; `settings` are the options that
    neither the model nor the recipe has, with plain values, by name.
    """

    model: Classifier
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    recipe: Recipe
    training: Images
    place: Processes
    position: Position = field(default_factory=Position)
    settings: dict[str, Any] = field(default_factory=dict)

    def capture(self) -> dict[str, Any]:
        """The checkpoint of now: plain values and whole tensors on the CPU. All processes take part.

        The learning rate's schedule is not in it: it is a function of the step.
        """
        generators = self.place.gather(generator_states(self.place.device))
        return {
            **notes(self.model, self.training.classes, self.recipe.crop_ratio, self.training.multi_label),
            "model": whole(self.model.state_dict()),
            "ema": None if self.ema is None else whole(self.ema.module.state_dict()),
            "optimizer": whole(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "generators": generators,
            "position": asdict(self.position),
            "recipe": asdict(self.recipe),
            "images": len(self.training),
            "settings": dict(self.settings),
        }

    def restore(self, content: dict[str, Any]) -> list[str]:
        """Becomes what `capture` returned; returns what is not as it was then, in sentences.

        Raises ValueError for what is no whole run, and, naming all that differs with both values, for the checkpoint of
        another model (in any of its arguments), seed, optimizer or classes, or one within an epoch of other images.
        """
        if odd := [name for name, kind in PARTS.items() if not isinstance(content.get(name), kind)]:
            raise ValueError(f"the checkpoint is not a whole run of this program's: it lacks {', '.join(odd)}")
        position = Position(**content["position"])
        if refused := self._refused(content, position):
            raise ValueError("; ".join(refused))
        told = _changes(content["recipe"], asdict(self.recipe))
        told += _changes(content.get("settings", {}), self.settings)
        told += _changes({"images": content["images"]}, {"images": len(self.training)})
        load_whole(self.model, content["model"])
        if self.ema is not None:
            load_whole(self.ema.module, content["ema"] or content["model"])
        load_optimizer(self.optimizer, content["optimizer"])
        if content["scaler"]:
            self.scaler.load_state_dict(content["scaler"])
        if len(content["generators"]) == self.place.world:
            set_generator_states(content["generators"][self.place.rank], self.place.device)
        else:
            told.append(f"{self.place.world} processes instead of {len(content['generators'])}: other random numbers")
        self.position = position
        return told

    def _refused(self, content: dict[str, Any], position: Position) -> list[str]:
        """What keeps the run from going on as it was, in sentences."""
        refused = []
        noted, own = read_notes(content), read_notes(notes(self.model, self.training.classes))
        recipe, settings = content["recipe"], content.get("settings", {})
        model = _changes({"model": noted.get("variant")}, {"model": own.get("variant")})
        model += _changes(whole_arguments(noted), whole_arguments(own))
        model += _changes(recipe, {name: getattr(self.recipe, name) for name in IN_MODEL})
        if model:
            refused.append(f"the checkpoint's weights are of another model: {', '.join(model)}")
        if noted.get("classes") != own["classes"]:
            refused.append("the checkpoint is of other classes than the data's")
        if seed := _changes(settings, {"seed": self.settings.get("seed")}):
            refused.append(f"the checkpoint is of another run: {seed[0]}")
        if recipe["optimizer"] != self.recipe.optimizer:
            before, now = recipe["optimizer"], self.recipe.optimizer
            refused.append(f"optimizer must stay what it was within a run, {before}, got {now}")
        images, batch = content["images"], recipe["batch_size"]
        if position.step and (images, batch) != (len(self.training), self.recipe.batch_size):
            refused.append(
                f"the checkpoint lies within an epoch of {images} images in batches of {batch}; here are "
                f"{len(self.training)} in batches of {self.recipe.batch_size}"
            )
        return refused


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What both have, with other values."""
    return [
        f"{name} is {now[name]}, was {before[name]}"
        for name in now
        if name in before and plain(before[name]) != plain(now[name])
    ]


def generator_states(device: torch.device) -> dict[str, Any]:
    """The states of the generators of random, numpy, torch and the device, as plain values and tensors."""
    name, words, place, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state())  # noqa: NPY002
    version, integers, following = random.getstate()
    states: dict[str, Any] = {
        "python": (version, torch.tensor(integers), following),
        "numpy": (name, torch.tensor(words.astype(np.int64)), place, has_gauss, gauss),
        "torch": torch.default_generator.get_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generator_states(states: dict[str, Any], device: torch.device) -> None:
    """Puts back what `generator_states` returned."""
    version, integers, following = states["python"]
    random.setstate((version, tuple(integers.tolist()), following))
    name, words, *rest = states["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.default_generator.set_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def seed_generators(seed: int, rank: int = 0) -> None:
    """Seeds random, numpy and torch on all devices, each process its own way."""
    words: list[int] = np.random.SeedSequence([seed, 2, rank]).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])  # noqa: NPY002
    torch.manual_seed(words[2])
