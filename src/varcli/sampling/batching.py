"""Sampling many images, in batches as large as memory and reproducibility allow.

Shapes: B images, P pixels per side.
"""

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from varcli.acceleration.cuda_blocks import for_gpu
from varcli.acceleration.cuda_graphs import Capture, GraphRunner, Runner, cuda_capture
from varcli.acceleration.devices import block_weight, free_memory, independent, out_of_memory
from varcli.acceleration.int8 import Int8Linear
from varcli.config import SampleConfig
from varcli.errors import RunError
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer
from varcli.sampling.sampler import DECODED_AT_ONCE, EAGER, Pixels, decode, decode_on_device, generate

LARGEST_BATCH = 256
"""Larger batches are not faster."""

PLANNED = 0.85
"""Fraction of the memory that models and batches may fill; the rest is for libraries and fragmentation."""


def fitting_batch(
    tokenizer: Tokenizer, transformer: Transformer, config: SampleConfig, refiner: Transformer | None = None
) -> int:
    """Estimate how many images fit into a GPU's memory, a power of two; too many are halved later.

    The whole memory counts, not what is free of it: in 16 bits the images depend on the batch size, and must be the
    same every time on the same machine.
    """
    device, transformers = block_weight(transformer).device, [transformer, *([refiner] if refiner else [])]
    if device.type != "cuda":
        return 16
    _, whole = torch.cuda.mem_get_info(device)
    room, count = PLANNED * whole - model_bytes(tokenizer, *transformers), LARGEST_BATCH
    while count > 1 and sum(batch_bytes(tokenizer, each, config, count) for each in transformers) > room:
        count //= 2
    return count


def model_bytes(*models: Tokenizer | Transformer) -> int:
    """Bytes of the models themselves."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return sum(tensor.nbytes for tensor in tensors)


def batch_bytes(tokenizer: Tokenizer, transformer: Transformer, config: SampleConfig, count: int) -> int:
    """Peak bytes of a captured batch of images, besides the models."""
    shape, size = transformer.config, block_weight(transformer).element_size()
    rows, last = count * config.rows, shape.sides[-1] ** 2
    fused = for_gpu(transformer)
    kept_tokens = shape.depth * (shape.length - last) + shape.length if fused else shape.depth * shape.length
    cache = 2 * rows * kept_tokens * shape.width * size
    modulations = rows * shape.depth * 6 * shape.width * (4 + size)
    logits = count * shape.length * shape.codebook_size * 4
    return (
        cache
        + modulations
        + logits
        + max(
            rows * last * shape.width * _block_bytes(transformer),
            count * last * (config.top_k or shape.codebook_size) * 40,  # a draw
            min(count, DECODED_AT_ONCE) * _decoder_bytes(tokenizer),
        )
    )


def _block_bytes(transformer: Transformer) -> int:
    """Peak bytes of a block per feature and token, with the residual stream, in 16 bits."""
    block: Any = transformer.blocks[0]
    if isinstance(block.ffn.fc1, Int8Linear):
        return 58  # four times the width in float32 again and again: magnitudes, quotients, products
    return 2 * 4 + 5 * 2 if for_gpu(transformer) else 30


def _decoder_bytes(tokenizer: Tokenizer) -> int:
    """Peak bytes of an image in the decoder: input and output of a few layers."""
    shape, size = tokenizer.config, tokenizer.post_quant_conv.weight.element_size()
    return 5 * max(shape.multipliers[:2]) * shape.base_width * shape.pixels**2 * size


class Request(Protocol):
    """One image to be sampled."""

    @property
    def label(self) -> int:
        """Index in the class table; the number of classes stands for "no class"."""

    @property
    def seed(self) -> int:
        """With the label and the settings it determines the image."""


RequestT = TypeVar("RequestT", bound=Request)


@dataclass(frozen=True, slots=True)
class Underway(Generic[RequestT]):
    """Images that a GPU is sampling, or has copied to the host's memory."""

    group: Sequence[RequestT]
    pixels: Tensor
    """(B, P, P, 3) uint8 in the host's memory, not valid before `arrived`."""
    arrived: torch.cuda.Event | None
    """None where there is nothing to wait for."""

    def images(self) -> Iterator[tuple[RequestT, Pixels]]:
        """Wait for the images, and yield each request with its image."""
        if self.arrived is not None:
            self.arrived.synchronize()
        yield from zip(self.group, self.pixels.numpy(), strict=False)  # a padded batch has more images


class BatchSampler:
    """Samples images with one pair of models and one set of settings."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        transformer: Transformer,
        config: SampleConfig,
        batch_size: int | None = None,
        note: Callable[[str], None] = lambda line: None,
        refiner: Transformer | None = None,
    ) -> None:
        """Take models that `dispatch.prepare` made ready.

        Args:
            tokenizer: turns tokens into pixels.
            transformer: predicts the tokens.
            config: settings of all images.
            batch_size: images per batch where there are batches; None means as many as memory seems to hold.
            note: called with a line about what makes this run slower than it could be.
            refiner: predicts the tokens from `config.refine_from` on.
        """
        self.tokenizer, self.transformer, self.config, self.note = tokenizer, transformer, config, note
        self.refiner = refiner
        alone, device = independent(transformer), block_weight(transformer).device
        self.batch_size = 1 if alone else batch_size or fitting_batch(tokenizer, transformer, config, refiner)
        self.ahead = 1 if device.type == "cuda" else 0
        capturable = device.type == "cuda" and not alone and not config.smooth
        self.new_capture: Callable[[], Capture] | None = partial(cuda_capture, device) if capturable else None
        self.capture: Capture | None = None
        self.runners: dict[int, GraphRunner] = {}
        self.mark: Callable[[str], None] = lambda phase: None
        """For a stopwatch, as `generate` has it."""

    def images(self, requests: Iterable[RequestT]) -> Iterator[tuple[RequestT, Pixels]]:
        """Yield each request with its image, (P, P, 3) uint8, in order, reading only a batch ahead.

        On a GPU the next batch is begun before the images of the last are waited for.

        An error, in the requests too, is raised after the images that were begun before it.

        Raises:
            RunError: not even one image fits into memory.
        """
        waiting, underway, several = iter(requests), deque[Underway[RequestT]](), False
        try:
            while group := list(islice(waiting, self.batch_size)):
                underway.extend(self._begin(group, self._size(len(group), several)))
                several = True
                while len(underway) > self.ahead:
                    yield from underway.popleft().images()
        except Exception:
            yield from chain.from_iterable(map(Underway.images, underway))
            raise
        yield from chain.from_iterable(map(Underway.images, underway))

    def growth(self, request: Request, scales: Container[int] | None = None) -> Iterator[Pixels]:
        """Yield one image (P, P, 3) as it looks after each scale; the last one is the image itself.

        Args:
            request: which image.
            scales: after which ones, the coarsest being 1; None is all. Each is sampled when the iterator reaches it.
        """
        models, label, seed = (self.tokenizer, self.transformer), [request.label], [request.seed]
        for result in generate(*models, label, seed, self.config, refiner=self.refiner):
            if scales is None or result.scale + 1 in scales:
                yield decode(self.tokenizer, result.f_hat)[0]

    def _size(self, count: int, several: bool) -> int:
        """Return the batch size to compute for a number of images.

        In 16 bits the images depend on it, so the last of several batches is as large as those before it.
        """
        if several:
            return max(count, self.batch_size)
        return count if self.new_capture is None else padded_size(count, self.batch_size)

    def _begin(self, group: Sequence[RequestT], size: int) -> Iterator[Underway[RequestT]]:
        """Start a group and yield it: as one batch or, where memory runs out, as several smaller ones."""
        begun = self._attempt(group, size)
        if begun is None and any(runner.graphs for runner in self.runners.values()):
            self._drop_graphs()  # of other sizes, as one that ran out of memory keeps none
            begun = self._attempt(group, size)
        if begun is None and size == 1 and self.new_capture is not None:
            self._stop_capturing(RuntimeError("out of memory"))
            begun = self._attempt(group, size)
        if begun is not None:
            yield begun
            return
        if size == 1:
            raise RunError("one image does not fit into memory; use a smaller checkpoint, --dtype bf16 or --device cpu")
        half = self.batch_size = size // 2
        self._drop_graphs()
        for first in range(0, len(group), half):
            part = group[first : first + half]
            yield from self._begin(part, self._size(len(part), several=True))

    def _drop_graphs(self) -> None:
        self.runners.clear()
        self.capture = None  # and with it the pool, which cannot be used again once it was empty
        free_memory(block_weight(self.transformer).device)

    def _attempt(self, group: Sequence[RequestT], size: int) -> Underway[RequestT] | None:
        """Start a group and return it, None where memory ran out."""
        try:
            return self._started(group, size)
        except (RuntimeError, MemoryError) as error:  # CUDA's own subclass, Metal and the CPU's allocator alike
            if not out_of_memory(error):
                raise
            return None

    @torch.inference_mode()
    def _started(self, group: Sequence[RequestT], size: int) -> Underway[RequestT]:
        padded = [*group, *[group[-1]] * (size - len(group))]
        labels, seeds = [request.label for request in padded], [request.seed for request in padded]
        runner, models = self._runner(size), (self.tokenizer, self.transformer)
        scales = generate(*models, labels, seeds, self.config, refiner=self.refiner, mark=self.mark, runner=runner)
        last = deque(scales, maxlen=1).pop()  # a list of all would hold the logits of each
        pixels_BPP3 = runner.run("decoder", partial(decode_on_device, self.tokenizer, last.f_hat))
        return fetched(group, pixels_BPP3)

    def _runner(self, size: int) -> Runner:
        """The runner of a batch size; each size keeps its graphs."""
        if self.new_capture is None:
            return EAGER
        self.capture = self.capture or self.new_capture()
        if size not in self.runners:
            self.runners[size] = GraphRunner(self.capture, self._stop_capturing)
        return self.runners[size]

    def _stop_capturing(self, error: RuntimeError) -> None:
        """Run every step as it is from now on, and say so."""
        self.new_capture = None
        self._drop_graphs()
        self.note(not_captured(error))


def not_captured(error: RuntimeError) -> str:
    """Return a line for the user about a failed capture."""
    reason = " ".join(str(error).split())
    return f"CUDA graphs cannot be captured here, so small batches will be slower ({reason})"


def padded_size(count: int, largest: int) -> int:
    """Round a number of images up to a power of two, so that few sizes are captured."""
    return min(1 << (count - 1).bit_length(), max(largest, count))


def fetched(group: Sequence[RequestT], pixels_BPP3: Tensor) -> Underway[RequestT]:
    """Start to copy images to the host, without waiting for a GPU.

    The copy is queued in the stream of the computation, so that the next batch cannot overwrite its source; it takes a
    thousandth of a batch's time.
    """
    if pixels_BPP3.device.type != "cuda":
        return Underway(group, pixels_BPP3.cpu(), None)
    there = torch.empty_like(pixels_BPP3, device="cpu", pin_memory=True)
    arrived = torch.cuda.Event(blocking=True)  # waiting for it leaves the CPU to the threads that encode
    there.copy_(pixels_BPP3, non_blocking=True)
    arrived.record(torch.cuda.current_stream(pixels_BPP3.device))  # which need not be the current device
    return Underway(group, there, arrived)
