"""What `inpaint`, `outpaint` and `edit` share: from a picture and a mask to pictures in their places."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varcli.checkpoints.registry import find
from varcli.commands.editing_tasks import Task
from varcli.commands.options import DEFAULT_PRESET
from varcli.commands.settings import hint, origin_of, settings
from varcli.config import SampleConfig
from varcli.data.classes import RANDOM, ClassEntry, ClassTable, parse_classes, random_class
from varcli.errors import UsageError
from varcli.reporting import note, progress, result

if TYPE_CHECKING:
    from varcli.data.images import EditProvenance, Pixels, Provenance
    from varcli.data.places import Output
    from varcli.sampling.editing import Edited


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """The options that all edits have."""

    class_name: str
    seed: int
    count: int
    best_of: int
    cfg: float | None
    top_k: int | None
    top_p: float | None
    smooth: bool
    paper: bool
    feather: int | None
    composite: bool
    checkpoint: str
    device: str
    dtype: str
    out: str | None
    grid: Path | None
    scales: Path | None
    as_json: bool
    quiet: bool

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Ask":
        """Return those of a command's options that all edits have."""
        return cls(**{field.name: given[field.name] for field in fields(cls)})

    def config(self) -> SampleConfig:
        """Return how to draw."""
        given = {"cfg": self.cfg, "top_k": self.top_k, "top_p": self.top_p, "smooth": self.smooth}
        return settings(self.checkpoint, DEFAULT_PRESET, **given)

    def seeds(self) -> range:
        """Return the seed of each picture's first candidate; the candidates' count up from it."""
        return range(self.seed, self.seed + self.count * self.best_of, self.best_of)

    def rule_words(self) -> tuple[str, ...]:
        """Return the options that say how an edit is put back."""
        feather = () if self.feather is None else ("--feather", str(self.feather))
        return (*feather, *["--no-composite"] * (not self.composite), *["--paper"] * self.paper)


def check_together(ask: Ask) -> None:
    """Find out whether the options go together and their files can be written, before any work is done.

    Raises:
        UsageError: they do not.
        RunError: a file cannot be written.
    """
    from varcli.data.outputs import check_file  # noqa: PLC0415 - Pillow

    if ask.out == "-" and ask.as_json:
        raise UsageError("json: with --out -; stdout can carry the pictures or the lines, not both")
    if ask.out and ask.out.lower().endswith((".npz", ".tar")):
        raise UsageError(f"out: {ask.out}; a .png file, a folder, or - for standard output")
    if ask.paper and (ask.feather is not None or not ask.composite):
        raise UsageError("paper: with --feather or --no-composite; the released rule puts nothing back")
    if ask.feather is not None and not ask.composite:
        raise UsageError("feather: with --no-composite; only what is put back has a seam")
    if ask.scales and ask.count != 1:
        raise UsageError(f"scales: {ask.count} pictures; exactly one")
    for option, path, endings in (("grid", ask.grid, (".png",)), ("scales", ask.scales, (".png", ".gif"))):
        if path:
            check_file(option, path, endings)


def run(task: Task, ask: Ask) -> None:
    """Make the edits that are asked for, put them in their places and say which those are."""
    from varcli.checkpoints.store import load_model  # noqa: PLC0415 - torch
    from varcli.data.outputs import open_output  # noqa: PLC0415 - Pillow
    from varcli.data.regions import count_regions, region_side  # noqa: PLC0415 - numpy
    from varcli.sampling.devices import pick_device, pick_dtype, place  # noqa: PLC0415 - torch
    from varcli.sampling.editing import EditConfig, Editor  # noqa: PLC0415 - torch

    config = ask.config()
    rule = EditConfig(feather=ask.feather, composite=ask.composite, paper=ask.paper)
    where = pick_device(ask.device)
    precision = pick_dtype(ask.dtype, where)
    model = load_model(find(ask.checkpoint, progress=not ask.quiet))
    origin = origin_of(ask.checkpoint, model.sha256, config, str(where), precision)
    side = region_side(task.mask, model.tokenizer.config.pixels, max(task.mask.shape) if ask.paper else task.side)
    entries = [one_class(ask.class_name, model.classes, seed) for seed in ask.seeds()]
    total = ask.count * ask.best_of * count_regions(task.mask, side)
    with open_output(ask.out, several=ask.count > 1) as output, progress("squares", total, ask.quiet) as advance:
        place(model.tokenizer, model.transformer, where, precision)
        editor = Editor(model.tokenizer, model.transformer, config, rule)
        results = Results(task, ask, output, origin)
        for entry, seed in zip(entries, ask.seeds(), strict=True):
            row = len(model.classes) if entry is None else model.classes.row(entry.id)
            candidates = [
                editor.edit(
                    *(task.photograph.seen(), task.mask, side, row, seed + i),
                    scored=ask.best_of > 1,
                    growing=ask.scales is not None,
                    advance=advance,
                )
                for i in range(ask.best_of)
            ]
            results.take(candidates, entry)
    results.finish()
    if task.photograph.shortened and not ask.quiet:
        note(f"{task.photograph.name} has colours of 16 bits; of those kept the upper 8 are")


def one_class(spec: str, table: ClassTable, seed: int) -> ClassEntry | None:
    """Return the class that a spec means, None for "no class"; `random` follows the seed.

    Raises:
        UsageError: it means none or several.
        InputError: the table lacks it.
    """
    entries = list(parse_classes([spec], table, (), hint()))
    if len(entries) != 1:
        raise UsageError(f"class: {spec}; exactly one, or none")
    return random_class(table, seed) if entries[0] is RANDOM else entries[0]


@dataclass(slots=True)
class Results:
    """Where finished edits go, and what is said of them."""

    task: Task
    ask: Ask
    output: "Output"
    origin: "Provenance"
    shown: list["Pixels"] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def take(self, candidates: Sequence["Edited"], entry: ClassEntry | None) -> None:
        """Put the best of the candidates in its place and say which that is."""
        from varcli.data.deep import in_8_bits  # noqa: PLC0415 - numpy
        from varcli.sampling.editing import best  # noqa: PLC0415 - torch

        edited = best(candidates) if len(candidates) > 1 else candidates[0]
        made = self._provenance(edited.seed, entry)
        image = self.task.photograph.replaced(edited.pixels, self.task.mask if self.task.shown else None)
        path = self.output.add(image, made)
        if self.ask.scales:
            self._grow(self.ask.scales, edited, made)
        if self.ask.as_json:
            result(
                json.dumps({"path": path and str(path)} | asdict(made) | _scores(edited, candidates), sort_keys=True)
            )
        elif path and not self.ask.quiet:
            result(str(path))
        if self.ask.grid:
            self.shown.append(in_8_bits(edited.pixels))
            self.labels.append(f"{made.class_name}, seed {made.seed}")

    def finish(self) -> None:
        """Make the contact sheet: what was to be filled, and the results."""
        if not self.ask.grid:
            return
        from varcli.data.images import png_bytes, write_atomically  # noqa: PLC0415 - Pillow
        from varcli.data.masks import marked  # noqa: PLC0415 - numpy
        from varcli.data.sheets import contact_sheet  # noqa: PLC0415 - numpy

        given = self.task.photograph.pixels()
        shown, labels = [marked(given, self.task.mask), *self.shown], ["to fill", *self.labels]
        write_atomically(self.ask.grid, png_bytes(contact_sheet(shown, labels)))

    def _provenance(self, seed: int, entry: ClassEntry | None) -> "EditProvenance":
        from varcli.data.images import EditProvenance, setting_words  # noqa: PLC0415 - Pillow

        made = replace(self.origin, seed=seed)
        if entry is not None:
            made = replace(made, class_id=entry.id, class_name=entry.name)
        command = (*self.task.words, *self.ask.rule_words(), *setting_words(made))
        return EditProvenance(**asdict(made), command=command, source=self.task.source, inputs=self.task.inputs)

    def _grow(self, path: Path, edited: "Edited", made: "EditProvenance") -> None:
        """Write the picture growing: scale by scale, or square by square as a strip of several squares."""
        from varcli.data.sheets import save_growing  # noqa: PLC0415 - numpy

        squares = len(edited.seams)
        step = len(edited.frames) // squares if squares > 1 and path.suffix.lower() == ".png" else 1
        frames = edited.frames[step - 1 :: step]
        save_growing(path, frames, [f"step {i + 1}" for i in range(len(frames))], made)


def _scores(edited: "Edited", candidates: Sequence["Edited"]) -> dict[str, Any]:
    """Return what was measured of an edit, and of those it was chosen from."""
    if len(candidates) == 1:
        return {"seam": edited.seam}
    each = [{"seed": one.seed, "seam": one.seam, "log_likelihood": one.log_likelihood} for one in candidates]
    return {"seam": edited.seam, "log_likelihood": edited.log_likelihood, "candidates": each}
