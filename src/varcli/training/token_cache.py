"""Token maps of a whole data set, computed once and kept on disk for the transformer's training.

A cache is a folder of `tokens.npy` (crops · N, L) and `progress.json`; a killed pass goes on where it
stopped. Its name holds the hash of everything that shapes the tokens.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from varcli.checkpoints.store import tokenizer_sha256
from varcli.data.datasets import PictureSet
from varcli.data.images import cannot_write, write_atomically
from varcli.models.tokenizer import Tokenizer
from varcli.scales import sequence_length
from varcli.training.batches import Crops, Draw, Unreadable, loader, to_unit

ENCODE_BATCH = 64
"""Pictures encoded together; fixed, so that a resumed pass computes the same tokens."""
FLUSH_EVERY = 32
"""Batches between two notes of how far the pass is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSettings:
    """What shapes the tokens of a data set, besides pictures and tokenizer."""

    enlarge: float
    crops: int
    seed: int


class TokenCache:
    """Token maps and class rows of all readable pictures, `crops` of each."""

    def __init__(self, tokens: NDArray[np.unsignedinteger], unreadable: set[int], rows: list[int], crops: int) -> None:
        self.tokens = tokens
        self.crops = crops
        self.rows = torch.tensor(rows)
        self.numbers = torch.tensor([i for i in range(len(rows)) if i not in unreadable], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    def batch(self, draws: list[Draw]) -> tuple[Tensor, Tensor]:
        """Return tokens (B, L) and class rows (B) of readable pictures, another crop every epoch."""
        picture = self.numbers[[index for index, _ in draws]]
        crop = torch.tensor([epoch % self.crops for _, epoch in draws])
        taken = np.asarray(self.tokens[(crop * len(self.rows) + picture).numpy()], dtype=np.int64)
        return torch.from_numpy(taken), self.rows[picture]


def open_cache(
    folder: Path,
    tokenizer: Tokenizer,
    pictures: PictureSet,
    settings: CacheSettings,
    device: torch.device,
    *,
    workers: int = 0,
    warn: Callable[[str], None] = lambda text: None,
    progress: Callable[[int], None] = lambda count: None,
) -> TokenCache:
    """Return the tokens of all pictures, computing what the cache under `folder` lacks.

    Raises:
        InputError: too many pictures are unreadable.
        RunError: the cache cannot be written.
    """
    total = settings.crops * len(pictures)
    place = folder / f"tokens-{_key(tokenizer, pictures, settings, device)}"
    done, unreadable = _begin(place, tokenizer, total)
    tokens = open_memmap(place / "tokens.npy", mode="r+")
    skipped = Unreadable(len(pictures), warn)
    skipped.add(pictures.name(i) for i in sorted(unreadable))
    progress(done)
    chunks = _chunks(range(done, total), len(pictures))
    crops = Crops(pictures, tokenizer.config.pixels, settings.enlarge, settings.seed if settings.crops > 1 else None)
    for chunk, (pixels, stands_in_for) in zip(chunks, loader(crops, chunks, workers), strict=True):
        skipped.add(itertools.chain(*stands_in_for))
        unreadable |= {index for (index, _), names in zip(chunk, stands_in_for, strict=True) if names}
        tokens[done : done + len(chunk)] = _encode(tokenizer, pixels, device)
        done += len(chunk)
        progress(len(chunk))
        if done == total or done // ENCODE_BATCH % FLUSH_EVERY == 0:
            tokens.flush()
            _note(place, done, unreadable)
    return TokenCache(tokens, unreadable, pictures.rows, settings.crops)


def _key(tokenizer: Tokenizer, pictures: PictureSet, settings: CacheSettings, device: torch.device) -> str:
    """Return what tells this cache from others."""
    shaping = [tokenizer_sha256(tokenizer), pictures.fingerprint(), dataclasses.asdict(settings), device.type]
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:16]


def _begin(place: Path, tokenizer: Tokenizer, total: int) -> tuple[int, set[int]]:
    """Return how many crops are done and which pictures cannot be read; make the files of a new cache."""
    progress, shape = place / "progress.json", (total, sequence_length(tokenizer.config.sides))
    if progress.exists() and _holds(place / "tokens.npy", shape):
        note = json.loads(progress.read_text())
        return int(note["done"]), set(note["unreadable"])
    try:
        place.mkdir(parents=True, exist_ok=True)
        progress.unlink(missing_ok=True)
        open_memmap(place / "tokens.npy", mode="w+", dtype=_number_kind(tokenizer), shape=shape)
        _reserve(place / "tokens.npy")
    except OSError as error:
        raise cannot_write(place, error) from error
    _note(place, 0, set())
    return 0, set()


def _holds(path: Path, shape: tuple[int, int]) -> bool:
    """Return whether a whole array of this shape is there."""
    try:
        return open_memmap(path, mode="r").shape == shape
    except (OSError, ValueError):
        return False


def _number_kind(tokenizer: Tokenizer) -> np.dtype[np.unsignedinteger]:
    """Return the smallest type that holds every token."""
    return np.min_scalar_type(tokenizer.config.codebook_size - 1)


def _reserve(path: Path) -> None:
    """Take a file's whole space now: a mapped file that meets a full disk later would kill the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _note(place: Path, done: int, unreadable: set[int]) -> None:
    note = json.dumps({"done": done, "unreadable": sorted(unreadable)})
    write_atomically(place / "progress.json", note.encode())


def _chunks(numbers: range, pictures: int) -> list[list[Draw]]:
    """Return what to encode in batches; crop c of picture i is number c · N + i."""
    draws = [(number % pictures, number // pictures) for number in numbers]
    return [draws[i : i + ENCODE_BATCH] for i in range(0, len(draws), ENCODE_BATCH)]


@torch.no_grad()
def _encode(tokenizer: Tokenizer, pixels: Tensor, device: torch.device) -> NDArray[np.int64]:
    """Return token maps side by side, (B, L)."""
    tokens: NDArray[np.int64] = torch.cat(tokenizer.encode(to_unit(pixels, device)), dim=1).cpu().numpy()
    return tokens
