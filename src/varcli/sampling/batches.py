"""Many pictures: in batches as large as memory and reproducibility allow.

Shapes: B pictures, P pixels a side.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from varcli.config import SampleConfig
from varcli.errors import RunError
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer
from varcli.sampling.devices import block_weight, free_memory, independent, out_of_memory
from varcli.sampling.graphs import Record, Recorded, Runner, cuda_recorder
from varcli.sampling.memory import fitting_batch
from varcli.sampling.sampler import DIRECT, Pixels, decode, decode_on_device, generate


class Request(Protocol):
    """One picture to be made."""

    @property
    def row(self) -> int:
        """Row of the class table."""

    @property
    def seed(self) -> int:
        """With the row and the settings it determines the picture."""


Wanted = TypeVar("Wanted", bound=Request)


@dataclass(frozen=True, slots=True)
class Underway(Generic[Wanted]):
    """Pictures that a GPU is busy with, or has put into the host's memory."""

    group: Sequence[Wanted]
    pixels: Tensor
    """(B, P, P, 3) uint8 in the host's memory, not there before `arrived`."""
    arrived: torch.cuda.Event | None
    """None where nothing is waited for."""

    def pictures(self) -> Iterator[tuple[Wanted, Pixels]]:
        """Yield each request with its picture, having waited for them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        yield from zip(self.group, self.pixels.numpy(), strict=False)  # a padded batch has more pictures


class BatchSampler:
    """Makes pictures with one pair of models and one set of settings."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        transformer: Transformer,
        config: SampleConfig,
        batch_size: int | None = None,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Take models made ready by `devices.place`.

        Args:
            tokenizer: turns tokens into pixels.
            transformer: draws the tokens.
            config: settings of all pictures.
            batch_size: pictures at a time where several are; None means as many as memory seems to hold.
            note: told, in a line, what makes this run slower than it might be.
        """
        self.tokenizer, self.transformer, self.config, self.note = tokenizer, transformer, config, note
        alone, device = independent(transformer), block_weight(transformer).device
        self.batch_size = 1 if alone else batch_size or fitting_batch(tokenizer, transformer, config)
        self.ahead = 1 if device.type == "cuda" else 0
        recordable = device.type == "cuda" and not alone and not config.smooth
        self.recorder: Callable[[], Record] | None = partial(cuda_recorder, device) if recordable else None
        self.record: Record | None = None
        self.runners: dict[int, Recorded] = {}
        self.mark: Callable[[str], None] = lambda phase: None
        """For a stopwatch, as `generate` has it."""

    def pictures(self, requests: Iterable[Wanted]) -> Iterator[tuple[Wanted, Pixels]]:
        """Yield each request with its picture, (P, P, 3) uint8, in order, reading only a batch ahead.

        On a GPU the next batch is begun before the pictures of the last are waited for.

        An error, in the requests too, is raised after the pictures that were begun before it.

        Raises:
            RunError: not even one picture fits into memory.
        """
        waiting, underway, several = iter(requests), deque[Underway[Wanted]](), False
        try:
            while group := list(islice(waiting, self.batch_size)):
                underway.extend(self._begin(group, self._size(len(group), several)))
                several = True
                while len(underway) > self.ahead:
                    yield from underway.popleft().pictures()
        except Exception:
            yield from chain.from_iterable(map(Underway.pictures, underway))
            raise
        yield from chain.from_iterable(map(Underway.pictures, underway))

    def growth(self, request: Request) -> Iterator[Pixels]:
        """Yield one picture (P, P, 3) as it looks after each scale; the last one is the picture itself."""
        for result in generate(self.tokenizer, self.transformer, [request.row], [request.seed], self.config):
            yield decode(self.tokenizer, result.f_hat)[0]

    def _size(self, count: int, several: bool) -> int:
        """Return how many are computed for so many pictures.

        In 16 bits that shows in the pictures, so that the last batch of several is as large as those before it.
        """
        if several:
            return max(count, self.batch_size)
        return count if self.recorder is None else padded_size(count, self.batch_size)

    def _begin(self, group: Sequence[Wanted], size: int) -> Iterator[Underway[Wanted]]:
        """Yield the group on its way: as one batch or, where memory runs out, as several smaller ones."""
        begun = self._attempt(group, size)
        if begun is None and any(runner.recordings for runner in self.runners.values()):
            self._forget_recordings()  # those of other sizes, as one that found no memory keeps nothing
            begun = self._attempt(group, size)
        if begun is None and size == 1 and self.recorder is not None:
            self._stop_recording(RuntimeError("out of memory"))
            begun = self._attempt(group, size)
        if begun is not None:
            yield begun
            return
        if size == 1:
            raise RunError("memory: one picture does not fit; a smaller checkpoint, --dtype bf16 or --device cpu")
        half = self.batch_size = size // 2
        self._forget_recordings()
        for first in range(0, len(group), half):
            part = group[first : first + half]
            yield from self._begin(part, self._size(len(part), several=True))

    def _forget_recordings(self) -> None:
        self.runners.clear()
        self.record = None  # and with it the pool, which cannot be used again once it was empty
        free_memory(block_weight(self.transformer).device)

    def _attempt(self, group: Sequence[Wanted], size: int) -> Underway[Wanted] | None:
        """Return the group on its way, or None where memory ran out."""
        try:
            return self._started(group, size)
        except (RuntimeError, MemoryError) as error:  # CUDA's own subclass, Metal and the CPU's allocator alike
            if not out_of_memory(error):
                raise
            return None

    @torch.inference_mode()
    def _started(self, group: Sequence[Wanted], size: int) -> Underway[Wanted]:
        padded = [*group, *[group[-1]] * (size - len(group))]
        rows, seeds = [request.row for request in padded], [request.seed for request in padded]
        runner, models = self._runner(size), (self.tokenizer, self.transformer)
        *_, last = generate(*models, rows, seeds, self.config, mark=self.mark, runner=runner)
        pixels_BPP3 = runner.run("decoder", partial(decode_on_device, self.tokenizer, last.f_hat))
        return fetched(group, pixels_BPP3)

    def _runner(self, size: int) -> Runner:
        """Return what runs batches of a size: recordings are kept for each size there is."""
        if self.recorder is None:
            return DIRECT
        self.record = self.record or self.recorder()
        if size not in self.runners:
            self.runners[size] = Recorded(self.record, self._stop_recording)
        return self.runners[size]

    def _stop_recording(self, error: RuntimeError) -> None:
        """Run everything as it is from now on, and say so."""
        self.recorder = None
        self._forget_recordings()
        self.note(not_recorded(error))


def not_recorded(error: RuntimeError) -> str:
    """Return a line for people about a failed recording."""
    reason = " ".join(str(error).split())
    return f"CUDA graphs: cannot be recorded here, small batches will be slower ({reason})"


def padded_size(count: int, largest: int) -> int:
    """Return the power of two that so many pictures are rounded up to, so that few sizes are recorded."""
    return min(1 << (count - 1).bit_length(), max(largest, count))


def fetched(group: Sequence[Wanted], pixels_BPP3: Tensor) -> Underway[Wanted]:
    """Return pictures on their way to the host; nothing here waits for a GPU.

    The copy is in the queue of the computation, so that the next batch cannot overwrite what is being
    copied; it takes a thousandth of a batch's time.
    """
    if pixels_BPP3.device.type != "cuda":
        return Underway(group, pixels_BPP3.cpu(), None)
    there = torch.empty_like(pixels_BPP3, device="cpu", pin_memory=True)
    arrived = torch.cuda.Event(blocking=True)  # who waits for it leaves the processor to those who encode
    there.copy_(pixels_BPP3, non_blocking=True)
    arrived.record(torch.cuda.current_stream(pixels_BPP3.device))  # which need not be the current device
    return Underway(group, there, arrived)
