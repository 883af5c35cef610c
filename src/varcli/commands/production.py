"""How the pictures of `var sample` get made and told of: batch by batch, by one process or shared by several."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice, zip_longest
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varcli.commands.series import Picture
from varcli.errors import UsageError
from varcli.processes import Group
from varcli.reporting import result

if TYPE_CHECKING:
    from concurrent.futures import Future

    from varcli.data.images import Pixels, Provenance
    from varcli.data.places import Output
    from varcli.data.writing import Writer


Sampled = Callable[[Iterable[Picture]], "Iterator[tuple[Picture, Pixels]]"]
"""Makes pictures, in order."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A picture that was made, with its pixels where they are to be shown."""

    picture: Picture
    pixels: "Pixels | None"

    @property
    def made(self) -> "Provenance":
        """What its file says of it."""
        return self.picture.made


@dataclass(slots=True)
class Results:
    """Where finished pictures go, and what is said of them."""

    output: "Output"
    grid: Path | None
    as_json: bool
    quiet: bool
    advance: Callable[[], None]
    asked: int = 0
    made: int = 0
    shown: list[Finished] = field(default_factory=list)

    def missing(self, wanted: Iterable[Picture]) -> Iterator[Picture]:
        """Yield those pictures that an earlier run did not leave in the output."""
        for picture in wanted:
            self.asked += 1
            if self.grid:
                check_sheet(self.asked)  # how many lines stdin has nobody knew
            if self.output.has(picture.made):
                self.advance()
            else:
                yield picture

    def placed(self, finished: Finished, path: Path | None) -> None:
        """Say where a picture is, which has its place now."""
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
        """Make the contact sheet, and name the file that holds all pictures where there is one."""
        if self.grid and self.shown:
            from varcli.data.images import png_bytes, write_atomically  # noqa: PLC0415 - Pillow
            from varcli.data.sheets import contact_sheet  # noqa: PLC0415 - numpy

            labels = [f"{one.made.class_name}, seed {one.made.seed}" for one in self.shown]
            pixels = [one.pixels for one in self.shown if one.pixels is not None]
            write_atomically(self.grid, png_bytes(contact_sheet(pixels, labels)))
        if self.asked > 0 and self.made == 0:
            say(f"nothing left to do; {self.asked} of {self.asked} pictures were there")
        if unasked := self.output.unasked():
            say(f"{self.output.archive} also holds {unasked} pictures of an earlier run that were not asked for now")
        archive = self.output.archive
        if archive and archive.exists() and not self.quiet and not self.as_json:
            result(str(archive))


def check_sheet(count: int) -> None:
    """Find out whether so many pictures can be shown on a sheet.

    Raises:
        UsageError: they cannot.
    """
    from varcli.data.sheets import MOST_PICTURES  # noqa: PLC0415 - numpy

    if count > MOST_PICTURES:
        raise UsageError(f"grid: {count} pictures; at most {MOST_PICTURES}")


# --- making them -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Production:
    """Makes pictures and puts them into the open output, while the next ones are made."""

    sampled: Sampled
    """Makes the pictures."""
    results: Results
    """Where they go."""
    group: Group
    """The processes that share them."""
    batch_size: int
    """How many are made at a time."""

    def run(self, bursts: Iterable[Iterable[Picture]]) -> None:
        """Make all pictures of some bursts; each burst is in its place before the next is begun."""
        from varcli.data.writing import Writer  # noqa: PLC0415 - Pillow

        ahead = max(_AHEAD, 2 * self.batch_size)
        with Writer(self.results.output, self.results.placed, ahead) as writer:
            if self.group.count > 1:
                self._share(chain.from_iterable(bursts), writer)
                return
            for burst in bursts:
                for finished, prepared in self._made(self.results.missing(burst), writer):
                    writer.put(finished, prepared)
                writer.wait()

    def _made(self, wanted: Iterable[Picture], writer: "Writer[Finished]") -> Iterator[tuple[Finished, "Future[Any]"]]:
        """Yield pictures as they are made, on their way to being encoded."""
        for picture, pixels in self.sampled(wanted):
            finished = Finished(picture, pixels if self.results.grid else None)
            yield finished, writer.prepare(finished, pixels)

    def _share(self, wanted: Iterable[Picture], writer: "Writer[Finished]") -> None:
        """Make this process's share, and hand it over to the first process, a round at a time.

        That one puts all of them down in the order wanted, as if it had made them alone. What it takes was
        encoded while the next round was made.
        """
        missing = self.results.missing(wanted) if self.group.first else ()
        todo = self.group.broadcast(list(missing))
        size = self.group.broadcast(max(_AHEAD, self.batch_size))
        mine = self._made(self.group.share(todo), writer)
        late: list[tuple[Finished, Future[Any]]] = []
        for _ in range(ceil(len(todo) / (size * self.group.count)) + 1):
            made = list(islice(mine, size))
            shares = self.group.gather([(finished, prepared.result()) for finished, prepared in late])
            for finished, prepared in filter(None, chain.from_iterable(zip_longest(*shares))):
                writer.put(finished, prepared)
            late = made


_AHEAD = 8
"""Pictures that may wait for their place, or are handed over at a time, where they are made one by one."""
