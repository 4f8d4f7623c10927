"""Everything that a run is at a step, as a checkpoint, and back."""

import random
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
import torch
from timm.utils import ModelEmaV3

from ..classifier import Classifier
from ..datasets import Images
from ..notes import notes
from .distributed import Processes, load_optimizer, load_whole, whole
from .recipes import Recipe


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
    """The parts of a run that change. `model` is the bare one, without DDP around it."""

    model: Classifier
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    recipe: Recipe
    training: Images
    place: Processes
    position: Position = field(default_factory=Position)

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
        }

    def restore(self, content: dict[str, Any]) -> list[str]:
        """Becomes what `capture` returned; returns what is not as it was then, in sentences.

        Raises ValueError for the checkpoint of another model or optimizer, or one within an epoch of other images.
        """
        if content["classes"] != notes(self.model, self.training.classes)["classes"]:
            raise ValueError("the checkpoint is of other classes than the data's")
        position = Position(**content["position"])
        told = _changes(content["recipe"], asdict(self.recipe))
        before = content["recipe"]["optimizer"]
        if before != self.recipe.optimizer:
            raise ValueError(f"optimizer must stay what it was within a run, {before}, got {self.recipe.optimizer}")
        batch = content["recipe"]["batch_size"]
        if position.step and (content["images"], batch) != (len(self.training), self.recipe.batch_size):
            raise ValueError(
                f"the checkpoint lies within an epoch of {content['images']} images in batches of {batch}; here are "
                f"{len(self.training)} in batches of {self.recipe.batch_size}"
            )
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


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [f"{name} is {now[name]}, was {before[name]}" for name in now if before.get(name, now[name]) != now[name]]


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
