"""Training data: crops of images in batches, and token maps of a whole data set, computed once and cached on disk.

A token cache is a folder with `tokens.npy` (crops · N, L) and `progress.json`, which also describes it; a killed pass
resumes. Its name has the hash of everything that the tokens depend on.
"""

import atexit
import dataclasses
import hashlib
import itertools
import json
import operator
import os
import random
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from weakref import WeakSet

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from varcli.checkpoints.safetensors_io import reason
from varcli.checkpoints.store import tokenizer_sha256
from varcli.config import sequence_length
from varcli.distributed import ProcessGroup, end_with_parent
from varcli.errors import InputError, RunError
from varcli.files import cannot_write, parse_json, write_atomically
from varcli.images.dataset import ImageSet
from varcli.images.decode import UnreadableImage, square_crop
from varcli.models.tokenizer import Tokenizer
from varcli.training.optim import mixed_seed

TOLERATED = 0.01
"""Fraction of the images that may be unreadable."""
VALIDATION_BATCH = 64

_ENDED = ("killed by signal", "exited unexpectedly", "No space left", "unable to open shared memory")
"""Parts of torch's messages where the system ended a worker process, or shared memory is full."""

Draw = tuple[int, int]
"""Index of an item, and the epoch."""


def draws(count: int, batch: int, steps: range, seed: int, group: ProcessGroup | None = None) -> Iterator[list[Draw]]:
    """Yield a rank's items of each step: epoch after epoch, each in its own order."""
    group = group or ProcessGroup()
    share = batch // group.world_size
    epoch, order = -1, torch.empty(0)
    for step in steps:
        chosen = []
        for position in range(step * batch, (step + 1) * batch):
            if position // count != epoch:
                epoch = position // count
                generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
                order = torch.randperm(count, generator=generator)
            chosen.append((int(order[position % count]), epoch))
        yield chosen[group.rank * share : (group.rank + 1) * share]


Unread = tuple[str, str]
"""Name of an image that cannot be read, and the reason."""


class Unreadable:
    """Collects the names of unreadable images, and raises if there are too many."""

    def __init__(self, total: int, warn: Callable[[str], None]) -> None:
        self.total = total
        self.warn = warn
        self.reasons: dict[str, str] = {}

    def add(self, found: Iterable[Unread]) -> None:
        """Note unreadable images, each named once with the reason.

        Raises:
            InputError: more than one in a hundred images of the set is unreadable.
        """
        for name, why in found:
            if name not in self.reasons:
                self.reasons[name] = why
                self.warn(f"skipped, unreadable: {name} ({why}), {len(self.reasons)} so far")
        if len(self.reasons) > TOLERATED * self.total:
            name, why = min(self.reasons.items())
            raise InputError(
                f"{len(self.reasons)} of {self.total} images are unreadable, {name} ({why}) among them: "
                f"fix or remove them, as at most {TOLERATED:.0%} are skipped"
            )


class Crops(Dataset[tuple[Tensor, list[Unread]]]):
    """Images as square uint8 tensors (3, P, P), cropped at random, or at the centre where there is no seed.

    With `flip` an image is mirrored in every other epoch, half of the images in each.
    """

    def __init__(self, images: ImageSet, pixels: int, enlarge: float, seed: int | None, *, flip: bool = False) -> None:
        self.images = images
        self.pixels = pixels
        self.enlarge = enlarge
        self.seed = seed
        self.flip = flip

    def __getitem__(self, draw: Draw) -> tuple[Tensor, list[Unread]]:
        """Return an image's crop, or the next readable one, with the names of the unreadable ones it replaces."""
        index, epoch = draw
        unreadable: list[Unread] = []
        count = len(self.images)
        for number in (*range(index, count), *range(index)):
            try:
                return self.crop(number, epoch), unreadable
            except UnreadableImage as error:
                unreadable.append((error.name, error.reason))
        name, why = unreadable[0]
        raise InputError(f"none of the {count} images of the data can be read; the first is {name} ({why})")

    def crop(self, index: int, epoch: int) -> Tensor:
        """Return one image's crop, its corner drawn from the seed, the image and the epoch."""
        corner = None
        if self.seed is not None:
            generator = random.Random(f"{self.seed} {epoch} {index}")
            corner = (generator.random(), generator.random())
        array = square_crop(self.images.read(index), self.pixels, self.enlarge, corner)
        if self.flip and (index + epoch) % 2:
            array = array[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


Batch = tuple[Tensor, list[list[Unread]]]
"""Images as (B, 3, P, P) uint8, and for each the unreadable ones it replaces."""


def collate(items: list[tuple[Tensor, list[Unread]]]) -> Batch:
    """Return items as one batch."""
    return torch.stack([pixels for pixels, _ in items]), [names for _, names in items]


def loader(crops: Crops, batches: Iterable[list[Draw]], workers: int) -> Generator[Batch, None, None]:
    """Yield given batches in order, read ahead by `workers` processes.

    Raises:
        InputError: no image can be read.
        RunError: one of the processes was killed, or cannot pass on its images.
    """
    reading = DataLoader(
        crops,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_follow_parent,
    )
    started = None
    try:
        before = set(active_children())
        with _signals_held_back():
            started = iter(reading)
        _readers.update(set(active_children()) - before)
        yield from started
    except (InputError, RuntimeError, OSError) as error:
        if workers:
            error.__traceback__ = None  # of torch's loader, not of the process: that one is in the message
        line = _last_line(error)
        if isinstance(error, InputError):  # with the traceback of the process before its message
            raise InputError(line.removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")) from error
        if any(words in line for words in _ENDED):
            raise _reader_failed(line) from error
        raise
    finally:
        del started  # ends the processes at once; where a traceback keeps it they take ten seconds


@contextmanager
def reader_failures() -> Iterator[None]:
    """Turn the end of a process that reads ahead into one line: torch raises it in whatever is being computed.

    Raises:
        RunError: one was ended.
    """
    try:
        yield
    except RuntimeError as error:
        line = _last_line(error)
        if not line.startswith("DataLoader worker"):
            raise
        raise _reader_failed(line) from error


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _reader_failed(reason: str) -> RunError:
    return RunError(f"a data-loading worker failed: {reason}; try --workers 0")


_readers: WeakSet[BaseProcess] = WeakSet()
"""The worker processes."""


@atexit.register
def _end_readers() -> None:
    """Kill the worker processes that still run when this one ends, as after an error whose traceback keeps the loader.

    multiprocessing would send SIGTERM, which they ignore, and then wait for them forever.
    """
    if left := [reader for reader in _readers if reader.is_alive()]:
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report their end as a failure
        for reader in left:
            reader.kill()


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Block Ctrl-C and SIGTERM, also in processes started meanwhile, until these ignore them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow_parent(worker: int) -> None:
    """Let Ctrl-C and SIGTERM stop the main process alone, which ends its workers itself when it has saved.

    Terminals send the first to all processes of a command, schedulers the second. If the main process is killed, end.
    """
    end_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def to_unit(pixels_u8: Tensor, device: torch.device) -> Tensor:
    """Return uint8 pixels as float32 in [-1, 1] on the device, channels last."""
    pixels = pixels_u8.to(device).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


ENCODE_BATCH = 64
"""Images encoded together; fixed, so that a resumed pass computes the same tokens."""
FLUSH_EVERY = 32
"""Batches between two writes of the progress."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSettings:
    """What the tokens of a data set depend on, besides images and tokenizer."""

    enlarge: float
    crops: int
    seed: int
    flip: bool = False


class TokenCache:
    """Token maps and labels of all readable images, `crops` of each."""

    def __init__(
        self, tokens: NDArray[np.unsignedinteger], unreadable: set[int], labels: list[int], crops: int
    ) -> None:
        self.tokens = tokens
        self.crops = crops
        self.labels = torch.tensor(labels)
        self.numbers = torch.tensor([i for i in range(len(labels)) if i not in unreadable], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    def batch(self, draws: list[Draw]) -> tuple[Tensor, Tensor]:
        """Return tokens (B, L) and labels (B) of readable images, another crop every epoch."""
        image = self.numbers[[index for index, _ in draws]]
        crop = torch.tensor([epoch % self.crops for _, epoch in draws])
        taken = np.asarray(self.tokens[(crop * len(self.labels) + image).numpy()], dtype=np.int64)
        return torch.from_numpy(taken), self.labels[image]


def open_cache(
    folder: Path,
    tokenizer: Tokenizer,
    images: ImageSet,
    settings: CacheSettings,
    device: torch.device,
    *,
    workers: int = 0,
    warn: Callable[[str], None] = lambda text: None,
    progress: Callable[[int], None] = lambda count: None,
) -> TokenCache:
    """Return the tokens of all images, computing what the cache under `folder` lacks.

    Raises:
        InputError: too many images are unreadable, or an existing cache cannot be read.
        RunError: the cache cannot be written.
    """
    total = settings.crops * len(images)
    path = cache_path(folder, tokenizer, images, settings, device)
    facts = cache_facts(tokenizer, images, settings, device)
    done, unreadable = _begin_cache(path, tokenizer, total, facts)
    try:
        # A whole cache may be another user's, or on a read-only file system.
        tokens = open_memmap(path / "tokens.npy", mode="r+" if done < total else "r")
    except OSError as error:
        raise cannot_write(path, error) from error
    skipped = Unreadable(len(images), warn)
    skipped.add((images.name(i), "as an earlier call found") for i in sorted(unreadable))
    progress(done)
    chunks = _chunks(range(done, total), len(images))
    seed = settings.seed if settings.crops > 1 else None
    crops = Crops(images, tokenizer.config.pixels, settings.enlarge, seed, flip=settings.flip)
    with reader_failures(), closing(loader(crops, chunks, workers)) as batches:
        for chunk, (pixels, stands_in_for) in zip(chunks, batches, strict=True):
            skipped.add(itertools.chain(*stands_in_for))
            unreadable |= {index for (index, _), names in zip(chunk, stands_in_for, strict=True) if names}
            tokens[done : done + len(chunk)] = _encode(tokenizer, pixels, device)
            done += len(chunk)
            progress(len(chunk))
            if done == total or done // ENCODE_BATCH % FLUSH_EVERY == 0:
                tokens.flush()
                _write_description(path, done, unreadable, facts)
    return TokenCache(tokens, unreadable, images.labels, settings.crops)


def cache_path(
    folder: Path, tokenizer: Tokenizer, images: ImageSet, settings: CacheSettings, device: torch.device
) -> Path:
    """Return the path of a cache under `folder`, which may not exist."""
    given = {name: value for name, value in dataclasses.asdict(settings).items() if name != "flip" or value}
    shaping = [tokenizer_sha256(tokenizer), images.fingerprint(), given, device.type]
    key = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"tokens-{key}"


def cache_facts(tokenizer: Tokenizer, images: ImageSet, settings: CacheSettings, device: torch.device) -> str:
    """Describe a cache: number of images, options, tokenizer and kind of device."""
    flip = ", --flip" if settings.flip else ""
    return (
        f"{len(images)} images, --crops {settings.crops}{flip}, --resize-ratio {settings.enlarge:g}, "
        f"--seed {settings.seed}, tokenizer {tokenizer_sha256(tokenizer)[:8]}, {device.type}"
    )


def list_caches(folder: Path) -> list[str]:
    """Return the `cache_facts` of each cache under a folder."""
    found = []
    for progress in sorted(folder.glob("tokens-*/progress.json")):
        with suppress(OSError, ValueError, AttributeError):  # a damaged one
            found.append(str(parse_json(progress.read_bytes()).get("facts", "tokens of an earlier version")))
    return found


def _begin_cache(cache: Path, tokenizer: Tokenizer, total: int, facts: str) -> tuple[int, set[int]]:
    """Return how many crops are done and which images are unreadable; create the files of a new cache."""
    progress, shape = cache / "progress.json", (total, sequence_length(tokenizer.config.sides))
    try:
        with suppress(FileNotFoundError, ValueError, LookupError, TypeError):  # none yet, or a damaged one
            note = parse_json(progress.read_bytes())
            done, unreadable = operator.index(note["done"]), {operator.index(i) for i in note["unreadable"]}
            if 0 <= done <= total and open_memmap(cache / "tokens.npy", mode="r").shape == shape:
                return done, unreadable
    except OSError as error:
        raise InputError(f"the cache of token maps {cache} cannot be read: {reason(error)}") from error
    try:
        cache.mkdir(parents=True, exist_ok=True)
        progress.unlink(missing_ok=True)
        open_memmap(cache / "tokens.npy", mode="w+", dtype=_number_kind(tokenizer), shape=shape)
        _reserve(cache / "tokens.npy")
    except OSError as error:
        raise cannot_write(cache, error) from error
    _write_description(cache, 0, set(), facts)
    return 0, set()


def _number_kind(tokenizer: Tokenizer) -> np.dtype[np.unsignedinteger]:
    """Return the smallest type that holds every token."""
    return np.min_scalar_type(tokenizer.config.codebook_size - 1)


def _reserve(path: Path) -> None:
    """Allocate a file's whole space now: a full disk would kill a process that writes to a mapped file."""
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _write_description(cache: Path, done: int, unreadable: set[int], facts: str) -> None:
    note = json.dumps({"done": done, "unreadable": sorted(unreadable), "facts": facts})
    write_atomically(cache / "progress.json", note.encode())


def _chunks(numbers: range, images: int) -> list[list[Draw]]:
    """What to encode in batches; crop c of image i is number c · N + i."""
    draws = [(number % images, number // images) for number in numbers]
    return [draws[i : i + ENCODE_BATCH] for i in range(0, len(draws), ENCODE_BATCH)]


@torch.no_grad()
def _encode(tokenizer: Tokenizer, pixels: Tensor, device: torch.device) -> NDArray[np.int64]:
    """Return token maps side by side, (B, L)."""
    tokens: NDArray[np.int64] = torch.cat(tokenizer.encode(to_unit(pixels, device)), dim=1).cpu().numpy()
    return tokens
