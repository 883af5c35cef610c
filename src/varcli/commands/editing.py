"""What `inpaint`, `outpaint` and `edit` share: from an image and a mask to images in their places."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varcli.checkpoints.registry import resolve_checkpoint
from varcli.classes import RANDOM, ClassEntry, ClassTable, parse_classes, random_class
from varcli.commands.editing_tasks import Task
from varcli.commands.options import DEFAULT_PRESET
from varcli.commands.settings import hint, origin_of, settings
from varcli.config import SampleConfig
from varcli.console import note, progress, result
from varcli.errors import UsageError

if TYPE_CHECKING:
    from varcli.images.provenance import EditProvenance, Pixels, Provenance
    from varcli.outputs.sinks import Sink
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
        """Return the seed of each image's first candidate; the candidates' count up from it."""
        return range(self.seed, self.seed + self.count * self.best_of, self.best_of)

    def rule_words(self) -> tuple[str, ...]:
        """Return the options that say how an edit is put back."""
        feather = () if self.feather is None else ("--feather", str(self.feather))
        return (*feather, *["--no-composite"] * (not self.composite), *["--released-rule"] * self.paper)


def check_together(ask: Ask) -> None:
    """Find out whether the options go together and their files can be written, before any work is done.

    Raises:
        UsageError: they do not.
        RunError: a file cannot be written.
    """
    from varcli.outputs.open import check_file

    if ask.out == "-" and ask.as_json:
        raise UsageError("json: with --out -; stdout can carry the images or the lines, not both")
    if ask.out and ask.out.lower().endswith((".npz", ".tar")):
        raise UsageError(f"out: {ask.out}; a .png file, a folder, or - for standard output")
    if ask.paper and (ask.feather is not None or not ask.composite):
        raise UsageError("paper: with --feather or --no-composite; the released rule puts nothing back")
    if ask.feather is not None and not ask.composite:
        raise UsageError("feather: with --no-composite; only what is put back has a seam")
    if ask.scales and ask.count != 1:
        raise UsageError(f"scales: {ask.count} images; exactly one")
    for option, path, endings in (("grid", ask.grid, (".png",)), ("scales", ask.scales, (".png", ".gif"))):
        if path:
            check_file(option, path, endings)


def run(task: Task, ask: Ask) -> None:
    """Make the edits that are asked for, put them in their places and say which those are."""
    from varcli.acceleration.devices import pick_device, pick_dtype, prepare
    from varcli.checkpoints.store import load_model
    from varcli.images.tiling import count_tiles, tile_side
    from varcli.outputs.open import open_sink
    from varcli.sampling.editing import EditConfig, Editor

    config = ask.config()
    rule = EditConfig(feather=ask.feather, composite=ask.composite, paper=ask.paper)
    where = pick_device(ask.device)
    precision = pick_dtype(ask.dtype, where)
    model = load_model(resolve_checkpoint(ask.checkpoint, progress=not ask.quiet))
    origin = origin_of(ask.checkpoint, model.sha256, config, str(where), precision)
    side = tile_side(task.mask, model.tokenizer.config.pixels, max(task.mask.shape) if ask.paper else task.side)
    entries = [one_class(ask.class_name, model.classes, seed) for seed in ask.seeds()]
    total = ask.count * ask.best_of * count_tiles(task.mask, side)
    with open_sink(ask.out, several=ask.count > 1) as output, progress("squares", total, ask.quiet) as advance:
        prepare(model.tokenizer, model.transformer, where, precision)
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
    output: "Sink"
    origin: "Provenance"
    shown: list["Pixels"] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def take(self, candidates: Sequence["Edited"], entry: ClassEntry | None) -> None:
        """Put the best of the candidates in its place and say which that is."""
        from varcli.images.png16 import to_8_bits
        from varcli.sampling.editing import best

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
            self.shown.append(to_8_bits(edited.pixels))
            self.labels.append(f"{made.class_name}, seed {made.seed}")

    def finish(self) -> None:
        """Make the contact sheet: what was to be filled, and the results."""
        if not self.ask.grid:
            return
        from varcli.files import write_atomically
        from varcli.images.contact_sheet import contact_sheet
        from varcli.images.masks import marked
        from varcli.images.provenance import png_bytes

        given = self.task.photograph.pixels()
        shown, labels = [marked(given, self.task.mask), *self.shown], ["to fill", *self.labels]
        write_atomically(self.ask.grid, png_bytes(contact_sheet(shown, labels)))

    def _provenance(self, seed: int, entry: ClassEntry | None) -> "EditProvenance":
        from varcli.images.provenance import EditProvenance, setting_options

        made = replace(self.origin, seed=seed)
        if entry is not None:
            made = replace(made, class_id=entry.id, class_name=entry.name)
        command = (*self.task.words, *self.ask.rule_words(), *setting_options(made))
        return EditProvenance(**asdict(made), command=command, source=self.task.source, inputs=self.task.inputs)

    def _grow(self, path: Path, edited: "Edited", made: "EditProvenance") -> None:
        """Write the image growing: scale by scale, or square by square as a strip of several squares."""
        from varcli.images.contact_sheet import save_growth

        squares = len(edited.seams)
        step = len(edited.frames) // squares if squares > 1 and path.suffix.lower() == ".png" else 1
        frames = edited.frames[step - 1 :: step]
        save_growth(path, frames, [f"step {i + 1}" for i in range(len(frames))], made)


def _scores(edited: "Edited", candidates: Sequence["Edited"]) -> dict[str, Any]:
    """Return what was measured of an edit, and of those it was chosen from."""
    if len(candidates) == 1:
        return {"seam": edited.seam}
    each = [{"seed": one.seed, "seam": one.seam, "log_likelihood": one.log_likelihood} for one in candidates]
    return {"seam": edited.seam, "log_likelihood": edited.log_likelihood, "candidates": each}
