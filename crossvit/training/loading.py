"""Batches in an order, and with an augmentation, that depend on nothing but the seed: not on the number of processes or
workers, nor on whether the run was interrupted.
"""

import logging
import random
import signal
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from ..data.datasets import Images
from ..data.images import ImageError

_log = logging.getLogger(__name__)

Key = tuple[int, int, int]  # epoch, position in it, index of the image


class EpochSampler(Sampler[list[Key]]):
    """The batches of one process, epoch by epoch, from any step on.

    Each epoch is a permutation of `length` images by (seed, epoch), every image `repeats` times in a row and cut to
    `length` again. Step s takes the next `batch_size` of them; they are dealt out to `pieces` and, within a piece, to
    the `world` processes in turn, so that the images of a step do not depend on `world`. What is left over at the end
    is left out. Raises ValueError where no step remains, or the batch does not divide.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        pieces: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        repeats: int = 1,
    ) -> None:
        if batch_size % (pieces * world):
            raise ValueError(
                f"batch_size must be a multiple of processes × accumulate, {world} × {pieces}, got {batch_size}"
            )
        if batch_size > length:
            raise ValueError(f"batch_size must be at most the number of training images, {length}, got {batch_size}")
        self.length, self.batch_size, self.pieces = length, batch_size, pieces
        self.rank, self.world, self.seed, self.shuffle, self.repeats = rank, world, seed, shuffle, repeats
        self.steps = length // batch_size
        self.epoch = self.first_step = 0

    def start(self, epoch: int, step: int = 0) -> None:
        """Makes the next iteration that of `epoch` from `step` on."""
        self.epoch, self.first_step = epoch, step

    def order(self, epoch: int) -> np.ndarray:
        """The indices of an epoch, in the order in which they are drawn."""
        if not self.shuffle:
            return np.arange(self.length) // self.repeats
        permutation = np.random.default_rng([self.seed, epoch, 0]).permutation(self.length)
        drawn = permutation[: -(-self.length // self.repeats)]  # the others are not reached
        return np.repeat(drawn, min(self.repeats, self.length))[: self.length]

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.pieces

    def __iter__(self) -> Iterator[list[Key]]:
        order, each = self.order(self.epoch), self.batch_size // (self.pieces * self.world)
        # An image's repetitions do not lie side by side: mixing takes neighbours.
        within = np.concatenate([np.arange(k, each, self.repeats) for k in range(min(self.repeats, each))])
        for step in range(self.first_step, self.steps):
            for piece in range(self.pieces):
                first = step * self.batch_size + piece * each * self.world + self.rank
                positions = (first + within * self.world).tolist()
                yield [(self.epoch, position, int(order[position])) for position in positions]


class Seeded(Dataset):
    """Images by the sampler's keys, each transformed with generators seeded by (seed, epoch, position).

    on_broken: "stop" raises the ImageError of a file that is broken or not there, "skip" says it and takes the next
    image instead.
    """

    def __init__(self, images: Images, seed: int, on_broken: str = "stop") -> None:
        if on_broken not in ("stop", "skip"):
            raise ValueError(f"on_broken must be 'stop' or 'skip', got {on_broken!r}")
        self.images, self.seed, self.on_broken = images, seed, on_broken

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> tuple[Tensor, int | Tensor]:
        epoch, position, index = key
        before = None if get_worker_info() else _states()  # a worker draws nothing else
        words = np.random.SeedSequence([self.seed, epoch, 1, position]).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(int(words[1]))  # noqa: NPY002  timm's augmentation draws from it
        torch.default_generator.manual_seed(int(words[2]))
        try:
            return self._read(index)
        finally:
            if before is not None:
                _restore(before)

    def _read(self, index: int) -> tuple[Tensor, int | Tensor]:
        for k in range(len(self.images)):
            try:
                return self.images[(index + k) % len(self.images)]
            except ImageError as error:
                if self.on_broken == "stop":
                    raise
                _log.warning("skipped %s", error)
        raise ImageError("none of the training images can be read")


class Shard(Dataset):
    """Every `world`-th image from `rank` on, as (image, target, counts). All processes have equally many, since sharded
    models compute together: what fills up does not count, nor with on_broken="skip" what cannot be read, which is said.
    """

    def __init__(self, images: Images, rank: int = 0, world: int = 1, on_broken: str = "stop") -> None:
        self.images, self.rank, self.world, self.on_broken = images, rank, world, on_broken

    def __len__(self) -> int:
        return -(-len(self.images) // self.world)

    def __getitem__(self, item: int) -> tuple[Tensor, int | Tensor, bool]:
        index = item * self.world + self.rank
        if index >= len(self.images):
            return self._blank(), self.images.targets[0], False
        try:
            return *self.images[index], True
        except ImageError as error:
            if self.on_broken == "stop":
                raise
            _log.warning("skipped %s", error)
            return self._blank(), self.images.targets[index], False

    def _blank(self) -> Any:
        blank = Image.new("RGB", (16, 16))
        return blank if self.images.transform is None else self.images.transform(blank)


def training_loader(dataset: Seeded, sampler: EpochSampler, workers: int, pin: bool) -> DataLoader:
    """Batches of (images, targets) of the sampler's epoch; workers stay for the next one."""
    return DataLoader(dataset, batch_sampler=sampler, **_options(workers, pin))


def evaluation_loader(shard: Shard, batch_size: int, workers: int, pin: bool) -> DataLoader:
    """Batches of (images, targets, counts)."""
    return DataLoader(shard, batch_size, **_options(workers, pin))


def _options(workers: int, pin: bool) -> dict:
    return dict(
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=workers > 0,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # its own: an iterator draws from it, which must not move the run's
    )


def start_worker(worker: int) -> None:
    """A worker leaves signals to its parent, whose group they are often sent to: a worker that ends at once would end
    the parent within its step. It has a minute to save.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # Windows sends no signals to a group
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(60))
    sys.excepthook = _print_unless_the_parent_left


def _print_unless_the_parent_left(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """The thread that hands a batch over says so when its parent is interrupted; nobody needs to read that."""
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)


def _states() -> tuple:
    return random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002


def _restore(states: tuple) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.default_generator.set_state(states[2])
