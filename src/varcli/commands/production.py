"""How the images of `var sample` get made and told of: batch by batch, by one process or shared by several."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice, zip_longest
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varcli.commands.series import SampleRequest
from varcli.console import result
from varcli.distributed import ProcessGroup
from varcli.errors import UsageError

if TYPE_CHECKING:
    from concurrent.futures import Future

    from varcli.images.provenance import Pixels, Provenance
    from varcli.outputs.async_writer import AsyncWriter
    from varcli.outputs.sinks import Sink


Sampled = Callable[[Iterable[SampleRequest]], "Iterator[tuple[SampleRequest, Pixels]]"]
"""Makes images, in order."""


@dataclass(frozen=True, slots=True)
class Finished:
    """An image that was made, with its pixels where they are to be shown."""

    image: SampleRequest
    pixels: "Pixels | None"

    @property
    def made(self) -> "Provenance":
        """What its file says of it."""
        return self.image.made


@dataclass(slots=True)
class Results:
    """Where finished images go, and what is said of them."""

    output: "Sink"
    grid: Path | None
    as_json: bool
    quiet: bool
    advance: Callable[[], None]
    asked: int = 0
    made: int = 0
    shown: list[Finished] = field(default_factory=list)

    def missing(self, wanted: Iterable[SampleRequest]) -> Iterator[SampleRequest]:
        """Yield those images that an earlier run did not leave in the output."""
        for image in wanted:
            self.asked += 1
            if self.grid:
                check_sheet(self.asked)  # how many lines stdin has nobody knew
            if self.output.has(image.made):
                self.advance()
            else:
                yield image

    def placed(self, finished: Finished, path: Path | None) -> None:
        """Say where an image is, which has its place now."""
        self.made += 1
        if self.as_json:
            where = path or self.output.archive
            result(json.dumps({"path": where and str(where)} | asdict(finished.made), sort_keys=True))
        elif path and not self.quiet:
            result(str(path))
        if self.grid:
            self.shown.append(finished)
        self.advance()

    def finish(self, say: Callable[[str], None]) -> None:
        """Make the contact sheet, and name the file that holds all images where there is one."""
        if self.grid and self.shown:
            from varcli.files import write_atomically
            from varcli.images.contact_sheet import contact_sheet
            from varcli.images.provenance import png_bytes

            labels = [f"{one.made.class_name}, seed {one.made.seed}" for one in self.shown]
            pixels = [one.pixels for one in self.shown if one.pixels is not None]
            write_atomically(self.grid, png_bytes(contact_sheet(pixels, labels)))
        if self.asked > 0 and self.made == 0:
            say(f"nothing left to do; {self.asked} of {self.asked} images were there")
        if unasked := self.output.unasked():
            say(f"{self.output.archive} also holds {unasked} images of an earlier run that were not asked for now")
        archive = self.output.archive
        if archive and archive.exists() and not self.quiet and not self.as_json:
            result(str(archive))


def check_sheet(count: int) -> None:
    """Find out whether so many images can be shown on a sheet.

    Raises:
        UsageError: they cannot.
    """
    from varcli.images.contact_sheet import MAX_IMAGES

    if count > MAX_IMAGES:
        raise UsageError(f"grid: {count} images; at most {MAX_IMAGES}")


# --- making them -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Production:
    """Makes images and puts them into the open output, while the next ones are made."""

    sampled: Sampled
    """Makes the images."""
    results: Results
    """Where they go."""
    group: ProcessGroup
    """The processes that share them."""
    batch_size: int
    """How many are made at a time."""

    def run(self, bursts: Iterable[Iterable[SampleRequest]]) -> None:
        """Make all images of some bursts; each burst is in its place before the next is begun."""
        from varcli.outputs.async_writer import AsyncWriter

        ahead = max(_AHEAD, 2 * self.batch_size)
        with AsyncWriter(self.results.output, self.results.placed, ahead) as writer:
            if self.group.world_size > 1:
                self._share(chain.from_iterable(bursts), writer)
                return
            for burst in bursts:
                for finished, prepared in self._made(self.results.missing(burst), writer):
                    writer.put(finished, prepared)
                writer.wait()

    def _made(
        self, wanted: Iterable[SampleRequest], writer: "AsyncWriter[Finished]"
    ) -> Iterator[tuple[Finished, "Future[Any]"]]:
        """Yield images as they are made, on their way to being encoded."""
        for image, pixels in self.sampled(wanted):
            finished = Finished(image, pixels if self.results.grid else None)
            yield finished, writer.prepare(finished, pixels)

    def _share(self, wanted: Iterable[SampleRequest], writer: "AsyncWriter[Finished]") -> None:
        """Make this process's share, and hand it over to the first process, a round at a time.

        That one puts all of them down in the order wanted, as if it had made them alone. What it takes was
        encoded while the next round was made.
        """
        missing = self.results.missing(wanted) if self.group.is_main else ()
        todo = self.group.broadcast(list(missing))
        size = self.group.broadcast(max(_AHEAD, self.batch_size))
        mine = self._made(self.group.shard(todo), writer)
        late: list[tuple[Finished, Future[Any]]] = []
        for _ in range(ceil(len(todo) / (size * self.group.world_size)) + 1):
            made = list(islice(mine, size))
            shares = self.group.gather([(finished, prepared.result()) for finished, prepared in late])
            for finished, prepared in filter(None, chain.from_iterable(zip_longest(*shares))):
                writer.put(finished, prepared)
            late = made


_AHEAD = 8
"""Images that may wait for their place, or are handed over at a time, where they are made one by one."""
