"""Which pictures an update sees, as a function of the seed and the update's number alone."""

import random
import signal
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from varcli.data.datasets import PictureSet, UnreadablePicture, square_crop
from varcli.errors import InputError
from varcli.training.state import mixed_seed

TOLERATED = 0.01
"""Part of the pictures that may be unreadable."""

Draw = tuple[int, int]
"""An item's number and the epoch it is drawn in."""


def draws(count: int, batch: int, steps: range, seed: int) -> Iterator[list[Draw]]:
    """Yield for each update its items: epoch after epoch, each in an order of its own."""
    epoch, order = -1, torch.empty(0)
    for step in steps:
        chosen = []
        for position in range(step * batch, (step + 1) * batch):
            if position // count != epoch:
                epoch = position // count
                generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
                order = torch.randperm(count, generator=generator)
            chosen.append((int(order[position % count]), epoch))
        yield chosen


class Unreadable:
    """The names of pictures that could not be read, and when they are too many."""

    def __init__(self, total: int, warn: Callable[[str], None]) -> None:
        self.total = total
        self.warn = warn
        self.names: set[str] = set()

    def add(self, names: Iterable[str]) -> None:
        """Note unreadable pictures, each named once.

        Raises:
            InputError: more than one in a hundred pictures of the set is unreadable.
        """
        for name in names:
            if name not in self.names:
                self.names.add(name)
                self.warn(f"skipped, unreadable: {name} ({len(self.names)} so far)")
        if len(self.names) > TOLERATED * self.total:
            raise InputError(
                f"unreadable pictures: {len(self.names)} of {self.total}, {sorted(self.names)[0]} among them; "
                f"mend or remove them, at most {TOLERATED:.0%} are skipped"
            )


class Crops(Dataset[tuple[Tensor, list[str]]]):
    """Pictures as square uint8 tensors (3, P, P), cropped at random, or at the centre where there is no seed."""

    def __init__(self, pictures: PictureSet, pixels: int, enlarge: float, seed: int | None) -> None:
        self.pictures = pictures
        self.pixels = pixels
        self.enlarge = enlarge
        self.seed = seed

    def __getitem__(self, draw: Draw) -> tuple[Tensor, list[str]]:
        """Return a picture's crop; the next readable one stands in for those whose names come along."""
        index, epoch = draw
        unreadable: list[str] = []
        count = len(self.pictures)
        for number in (*range(index, count), *range(index)):
            try:
                return self.crop(number, epoch), unreadable
            except UnreadablePicture as error:
                unreadable.append(error.name)
        raise InputError(f"data: none of its {count} pictures can be read; {unreadable[0]} is the first")

    def crop(self, index: int, epoch: int) -> Tensor:
        """Return one picture's crop, its corner drawn from the seed, the picture and the epoch."""
        corner = None
        if self.seed is not None:
            generator = random.Random(f"{self.seed} {epoch} {index}")
            corner = (generator.random(), generator.random())
        array = square_crop(self.pictures.read(index), self.pixels, self.enlarge, corner)
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


Batch = tuple[Tensor, list[list[str]]]
"""Pictures as (B, 3, P, P) uint8, and for each the names of unreadable ones it stands in for."""


def collate(items: list[tuple[Tensor, list[str]]]) -> Batch:
    """Return items as one batch."""
    return torch.stack([pixels for pixels, _ in items]), [names for _, names in items]


def loader(crops: Crops, batches: Iterable[list[Draw]], workers: int) -> Iterator[Batch]:
    """Yield given batches in order, read ahead by `workers` processes."""
    yield from DataLoader(
        crops,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_leave_signals_to_parent,
    )


def _leave_signals_to_parent(worker: int) -> None:
    """Let Ctrl-C reach the main process alone, which ends its workers itself when it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def to_unit(pixels_u8: Tensor, device: torch.device) -> Tensor:
    """Return uint8 pixels as float32 in [-1, 1] on the device, channels last."""
    pixels = pixels_u8.to(device).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)
