"""The loop: steps, epochs, evaluation, checkpoints, and a stop that loses nothing."""

import logging
import math
import signal
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .curves import draw_curves
from .distributed import local_gradients
from .evaluation import evaluate
from .files import Log, save
from .loading import EpochSampler
from .objective import Objective
from .optimizer import Schedule
from .state import Run

_log = logging.getLogger(__name__)

SLOW, SECONDS = 0.2, 2.0  # share of an epoch spent waiting for images, and how long, that are worth a word
DRAW_EVERY = 30.0  # seconds between two pictures of the curves, each of which takes a third of one
ASK_EVERY = {"cpu": 1, "cuda": 16}  # steps between asking all processes whether to stop; on a GPU it waits for the GPU


class DivergedError(RuntimeError):
    """The loss is not a number any more."""


class Stop:
    """Set by SIGINT (Ctrl-C) or SIGTERM; a second SIGINT interrupts at once. `code`: the exit status that says so."""

    def __init__(self) -> None:
        self.code = 0

    def __enter__(self) -> "Stop":
        self.before = {number: signal.signal(number, self._set) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _set(self, number: int, frame: FrameType | None) -> None:
        if self.code and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.code = 128 + number


@dataclass
class Trainer:
    """A run with its data. `network` is the model as it is called: bare, in DDP, or sharded in place."""

    run: Run
    network: nn.Module
    objective: Objective
    schedule: Schedule
    sampler: EpochSampler
    training: DataLoader
    validation: DataLoader | None
    folder: Path
    log: Log
    log_every: int
    checkpoint_every: int
    stop: Stop
    _said_slow: bool = field(default=False, init=False)
    _drawn: float = field(default=-math.inf, init=False)  # when the curves were

    def train(self) -> int:
        """Runs to the end, or until `stop`: the exit status, 0 or the stop's. Raises DivergedError for a loss that is
        not finite, with the last checkpoint from before it.
        """
        self.network.train()
        self._loss_sum = torch.tensor(self.run.position.loss_sum, dtype=torch.float64, device=self.run.place.device)
        while self.run.position.epoch < self.run.recipe.epochs:
            if not self._epoch():
                self._save()
                self._draw()
                return self.stop.code or 128 + signal.SIGTERM
        self._draw()
        return 0

    def autocast(self) -> AbstractContextManager:
        """The recipe's precision."""
        precision, device = self.run.recipe.precision, self.run.place.device.type
        return nullcontext() if precision == "float32" else torch.autocast(device, getattr(torch, precision))

    def _epoch(self) -> bool:
        """The rest of the epoch, with its evaluation and checkpoint. False: stopped within it."""
        position, place = self.run.position, self.run.place
        self.sampler.start(position.epoch, position.step)
        bar = tqdm(
            total=self.sampler.steps,
            initial=position.step,
            desc=f"epoch {position.epoch + 1}/{self.run.recipe.epochs}",
            unit="step",
            leave=False,
            disable=None if place.first else True,  # None: where the output is no terminal
        )
        started, first, waited, steps = time.perf_counter(), 0.0, 0.0, 0
        batches = iter(self.training)
        with bar:
            while position.step < self.sampler.steps:
                waiting = self._step(batches)
                # The first batch of an epoch is waited for however fast the workers are.
                first, waited, steps = (waiting, 0.0, 1) if not steps else (first, waited + waiting, steps + 1)
                bar.update()
                if position.step < self.sampler.steps:
                    if self._stopping():
                        return False
                    if self.checkpoint_every and position.steps % self.checkpoint_every == 0:
                        self._save()
        seconds = time.perf_counter() - started
        position.epoch, position.step = position.epoch + 1, 0
        slow = waited > SECONDS and waited / (seconds - first) > SLOW
        self._end_of_epoch(steps * self.run.recipe.batch_size / seconds, waited / (seconds - first) if slow else 0.0)
        return not self._stopping() or position.epoch == self.run.recipe.epochs

    def _step(self, batches: Any) -> float:
        """One step of the optimizer; returns the seconds spent waiting for images."""
        run, recipe, place = self.run, self.run.recipe, self.run.place
        self.schedule.set_step(run.position.steps)
        waited = 0.0
        total = torch.zeros((), device=place.device)
        for piece in range(recipe.accumulate):
            before = time.perf_counter()
            images, targets = (x.to(place.device, non_blocking=True) for x in next(batches))
            waited += time.perf_counter() - before
            images, targets = self.objective.mix(images, targets)
            with local_gradients(self.network, piece < recipe.accumulate - 1):
                with self.autocast():
                    loss = self.objective.loss(self.network(images), targets, images) / recipe.accumulate
                run.scaler.scale(loss).backward()
            total += loss.detach()
        if recipe.clip_grad:
            run.scaler.unscale_(run.optimizer)
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), recipe.clip_grad)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
        run.position.step += 1
        run.position.steps += 1
        if run.ema is not None:
            run.ema.update(run.model, run.position.steps)
        self._count(total)
        return waited

    def _count(self, loss: Tensor) -> None:
        """Adds to the mean since the log's last line, and writes one where it is due."""
        position = self.run.position
        self._loss_sum += loss  # stays on the device until it is needed
        position.loss_steps += 1
        if position.steps % self.log_every and position.step < self.sampler.steps:
            return
        mean = self._mean(self._loss_sum) / position.loss_steps
        if not math.isfinite(mean):
            raise DivergedError(
                f"the loss became {mean} within the {position.loss_steps} steps up to step {position.steps}"
            )
        rate = max(group["lr"] for group in self.run.optimizer.param_groups)
        self.log.write("train", position.steps, epoch=position.epoch + 1, loss=mean, lr=rate)
        position.loss_steps = 0
        self._loss_sum.zero_()

    def _mean(self, value: Tensor) -> float:
        """Over all processes."""
        return self.run.place.sum(value.clone()).item() / self.run.place.world

    def _end_of_epoch(self, images_per_second: float, waiting: float) -> None:
        """Evaluates, saves and says how it went; waiting: the share of the time that images were waited for, where it
        is worth a word."""
        run, place = self.run, self.run.place
        position = run.position
        found: dict[str, float] = {}
        best = False
        if self.validation is not None:
            evaluated = run.model if run.ema is None else run.ema.module
            found = evaluate(evaluated, self.validation, place, self.autocast(), self.objective.multi_label)
            score = found.get("top1", found.get("map", float("nan")))
            best = score > position.best
            position.best = max(score, position.best) if not math.isnan(score) else position.best
            self.log.write("eval", position.steps, epoch=position.epoch, **found)
        self._save(found if best or self.validation is None else None)
        if not place.first:
            return
        text = "".join(f"  {name} {value:.4g}" for name, value in found.items())
        _log.info("epoch %d/%d%s  %.4g images/s", position.epoch, run.recipe.epochs, text, images_per_second)
        if waiting and not self._said_slow:
            self._said_slow = True
            _log.warning(
                "reading images does not keep up with the model: %.0f%% of the epoch went by waiting for them; "
                "more --workers (%d now), smaller files or a faster disk would help",
                100 * waiting,
                self.training.num_workers,
            )
        if time.monotonic() - self._drawn > DRAW_EVERY:
            self._draw()

    def _draw(self) -> None:
        if self.run.place.first:
            try:
                draw_curves({"run": self.folder / "metrics.jsonl"}, self.folder / "curves.png")
            except OSError as error:  # the run goes on without a picture
                _log.warning("the curves could not be drawn: %s", error)
            self._drawn = time.monotonic()

    def _save(self, best: dict[str, float] | None = None) -> None:
        """Writes last.pth, and best.pth with the weights that were evaluated."""
        run, place = self.run, self.run.place
        run.position.loss_sum = self._mean(self._loss_sum)
        content = run.capture()
        if place.first:
            if best is not None:
                weights = content["ema"] or content["model"]
                kept = {key: value for key, value in content.items() if isinstance(value, str) or key == "recipe"}
                save({**kept, "model": weights, "metrics": best}, self.folder / "best.pth")
            save(content, self.folder / "last.pth")
        place.wait()

    def _stopping(self) -> bool:
        place, steps = self.run.place, self.run.position.steps
        if place.world > 1 and self.run.position.step and steps % ASK_EVERY[place.device.type]:
            return False
        return place.any(bool(self.stop.code))
