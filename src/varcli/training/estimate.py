"""Estimate of what a training run will take, before it begins.

Operations and activation memory are counted on one or two images that go forward and backward through the network; the
rate is measured on a few such passes. The optimizer, and for a tokenizer the discriminator and the perceptual distance,
come on top.
"""

import math
import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from varcli.acceleration.devices import synchronize
from varcli.config import TokenizerConfig, TrainingConfig, TransformerConfig, transformer_recipe
from varcli.errors import RunError
from varcli.files import machine_memory
from varcli.training.scaling import PAPER

FLOAT32 = 4
"""Bytes of a weight, its moving average, its gradient and its two moments each."""
TIMED_PASSES = 3
TIMED_IMAGES = 4
"""Most images in a timed pass: an estimate should take seconds, and fit into memory where the run would not."""
LONG = 2.0
"""Seconds from which on the first pass alone is the measurement."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingEstimate:
    """Figures of a run."""

    parameters: int
    images: int
    """Training images."""
    steps: int
    images_seen: int
    flops: float
    """Floating-point operations of the whole run."""
    state_bytes: int
    """Weights, gradients, moments and average."""
    activation_bytes: int
    """Saved for the backward pass, for one part of a batch."""
    images_per_second: float
    seconds: float
    expected_loss: float | None = None
    """Mean cross-entropy in nats per token from the scaling law; transformers on ImageNet only."""
    expected_loss_last: float | None = None
    """The same over the last scale's tokens."""


# The released d16, N = 0.302, ended at 6.05 mean and 5.31 to 5.35 last (its published log, held-out images).
# The laws give 1.058 and 1.123 of that: 6.05 - 1.058 = 4.99, and 5.33 - 1.123 = 4.2.
IRREDUCIBLE = (4.99, 4.2)
"""Approximate mean and last-scale cross-entropy that no model can go below, with the released tokenizer on ImageNet."""


def expected_losses(depth: int) -> tuple[float, float]:
    """Return the mean and last-scale cross-entropy, in nats per token, that the scaling laws give a depth.

    Source: section 4.2, (2.5 N)^-0.20 and (2.0 N)^-0.23 above the irreducible part, N non-embedding
    parameters in billions.
    """
    billions = 73_728 * depth**3 / 1e9
    (beta, alpha), (beta_last, alpha_last) = (PAPER["parameters"][name] for name in ("loss", "loss_last"))
    return IRREDUCIBLE[0] + (beta * billions) ** alpha, IRREDUCIBLE[1] + (beta_last * billions) ** alpha_last


IMAGENET = 1_281_167
"""Images of ImageNet's training set."""
# The released d16's log has 6.376 and 5.738 after 19 epochs, 6.053 and 5.308 after its 200. In between the losses fall
# about as the logarithm of the images seen; deeper models are taken to fall alike.
PER_LOG_IMAGES = ((6.376 - 6.053) / math.log(200 / 19), (5.738 - 5.308) / math.log(200 / 19))


def expected_losses_at(config: TransformerConfig, images_seen: float | None = None) -> tuple[float, float] | None:
    """Return the mean and last-scale cross-entropy, in nats per token, that a transformer should have on ImageNet 256.

    Args:
        config: of the transformer.
        images_seen: so far; None is at the end of its recipe, to which the scaling laws belong.

    Returns:
        None for other grids and codebooks, and where chance does as well.
    """
    published, chance = TokenizerConfig(), math.log(config.codebook_size)
    at_end = expected_losses(config.depth)
    if (config.sides, config.codebook_size) != (published.sides, published.codebook_size) or max(at_end) > chance:
        return None
    recipe = transformer_recipe(config.depth).epochs * IMAGENET
    left = math.log(recipe / min(images_seen or recipe, recipe))
    mean, last = (loss + slope * left for loss, slope in zip(at_end, PER_LOG_IMAGES, strict=True))
    return min(mean, chance), min(last, chance)


class Estimable(Protocol):
    """A stage whose forward pass can be run on random data."""

    device: torch.device

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    def trial_loss(self, count: int) -> Tensor:
        """Return the loss of `count` random images, with its gradient."""


def estimate(
    stage: Estimable,
    training: TrainingConfig,
    images: int,
    expected: tuple[float, float] | None = None,
    frozen_copies: int = 0,
) -> TrainingEstimate:
    """Estimate a run.

    Args:
        stage: what is trained.
        training: how.
        images: training images.
        expected: mean and last-scale loss of the scaling laws, for transformers.
        frozen_copies: further copies of the weights in memory that are not trained.
    """
    from torch.utils.flop_counter import FlopCounterMode

    steps, part = training.steps(images), training.batch // training.accumulate
    with FlopCounterMode(display=False) as counter:
        loss, one = _loss_and_saved_bytes(stage, 1)
        loss.backward()
    two = _loss_and_saved_bytes(stage, 2)[1]  # weights in bf16, masks and the like are kept once for all images
    rate = _rate(stage, part)
    return TrainingEstimate(
        parameters=sum(parameter.numel() for parameter in stage.model.parameters()),
        images=images,
        steps=steps,
        images_seen=steps * training.batch,
        flops=counter.get_total_flops() * steps * training.batch,
        state_bytes=_state_bytes(stage, frozen_copies),
        activation_bytes=one + (two - one) * (part - 1),
        images_per_second=rate,
        seconds=steps * training.batch / rate,
        expected_loss=expected[0] if expected else None,
        expected_loss_last=expected[1] if expected else None,
    )


def check_memory(stage: Estimable, training: TrainingConfig) -> None:
    """Check that a batch fits into the memory of this machine; a system without enough of it hangs, or ends the run.

    The discriminator, the perceptual distance and images read ahead are not counted, and need more. On a GPU torch
    itself reports at the first step that memory does not suffice.

    Raises:
        RunError: it does not fit.
    """
    memory = machine_memory()
    if stage.device.type != "cpu" or memory is None:
        return
    one, two = (_loss_and_saved_bytes(stage, count)[1] for count in (1, 2))
    parts = [n for n in range(training.accumulate, training.batch + 1) if training.batch % n == 0]
    needed = {n: _state_bytes(stage) + one + (two - one) * (training.batch // n - 1) for n in parts}
    if needed[training.accumulate] <= memory:
        return
    fitting = next((n for n in parts if needed[n] <= COMFORTABLE * memory), None)
    advice = "even one image at a time would take more than half of it: make the model smaller"
    if fitting:
        advice = f"--grad-accum {fitting} computes it in parts, a smaller --batch-size takes fewer images"
    raise RunError(
        f"a batch of {training.batch} needs {needed[training.accumulate] / 2**30:.1f} GiB of memory or more, and this "
        f"machine has {memory / 2**30:.1f}; {advice}"
    )


COMFORTABLE = 0.5
"""Largest fraction of a machine's memory that a run with the advised settings takes."""


def _state_bytes(stage: Estimable, frozen_copies: int = 0) -> int:
    """Return the bytes of weights and average, gradients and two moments, and of further copies of the weights."""
    parameters = sum(parameter.numel() for parameter in stage.model.parameters())
    trained = sum(parameter.numel() for parameter in stage.model.parameters() if parameter.requires_grad)
    return FLOAT32 * ((2 + frozen_copies) * parameters + 3 * trained)


def _loss_and_saved_bytes(stage: Estimable, count: int) -> tuple[Tensor, int]:
    """Return the loss of some images, and the bytes autograd keeps for them, weights and views of them left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in stage.model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = stage.trial_loss(count)
    return loss, sum(seen.values())


def _rate(stage: Estimable, part: int) -> float:
    """Return images per second through forward and backward; the first pass counts only if it is long."""
    count = min(part, TIMED_IMAGES)
    seconds = _seconds(stage, count, 1)
    if seconds < LONG:
        seconds = _seconds(stage, count, TIMED_PASSES) / TIMED_PASSES
    stage.model.zero_grad()
    return count / seconds


def _seconds(stage: Estimable, count: int, passes: int) -> float:
    """Seconds that some passes through that many images take."""
    synchronize(stage.device)
    begin = time.perf_counter()
    for _ in range(passes):
        stage.trial_loss(count).backward()
    synchronize(stage.device)
    return time.perf_counter() - begin
