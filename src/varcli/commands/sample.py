"""`var sample`: classes in, pictures out."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from varcli.checkpoints.registry import find
from varcli.commands import options
from varcli.commands.settings import hint, origin_of, settings
from varcli.data.classes import RANDOM, ClassEntry, ClassTable, parse_classes, random_class
from varcli.errors import UsageError
from varcli.reporting import progress, result

if TYPE_CHECKING:
    from varcli.data.images import Pixels, Provenance
    from varcli.data.places import Output
    from varcli.sampling.batches import BatchSampler


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture to be made: what the sampler is asked for, and what the file will say of it."""

    row: int
    seed: int
    made: "Provenance"


def sample(  # noqa: PLR0917 - options are given by name
    classes: options.Classes,
    count: options.Count = 1,
    seed: options.Seed = 0,
    checkpoint: options.Checkpoint = options.DEFAULT_CHECKPOINT,
    cfg: options.Cfg = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    smooth: options.Smooth = False,
    preset: options.Preset = options.DEFAULT_PRESET,
    out: options.Out = None,
    grid: options.Grid = None,
    scales: options.Scales = None,
    batch_size: options.BatchSize = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    resume: options.Resume = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Make pictures of classes. The same class, seed and settings always give the same picture."""
    from varcli.checkpoints.store import load_model  # noqa: PLC0415 - torch
    from varcli.data.outputs import open_output  # noqa: PLC0415 - Pillow
    from varcli.sampling.batches import BatchSampler  # noqa: PLC0415 - torch
    from varcli.sampling.devices import pick_device, pick_dtype, place  # noqa: PLC0415 - torch

    _check_together(out=out, grid=grid, scales=scales, resume=resume, as_json=as_json)
    _check_places(out, grid, scales)
    config = settings(checkpoint, preset, cfg=cfg, top_k=top_k, top_p=top_p, smooth=smooth)
    where = pick_device(device)
    precision = pick_dtype(dtype, where)
    model = load_model(find(checkpoint, progress=not quiet))
    origin = origin_of(checkpoint, model.sha256, config, str(where), precision)
    wanted, total = _bursts(classes, Series(model.classes, count, seed, origin))
    _check_counts(grid, scales, total)
    with open_output(out, several=total != 1, resume=resume) as output, progress("pictures", total, quiet) as advance:
        place(model.tokenizer, model.transformer, where, precision)
        sampler = BatchSampler(model.tokenizer, model.transformer, config, batch_size)
        results = Results(output, grid, as_json, quiet, advance)
        for burst in wanted:
            for picture, pixels in _make(sampler, results.missing(burst), scales):
                results.take(picture, pixels)
    results.finish()


# --- what is wanted --------------------------------------------------------------------------------


def _bursts(specs: Sequence[str], series: "Series") -> tuple[Iterable[Iterable[Picture]], int | None]:
    """Return the pictures wanted, and how many.

    A burst may be made in batches; the next one is not looked at before it is out. What comes from
    stdin is a burst a class, so that each line is answered before the next is read, and its number is
    unknown (None).
    """
    entries = parse_classes(specs, series.table, sys.stdin, hint())
    if "-" in map(str.strip, specs):
        return map(series.pictures, entries), None
    known = list(entries)
    return [chain.from_iterable(map(series.pictures, known))], len(known) * series.count


@dataclass(frozen=True, slots=True)
class Series:
    """Hands out each class's pictures, `count` at a time; their seeds count up from `seed`."""

    table: ClassTable
    count: int
    seed: int
    origin: "Provenance"
    """What all of them have in common."""
    used: Counter[ClassEntry | None] = field(default_factory=Counter)

    def pictures(self, wanted: ClassEntry | None) -> Iterator[Picture]:
        """Yield the next pictures of a class, "no class" or one by chance."""
        first = self.seed + self.used[wanted]
        self.used[wanted] += self.count
        for number in range(first, first + self.count):
            entry = random_class(self.table, number) if wanted is RANDOM else wanted
            if entry is None:
                yield Picture(len(self.table), number, replace(self.origin, seed=number))
            else:
                made = replace(self.origin, class_id=entry.id, class_name=entry.name, seed=number)
                yield Picture(self.table.row(entry.id), number, made)


def _check_together(*, out: str | None, grid: Path | None, scales: Path | None, resume: bool, as_json: bool) -> None:
    if out == "-" and as_json:
        raise UsageError("json: with --out -; stdout can carry the pictures or the lines, not both")
    if resume and (grid or scales):
        raise UsageError("resume: with --grid or --scales; they show what this run makes, so one without the other")


def _check_places(out: str | None, grid: Path | None, scales: Path | None) -> None:
    """Find out whether all that is to be written can be, before anything is downloaded or made."""
    from varcli.data.outputs import check_file, check_output  # noqa: PLC0415 - Pillow

    check_output(out)
    if grid:
        check_file("grid", grid, (".png",))
    if scales:
        check_file("scales", scales, (".png", ".gif"))


def _check_counts(grid: Path | None, scales: Path | None, total: int | None) -> None:
    """Find out whether so many pictures can be shown on a sheet, or growing."""
    if grid and total:
        _check_sheet(total)
    if scales and total != 1:
        raise UsageError(f"scales: {total or 'any number of'} pictures; exactly one")


def _check_sheet(count: int) -> None:
    from varcli.data.sheets import MOST_PICTURES  # noqa: PLC0415 - numpy

    if count > MOST_PICTURES:
        raise UsageError(f"grid: {count} pictures; at most {MOST_PICTURES}")


# --- making them -----------------------------------------------------------------------------------


def _make(
    sampler: "BatchSampler", wanted: Iterable[Picture], scales: Path | None
) -> Iterator[tuple[Picture, "Pixels"]]:
    """Yield each picture when it is made, having shown how it grew where that is asked for."""
    if scales is None:
        yield from sampler.pictures(wanted)
        return
    from varcli.data.sheets import save_growing  # noqa: PLC0415 - numpy

    for picture in wanted:
        frames = list(sampler.growth(picture))
        labels = [f"{side} × {side}" for side in sampler.transformer.config.sides]
        save_growing(scales, frames, labels, picture.made)
        yield picture, frames[-1]


@dataclass(slots=True)
class Results:
    """Where finished pictures go, and what is said of them."""

    output: "Output"
    grid: Path | None
    as_json: bool
    quiet: bool
    advance: Callable[[], None]
    shown: list["Pixels"] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def missing(self, wanted: Iterable[Picture]) -> Iterator[Picture]:
        """Yield those pictures that an earlier run did not leave in the output."""
        for picture in wanted:
            if self.output.has(picture.made):
                self.advance()
            else:
                yield picture

    def take(self, picture: Picture, pixels: "Pixels") -> None:
        """Put a picture in its place and say which that is."""
        if self.grid:
            _check_sheet(len(self.shown) + 1)  # how many lines stdin has nobody knew
        path = self.output.add(pixels, picture.made)
        if self.as_json:
            where = path or self.output.archive
            result(json.dumps({"path": where and str(where)} | asdict(picture.made), sort_keys=True))
        elif path and not self.quiet:
            result(str(path))
        if self.grid:
            self.shown.append(pixels)
            self.labels.append(f"{picture.made.class_name}, seed {picture.seed}")
        self.advance()

    def finish(self) -> None:
        """Make the contact sheet, and name the file that holds all pictures where there is one."""
        if self.grid and self.shown:
            from varcli.data.images import png_bytes, write_atomically  # noqa: PLC0415 - Pillow
            from varcli.data.sheets import contact_sheet  # noqa: PLC0415 - numpy

            write_atomically(self.grid, png_bytes(contact_sheet(self.shown, self.labels)))
        archive = self.output.archive
        if archive and archive.exists() and not self.quiet and not self.as_json:
            result(str(archive))
