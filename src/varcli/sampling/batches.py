"""Many pictures: in batches as large as memory and reproducibility allow."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol, TypeVar

import torch

from varcli.config import SampleConfig
from varcli.errors import RunError
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer
from varcli.sampling.devices import block_weight, free_memory, independent, out_of_memory
from varcli.sampling.sampler import Pixels, decode, generate

LARGEST_BATCH = 256
"""Beyond it nothing gets faster."""


class Request(Protocol):
    """One picture to be made."""

    @property
    def row(self) -> int:
        """Row of the class table."""

    @property
    def seed(self) -> int:
        """With the row and the settings it determines the picture."""


Wanted = TypeVar("Wanted", bound=Request)


class BatchSampler:
    """Makes pictures with one pair of models and one set of settings."""

    def __init__(
        self, tokenizer: Tokenizer, transformer: Transformer, config: SampleConfig, batch_size: int | None = None
    ) -> None:
        """Take models made ready by `devices.place`; no batch size means as many as memory seems to hold."""
        self.tokenizer, self.transformer, self.config = tokenizer, transformer, config
        self.batch_size = 1 if independent(transformer) else batch_size or fitting_batch(tokenizer, transformer)

    def pictures(self, requests: Iterable[Wanted]) -> Iterator[tuple[Wanted, Pixels]]:
        """Yield each request with its picture, (P, P, 3) uint8, in order, reading only a batch ahead.

        Raises:
            RunError: not even one picture fits into memory.
        """
        waiting = iter(requests)
        while group := list(islice(waiting, self.batch_size)):
            yield from zip(group, self._make(group), strict=True)

    def growth(self, request: Request) -> Iterator[Pixels]:
        """Yield one picture (P, P, 3) as it looks after each scale; the last one is the picture itself."""
        for result in generate(self.tokenizer, self.transformer, [request.row], [request.seed], self.config):
            yield decode(self.tokenizer, result.f_hat)[0]

    def _make(self, group: Sequence[Request]) -> list[Pixels]:
        made = self._attempt(group)
        if made is not None:
            return made
        if len(group) == 1:
            raise RunError("memory: one picture does not fit; a smaller checkpoint, --dtype bf16 or --device cpu")
        half = self.batch_size = len(group) // 2
        free_memory(block_weight(self.transformer).device)
        return self._make(group[:half]) + self._make(group[half:])

    def _attempt(self, group: Sequence[Request]) -> list[Pixels] | None:
        """Return the group's pictures, or None where memory ran out."""
        rows, seeds = [request.row for request in group], [request.seed for request in group]
        try:
            *_, last = generate(self.tokenizer, self.transformer, rows, seeds, self.config)
            return list(decode(self.tokenizer, last.f_hat))
        except (RuntimeError, MemoryError) as error:  # CUDA's own subclass, Metal and the CPU's allocator alike
            if not out_of_memory(error):
                raise
            return None


def fitting_batch(tokenizer: Tokenizer, transformer: Transformer) -> int:
    """Return how many pictures should fit into a GPU's free memory; too many is corrected by halving."""
    weight = block_weight(transformer)
    if weight.device.type != "cuda":
        return 16
    free, _ = torch.cuda.mem_get_info(weight.device)
    shape, parts = transformer.config, tokenizer.config
    cache = 2 * shape.depth * 2 * shape.length * shape.width * weight.element_size()
    last_scale = shape.sides[-1] ** 2 * (2 * 16 * shape.width + 6 * shape.codebook_size) * 4
    decoder = 6 * parts.base_width * parts.pixels**2 * weight.element_size()
    return max(1, min(LARGEST_BATCH, int(0.8 * free) // (cache + max(last_scale, decoder))))
