"""From the options of `var eval` to what is measured, and what it is measured against."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from varcli.checkpoints.registry import presets, registry, resolve_checkpoint
from varcli.checkpoints.store import load_tokenizer, read_metadata
from varcli.commands.eval_ask import Ask
from varcli.commands.eval_subjects import Given, Rebuilt, Samples, Subject
from varcli.commands.measuring import Bench
from varcli.config import SampleConfig
from varcli.console import note, notes
from varcli.errors import CheckpointError, InputError, UsageError
from varcli.evaluation.classifier import Classifier
from varcli.evaluation.comparability import PAPER
from varcli.evaluation.reconstruction import Reconstructions
from varcli.evaluation.references import Reference, references
from varcli.models.lpips import LPIPS
from varcli.pipelines.model import load
from varcli.pipelines.requests import candidate_count, class_requests

SMALL = 2_000
"""Images where neither a paper nor a reference says how many."""


def opened(ask: Ask, bench: Bench, device: torch.device) -> tuple[Subject, Reference | None]:
    """Return what is measured, and against what, where a metric asks for it; the latter to the first process.

    Raises:
        VarError: the checkpoint, the images or the reference cannot be used.
    """
    if ask.tokenizer:
        rebuilt = _rebuilt(ask, bench, device)
        if ask.reference:
            return rebuilt, bench.reference(ask.reference, features=False, resize=ask.resize)
        return rebuilt, bench.reference_of(rebuilt.images, "the same images", features=False)
    if ask.made:
        config = _settings(ask)
        entry = registry().get(ask.checkpoint)
        reference = _reference(ask, bench, entry.reference if entry else None)
        number = bench.group.broadcast(ask.num or _usual_number(ask.checkpoint, reference))
        return _samples(ask, bench, device, config, number), reference
    paths = ask.paths or []
    given = Given(bench.images(paths, ask.resize, ask.skip_bad), paths)
    sides = {known.pixels: name for name, known in references().items()}
    return given, _reference(ask, bench, sides.get(given.side))


def _reference(ask: Ask, bench: Bench, usual: str | None) -> Reference | None:
    """Return the reference that was named, or the usual one; none where no metric asks for one."""
    against = {"fid", "kid", "prc"} & set(ask.metrics)
    if not against:
        return None
    name = ask.reference or usual
    if name is None:
        raise UsageError(
            f"reference: none is known for this; --reference with {', '.join(references())}, statistics or images"
        )
    return bench.reference(name, features=bool(against - {"fid"}), resize=ask.resize)


def _settings(ask: Ask) -> SampleConfig:
    return replace(presets(ask.checkpoint)[ask.preset], **ask.settings)


def _rebuilt(ask: Ask, bench: Bench, device: torch.device) -> Rebuilt:
    path = resolve_checkpoint(ask.checkpoint, progress=not bench.quiet)
    tokenizer, (metadata, _) = load_tokenizer(path).to(device), read_metadata(path)
    paths: Sequence[str | Path] = ask.paths or _held_out(ask)
    images = bench.images(paths, ask.resize, ask.skip_bad)
    config = tokenizer.config
    if images.side != config.pixels:
        raise InputError(
            f"images: {images.side} pixels a side, the tokenizer takes {config.pixels}; --resize {config.pixels}"
        )
    distance = _distance(ask.lpips_weights, device, bench.quiet)
    losses = Reconstructions(config.codebook_size, len(config.sides), distance, device)
    made = {"name": ask.checkpoint, "sha256": metadata["tokenizer_sha256"], "device": str(device), "dtype": "fp32"}
    return Rebuilt(images, [str(path) for path in paths], tokenizer, losses, made)


def _held_out(ask: Ask) -> list[Path]:
    """Return where the images lie that a checkpoint's training never saw, for one that has them at hand."""
    entry = registry().get(ask.checkpoint)
    known = references().get(entry.reference or "") if entry else None
    if known is None or not known.bundled:
        raise UsageError("tokenizer: without images; name some it was not trained on, such as ImageNet's validation")
    return [known.path]


def _distance(folder: Path | None, device: torch.device, quiet: bool) -> LPIPS | None:
    """Return LPIPS where its weights are there; an asked-for folder must have them."""
    try:
        return LPIPS(folder or Path(torch.hub.get_dir()) / "checkpoints").to(device)
    except CheckpointError as error:
        if folder:
            raise
        if not quiet:
            note(f"without LPIPS, as {error}".replace(", or train with --lpips 0", ""))
        return None


def _samples(ask: Ask, bench: Bench, device: torch.device, config: SampleConfig, number: int) -> Samples:
    model = load(ask.checkpoint, device=str(device), dtype=ask.dtype, quantize=ask.quantize, progress=not bench.quiet)
    sampler = model.sampler(config, ask.batch_size, notes(bench.quiet))
    common = model.provenance(config, device=device.type if bench.group.world_size > 1 else None)
    kept = _balanced(number, len(model.classes))
    candidates = {
        label: next(
            class_requests(
                [model.classes.entries[label]], candidate_count(count, ask.best_of), ask.seed, model.classes, common
            )
        )
        for label, count in kept.items()
    }
    classifier = Classifier(ask.classifier, model.classes, device) if ask.best_of > 1 else None
    return Samples(
        sampler=sampler,
        classes=model.classes,
        candidates=candidates,
        kept=kept,
        preset=presets(ask.checkpoint)["metrics"],
        classifier=classifier,
        save_images=ask.save_images,
    )


def _usual_number(checkpoint: str, reference: Reference | None) -> int:
    """Return how many images to make where nobody says: the paper's, else as many as the reference has."""
    entry = registry().get(checkpoint)
    if entry and entry.fid:
        return PAPER
    return min(PAPER, reference.count or SMALL) if reference else SMALL


def _balanced(count: int, classes: int) -> dict[int, int]:
    """Return how many images of each class make `count`: equally many, the first ones one more if need be."""
    each, more = divmod(count, classes)
    return {row: each + (row < more) for row in range(classes) if each or row < more}
