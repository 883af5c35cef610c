"""Likelihood of images, of their parts, and under which class it is highest."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from varcli.classes import RANDOM, ClassEntry
from varcli.config import spans
from varcli.errors import InputError, UsageError
from varcli.evaluation.references import find_reference, holds_images
from varcli.files import write_atomically
from varcli.images.blending import tinted
from varcli.images.contact_sheet import contact_sheet
from varcli.images.dataset import ImageSet, open_images
from varcli.images.decode import UnreadableImage, square_crop
from varcli.images.provenance import png_bytes
from varcli.pipelines.edit import ImageInput, crop, read_input
from varcli.pipelines.model import ClassName, Model
from varcli.sampling.likelihood import CANDIDATES, encodings, log_probabilities, rank_classes
from varcli.sampling.reconstruction import encode
from varcli.sampling.sampler import Pixels


@dataclass(frozen=True, slots=True)
class Score:
    """Negative log-likelihood of an image's tokens given a class."""

    entry: ClassEntry | None
    """The class; None is "no class"."""
    pixels: Pixels
    """(P, P, 3) uint8: the image, centre-cropped to a square and resized to the model's size."""
    sides: tuple[int, ...]
    """Sides of the token maps."""
    nats_L: NDArray[np.float32]
    """Negative natural logarithm of each token's probability given the class and all coarser tokens, (L,)."""

    @property
    def nats(self) -> float:
        """Negative natural logarithm of the probability of all tokens."""
        return float(self.nats_L.sum())

    @property
    def bits_per_token(self) -> float:
        """Mean over all tokens."""
        return self.nats / math.log(2) / len(self.nats_L)

    @property
    def bits_per_pixel(self) -> float:
        """Bits of all tokens over pixels of the square."""
        return self.nats / math.log(2) / len(self.pixels) ** 2

    @property
    def scale_nats(self) -> list[float]:
        """Nats of the tokens of each scale, coarse to fine."""
        return [float(self.nats_L[span].sum()) for span in spans(self.sides)]

    @property
    def nats_map(self) -> NDArray[np.float32]:
        """Nats per token at each pixel of the image: the mean of the scales of at least half the last side."""
        size = (len(self.pixels), len(self.pixels))
        layers = [
            PIL.Image.fromarray(self.nats_L[span].reshape(side, side)).resize(size, PIL.Image.Resampling.BILINEAR)
            for side, span in zip(self.sides, spans(self.sides), strict=True)
            if 2 * side >= self.sides[-1]
        ]
        return np.mean([np.asarray(layer) for layer in layers], axis=0)


def score(model: Model, image: ImageInput, label: ClassName) -> Score:
    """Score an image given a class.

    Args:
        model: its transformer gives the probabilities.
        image: an image of any size.
        label: index or name of the class, or None.

    Raises:
        InputError: the image cannot be read, or the model does not know the class.
        UsageError: the label means several classes, or a random one.
    """
    entry = model.one_class(label)
    if entry == RANDOM:
        raise UsageError("--class takes exactly one class here, or none (got random)")
    pixels = crop(model, read_input(image))
    tokenizer, transformer = model.prepared.tokenizer, model.prepared.transformer
    index = model.classes.label(entry.id) if entry else transformer.config.null_class
    log_1L = log_probabilities(tokenizer, transformer, encode(tokenizer, pixels[None]), [index])
    return Score(entry, pixels, tokenizer.config.sides, -log_1L[0].cpu().numpy())


def save_heatmaps(path: Path, scores: Sequence[Score], names: Sequence[str]) -> None:
    """Write a contact sheet of images beside maps of their nats per token, .png.

    Blue is where an image's tokens take fewest nats, and orange where they take most.
    """
    shown, labels = [], []
    for each, name in zip(scores, names, strict=True):
        low, high = float(each.nats_map.min()), float(each.nats_map.max())
        shown += [each.pixels, tinted(each.pixels, (each.nats_map - low) / max(high - low, 1e-6))]
        labels += [name, f"{low:.1f} to {high:.1f} nats per token"]
    write_atomically(path, png_bytes(contact_sheet(shown, labels, columns=2 if len(scores) < 3 else 4)))


# --- classification --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClassScore:
    """How well a class explains an image."""

    entry: ClassEntry
    nats: float
    """Negative natural logarithm of the probability of the image's tokens in the scales that were scored."""
    scales: int
    """How many of the coarsest scales these are: all for the last candidates."""


def classify(
    model: Model, image: ImageInput, candidates: Sequence[int] = CANDIDATES, encoding_count: int = 1
) -> list[ClassScore]:
    """Return all classes, the one first that gives an image the highest likelihood; arguments as for the method.

    Raises:
        InputError: the image cannot be read.
        ConfigError: the numbers of candidates do not fall.
    """
    return classify_pixels(model, crop(model, read_input(image)), candidates, encoding_count)


def classify_pixels(
    model: Model, pixels_PP3: Pixels, candidates: Sequence[int], encoding_count: int
) -> list[ClassScore]:
    """Return the same for pixels of the model's size."""
    tokenizer, transformer = model.prepared.tokenizer, model.prepared.transformer
    tokens = encodings(tokenizer, pixels_PP3, encoding_count)
    ranked = rank_classes(tokenizer, transformer, tokens, candidates)
    return [ClassScore(model.classes.entries[each.label], each.nats, each.scales) for each in ranked]


@dataclass(frozen=True, slots=True)
class Classified:
    """An image of a set, and the classes that explain it, best first."""

    name: str
    label: ClassEntry | None
    """Its class as the set says; None where it is not known, or not to the model."""
    classes: list[ClassScore]

    def hit(self, count: int) -> bool:
        """Whether its label is among the first `count` classes."""
        return self.label in [each.entry for each in self.classes[:count]]


def accuracy(classified: Sequence[Classified]) -> tuple[int, dict[int, float]]:
    """How many images have a label, and the shares of these whose label is among the first 1 and 5 classes."""
    labelled = [image for image in classified if image.label]
    shares = {count: sum(image.hit(count) for image in labelled) / len(labelled) for count in (1, 5) if labelled}
    return len(labelled), shares


def classify_set(
    model: Model,
    images: ImageSet,
    candidates: Sequence[int],
    encoding_count: int,
    *,
    skip_bad: bool = False,
    note: Callable[[str], None] = lambda line: None,
) -> Iterator[Classified]:
    """Yield each image of a set with its classes; one that cannot be decoded is noted if bad images are skipped.

    Raises:
        InputError: an image cannot be decoded.
    """
    known = {entry.wnid: entry for entry in model.classes.entries}
    for index, label in enumerate(images.labels):
        try:
            image = images.read(index)
        except UnreadableImage as error:
            if not skip_bad:
                raise
            note(str(error))
            continue
        pixels = square_crop(image, model.tokenizer_config.pixels)
        entry = known.get(images.classes.entries[label].wnid) if label >= 0 else None
        yield Classified(images.name(index), entry, classify_pixels(model, pixels, candidates, encoding_count))


def open_set(
    model: Model,
    paths: Sequence[str],
    reference: str | None = None,
    count: int | None = None,
    *,
    skip_bad: bool = False,
    progress: bool = True,
) -> ImageSet:
    """Open images to classify, of any sizes.

    Args:
        model: what classifies them.
        paths: folders, archives and image files.
        reference: instead, a reference set by name.
        count: take only so many, spread evenly over all.
        skip_bad: skip unreadable images instead of raising.
        progress: show a bar while downloading.

    Raises:
        InputError: a path cannot be opened, images cannot be read, or the reference has none.
    """
    if reference is not None:
        path = find_reference(reference, progress)
        if not holds_images(path):
            raise InputError(f"--reference {reference} holds statistics and no images; give paths of images")
        paths = [str(path)]
    images = open_images(paths, resize=model.tokenizer_config.pixels, skip_bad=skip_bad)
    if count is None or count >= len(images):
        return images
    return images.subset(i * len(images) // count for i in range(count))
