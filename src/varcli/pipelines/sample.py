"""Sample classes into a folder, an archive or a stream, on any number of ranks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varcli.classes import ClassEntry, parse_classes
from varcli.config import SampleConfig
from varcli.console import progress
from varcli.distributed import ProcessGroup
from varcli.errors import UsageError
from varcli.files import write_atomically
from varcli.images.contact_sheet import MAX_IMAGES, contact_sheet, save_growth
from varcli.images.image import Image
from varcli.images.provenance import Provenance, png_bytes
from varcli.outputs.async_writer import AsyncWriter
from varcli.outputs.open import check_outputs, find_sink
from varcli.outputs.sinks import Sink
from varcli.pipelines.model import Model, checkpoint_hint
from varcli.pipelines.rejection import RejectionSampler, check_decision, open_classifier
from varcli.pipelines.requests import SampleRequest, candidate_count, class_requests

if TYPE_CHECKING:
    from concurrent.futures import Future

    from varcli.sampling.sampler import Pixels

    Sampled = Callable[[Iterable[SampleRequest]], Iterator[tuple[SampleRequest, Pixels]]]

WRITE_AHEAD = 8
"""Images that may wait to be written, or go to the main rank at a time, when sampled one by one."""

Written = Callable[[Provenance, Path | None, Path | None], None]
"""Called for each image that was written: its provenance, its own file, and the archive that holds it."""


def check_sheet(count: int) -> None:
    """Raise UsageError if a contact sheet cannot show so many images."""
    if count > MAX_IMAGES:
        raise UsageError(f"--grid can show at most {MAX_IMAGES} images (got {count})")


@dataclass(frozen=True, slots=True)
class SampleSummary:
    """Outcome of a run."""

    asked: int
    """Images requested."""
    written: int
    """Of these, the images sampled by this run; the others existed."""
    archive: Path | None
    """The one file that holds all images, where there is one."""
    unasked: int
    """Images of an earlier run in the archive that were not requested."""


def sample_to(
    model: Model,
    classes: Sequence[str],
    out: str | None,
    config: SampleConfig,
    *,
    count: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    best_of: float = 1,
    decide_at: int | None = None,
    classifier: str = "resnet101",
    grid: Path | None = None,
    growth: Path | None = None,
    resume: bool = False,
    lines: Iterable[str] = (),
    group: ProcessGroup | None = None,
    written: Written = lambda provenance, path, archive: None,
    note: Callable[[str], None] = lambda line: None,
    quiet: bool = True,
) -> SampleSummary:
    """Sample images of classes and write each with its provenance, in order, while the next ones are sampled.

    Args:
        model: samples the images.
        classes: as `--class` takes them, e.g. ["207", "tabby,none", "10-20", "all", "random"]; "-" reads `lines`.
        out: a .png file, a folder, .npz, .tar, or "-" for standard output; None is the current folder.
        config: settings of all images.
        count: images per class.
        seed: of each class's first image; the next ones count up from it.
        batch_size: images at a time on a GPU in 16 bits.
        best_of: candidates per image that is kept.
        decide_at: scale after which candidates are judged, the coarsest being 1; None after the last.
        classifier: name of the classifier that chooses among candidates.
        grid: also write a contact sheet of all images, .png.
        growth: also write the one image growing scale by scale, .png or .gif.
        resume: skip images that an earlier run left.
        lines: where "-" reads classes, one line at a time, each answered before the next is read.
        group: the ranks that share the images; None is this process alone.
        written: called for each image, by the main rank.
        note: takes remarks for the user.
        quiet: show no progress bar.

    Raises:
        InputError: a class is unknown, or with `resume` the output is not ours.
        UsageError: the options do not go together.
        RunError: something cannot be written.
    """
    group = group or ProcessGroup()
    check_outputs(out, grid, growth)
    entries: Iterable[ClassEntry | None] = parse_classes(
        classes,
        model.classes,
        lines,
        checkpoint_hint(),
        note,
    )
    total = None
    if "-" not in map(str.strip, classes):
        entries = known = list(entries)
        total = len(known) * count
        if grid:
            check_sheet(total)
    if growth and total != 1:
        raise UsageError(f"--growth shows exactly one image (got {total or 'any number of'} images)")
    check_decision(decide_at, best_of, len(model.tokenizer_config.sides))
    sink = find_sink(out, several=total != 1)
    model.load_weights(config)
    if group.is_main:
        if not resume and (left := sink.left()):
            note(f"{left} is from an earlier run and will be replaced; --resume would continue it")
        sink.open(resume)
    with sink, progress("images", total, quiet) as advance:
        if model.precision_note:
            note(model.precision_note)
        sampler = model.sampler(config, batch_size, note=note)
        common = model.provenance(config, device=model.device.type if group.world_size > 1 else None)
        requests: Iterable[list[SampleRequest]] = class_requests(
            entries, candidate_count(count, best_of), seed, model.classes, common
        )
        sampled: Sampled = sampler.images
        if best_of > 1:
            rejection = RejectionSampler(sampler, open_classifier(classifier, model, note), count, group, decide_at)
            requests, sampled = rejection.select(requests), rejection.images
            requests = requests if group.world_size == 1 else list(requests)  # all ranks must exhaust it
        if growth:
            sampled = _growing(sampler, growth)
        run = _Run(sink, sampled, group, written, advance, keep_pixels=grid is not None)
        with AsyncWriter(sink, run.placed, max(WRITE_AHEAD, 2 * sampler.batch_size)) as writer:
            if group.world_size > 1:
                run.share(list(chain.from_iterable(requests)), writer, max(WRITE_AHEAD, sampler.batch_size))
            else:
                # Known classes are batched together; those of stdin are answered line by line.
                for burst in requests if total is None else [chain.from_iterable(requests)]:
                    run.write(burst, writer)
                    writer.wait()
    if grid and run.shown:
        labels = [f"{image.class_name}, seed {image.seed}" for image in run.shown]
        write_atomically(grid, png_bytes(contact_sheet([image.array for image in run.shown], labels)))
    return SampleSummary(run.asked, run.count, sink.archive, sink.unasked())


def _growing(sampler: Any, path: Path) -> "Sampled":
    """Sample images one by one, and write each growing scale by scale to `path`."""

    def images(requests: Iterable[SampleRequest]) -> "Iterator[tuple[SampleRequest, Pixels]]":
        for request in requests:
            frames = list(sampler.growth(request))
            labels = [f"{side} × {side}" for side in sampler.transformer.config.sides]
            save_growth(path, frames, labels, request.provenance)
            yield request, frames[-1]

    return images


class _Run:
    """Samples requests into the open sink, and counts them."""

    def __init__(
        self,
        sink: Sink,
        sampled: "Sampled",
        group: ProcessGroup,
        written: Written,
        advance: Callable[[], None],
        *,
        keep_pixels: bool,
    ) -> None:
        self.sink, self.sampled, self.group, self.written, self.advance = sink, sampled, group, written, advance
        self.keep_pixels = keep_pixels
        self.asked = 0
        self.count = 0
        self.shown: list[Image] = []

    def missing(self, requests: Iterable[SampleRequest]) -> Iterator[SampleRequest]:
        """Yield the requests whose images an earlier run did not leave in the sink."""
        for request in requests:
            self.asked += 1
            if self.keep_pixels:
                check_sheet(self.asked)  # the number of lines on stdin is unknown
            if self.sink.has(request.provenance):
                self.advance()
            else:
                yield request

    def prepared(
        self, requests: Iterable[SampleRequest], writer: "AsyncWriter[Any]"
    ) -> "Iterator[tuple[SampleRequest | Image, Future[Any]]]":
        """Yield images as they are sampled, each with its encoding as a future."""
        for request, pixels in self.sampled(requests):
            item = Image(pixels, request.provenance) if self.keep_pixels else request
            yield item, writer.prepare(item, pixels)

    def write(self, requests: Iterable[SampleRequest], writer: "AsyncWriter[Any]") -> None:
        """Sample the missing images and pass them to the writer."""
        for item, encoded in self.prepared(self.missing(requests), writer):
            writer.put(item, encoded)

    def share(self, requests: Sequence[SampleRequest], writer: "AsyncWriter[Any]", size: int) -> None:
        """Sample this rank's share of the missing images; the main rank writes all of them in order.

        Ranks pass on a round of images at a time, which were encoded while they sampled the next round.
        """
        todo = self.group.broadcast(list(self.missing(requests)) if self.group.is_main else [])
        size = self.group.broadcast(size)
        mine = self.prepared(self.group.shard(todo), writer)
        late: list[tuple[SampleRequest | Image, Future[Any]]] = []
        for _ in range(ceil(len(todo) / (size * self.group.world_size)) + 1):
            sampled = list(islice(mine, size))
            shares = self.group.gather([(item, encoded.result()) for item, encoded in late])
            for item, encoded in filter(None, chain.from_iterable(zip_longest(*shares))):
                writer.put(item, encoded)
            late = sampled

    def placed(self, item: SampleRequest | Image, path: Path | None) -> None:
        """Report an image that was written."""
        self.count += 1
        self.written(item.provenance, path, self.sink.archive)
        if isinstance(item, Image):
            self.shown.append(item)
        self.advance()
