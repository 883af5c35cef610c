"""`varcli.evaluate`: measure images against a reference, and record all that the figures depend on."""

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from varcli import __version__
from varcli.acceleration.devices import pick_device
from varcli.checkpoints.registry import cache_folder, presets, registry
from varcli.classes import imagenet
from varcli.config import SampleConfig
from varcli.console import counted, progress
from varcli.distributed import ProcessGroup
from varcli.errors import CheckpointError, InputError, RunError, UsageError
from varcli.evaluation import comparability
from varcli.evaluation.extractors import EXTRACTORS, Extractor
from varcli.evaluation.feature_pass import FeaturePass, fingerprint
from varcli.evaluation.metrics import (
    METRICS,
    check_features,
    check_plan,
    check_read,
    check_reconstructed,
    compute_figures,
    needed_sums,
    protocol_of,
    scores,
)
from varcli.evaluation.reconstruction import Reconstructions
from varcli.evaluation.references import (
    Reference,
    find_reference,
    find_weights,
    holds_images,
    read_reference,
    references,
    save_reference,
)
from varcli.evaluation.results import ClassSpread, Origin, Published, ReferenceOrigin, Result
from varcli.evaluation.statistics import EvalPlan, Statistics
from varcli.files import check_writable, file_sha256
from varcli.images.dataset import ImageSet, open_images
from varcli.images.image import Image
from varcli.models.perceptual import LPIPS, load_lpips
from varcli.pipelines.eval_sources import EvalSource, ExistingImages, Reconstructed, Samples
from varcli.pipelines.model import Model
from varcli.pipelines.rejection import check_decision, check_one_by_one, open_classifier
from varcli.pipelines.requests import candidate_count, class_requests

DEFAULT_COUNT = 2_000
"""Number of images where neither a paper nor a reference gives one."""

MAX_CACHED_FEATURES = 10_000
"""Up to this number of images a reference's features are cached with its statistics, for KID, precision and recall."""

Source = Model | str | Path | Sequence[str | Path] | Iterable[Image | NDArray[np.uint8]]
"""What is measured: a model, paths of images, images, or arrays (height, width, 3)."""


def evaluate(
    source: Source,
    metrics: Sequence[str] | None = None,
    *,
    reference: str | None = None,
    tokenizer: bool = False,
    num_images: int | None = None,
    seed: int = 0,
    config: SampleConfig | None = None,
    best_of: float = 1,
    decide_at: int | None = None,
    classifier: str = "resnet101",
    batch_size: int | None = None,
    paths: Sequence[str | Path] = (),
    resize: int | None = None,
    skip_bad: bool = False,
    lines: Iterable[str] = (),
    features: str = "inception-v3-compat",
    weights: Path | None = None,
    lpips_weights: Path | None = None,
    device: str = "auto",
    save_stats: Path | None = None,
    save_images: str | None = None,
    thumbnails: bool = False,
    group: ProcessGroup | None = None,
    report: Callable[[Result], None] = lambda result: None,
    note: Callable[[str], None] = lambda line: None,
    quiet: bool = True,
) -> Result:
    """Measure images against a reference. When called again, an interrupted evaluation resumes.

    Args:
        source: a model, from which images are sampled; paths of folders, zips, .npz, .tar or image files; or images
            of one size, as `Model.sample` returns them or as arrays (height, width, 3) of uint8.
        metrics: some of "fid", "sfid", "is", "kid", "prc" and "agreement"; None is FID, where there are features, and,
            by Inception and of images that are no reconstructions, the inception score.
        reference: a name, a file of statistics, or images; None is the usual one.
        tokenizer: measure the model's tokenizer instead, on `paths` encoded and decoded.
        num_images: images to sample, the same number per class; None is 50 000, or as many as the reference has.
        seed: of each class's first image.
        config: settings of sampling; None is the model's preset for measuring.
        best_of: candidates per image that is measured, of which the classifier's favourites are kept.
        decide_at: after which scale it chooses, the coarsest being 1; only those kept are finished. None is after the
            last.
        classifier: as for `varcli.pipelines.rejection.open_classifier`.
        batch_size: images at a time on a GPU in 16 bits.
        paths: images for the tokenizer; none are those held out of a bundled model's training.
        resize: crop and resize images that exist, those of the reference among them, to this side, as ADM does.
        skip_bad: leave out images that cannot be read.
        lines: paths, where "-" is among the images.
        features: the extractor: "inception-v3-compat", "dinov2" or "efficientnet-lite0"; "none" measures a tokenizer's
            PSNR, SSIM and LPIPS alone.
        weights: file of the extractor's weights; None downloads them at the first use.
        lpips_weights: folder of LPIPS's weights.
        device: where features are computed; a model's own device where there is a model.
        save_stats: also write the images' statistics, .npz.
        save_images: also write the images sampled: a folder, .npz or .tar.
        thumbnails: keep some images in the result, for a report.
        group: the ranks that share the work; None is this process alone.
        report: called with the result, by the main rank, before the saved state of the run is deleted.
        note: takes remarks for the user.
        quiet: show no progress bar and no notes on references.

    Raises:
        VarError: a checkpoint, a reference, weights or images cannot be used, or a file cannot be written.
    """
    begun = time.monotonic()
    group = group or ProcessGroup()
    model = source if isinstance(source, Model) else None
    where = model.device if model else pick_device(device)
    shape = _extractor_class(features).shape
    if not shape.pool and not tokenizer:
        raise UsageError(f"--features {features} is for --tokenizer, of which PSNR, SSIM and LPIPS need no features")
    usual_metrics = ("fid", "is") if scores(shape) and not tokenizer else ("fid",) if shape.pool else ()
    chosen = tuple(metrics or usual_metrics)
    check_features(chosen, shape)
    if save_stats and "fid" not in chosen:
        raise UsageError("--save-stats needs --fid: it writes the statistics that FID is computed from")
    evaluator = Evaluator(features, weights, where, group, note, quiet)
    with tempfile.TemporaryDirectory() as folder:
        images: EvalSource
        target: Reference | None = None
        if model is None:
            given = _paths(source, Path(folder))
            images = ExistingImages(evaluator.images(given, resize, skip_bad, lines), [str(path) for path in given])
            usual = {known.pixels: name for name, known in references().items()}.get(images.side)
            target = evaluator.usual_reference(reference, usual, chosen, resize)
        elif tokenizer:
            check_reconstructed(chosen)
            rebuilt = _reconstructed(model, evaluator, paths, resize, skip_bad, lines, lpips_weights, note)
            images = rebuilt
            if reference:
                target = evaluator.reference(reference, needs=needed_sums(chosen), resize=resize)
            elif any(METRICS[name].reference or METRICS[name].of_reference for name in chosen):
                target = evaluator.reference_of(rebuilt.images, "the same images", needs=needed_sums(chosen))
        else:
            entry = registry().get(model.name)
            usual = entry.reference if entry else None
            name = reference or (usual if any(METRICS[name].of_reference for name in chosen) else None)
            target = evaluator.usual_reference(name, usual, chosen, resize)
            count = group.broadcast(num_images or _usual_count(model, target))
            images = samples(
                model,
                count,
                group,
                seed=seed,
                config=config,
                best_of=best_of,
                decide_at=decide_at,
                classifier=classifier,
                batch_size=batch_size,
                save_images=save_images,
                note=note,
            )
        scored = _imagenet_ids(images) if "labels" in needed_sums(chosen) else ()
        classes = len(images.classes) if shape.pool else 0
        plan = EvalPlan(count=len(images), metrics=chosen, classes=classes, scored=scored)
        if group.is_main:
            check_plan(plan, evaluator.extractor.shape, target)
        if thumbnails:
            images.gallery.open(len(images))
        measured, state = evaluator.measure(images, plan, "images", resumable=not tokenizer)
        result: Result | None = None
        if group.is_main:
            check_read(measured.statistics, target)
            seconds = measured.seconds | {"total": time.monotonic() - begun}
            result = _result(images, target, evaluator, measured.statistics, model, chosen, best_of, resize, seconds)
            if save_stats:
                evaluator.save_statistics(save_stats, measured.statistics, images.side)
            report(result)
            if state:
                state.unlink(missing_ok=True)
    shared = group.broadcast(result)
    assert shared is not None
    return shared


def compute_statistics(
    paths: Sequence[str | Path],
    out: Path,
    *,
    keep_features: bool = False,
    resize: int | None = None,
    skip_bad: bool = False,
    lines: Iterable[str] = (),
    features: str = "inception-v3-compat",
    weights: Path | None = None,
    device: str = "auto",
    group: ProcessGroup | None = None,
    note: Callable[[str], None] = lambda line: None,
    quiet: bool = True,
) -> list[str]:
    """Write statistics of images, against which others can be measured; returns warnings.

    Args:
        paths: folders, zips, .npz, .tar or image files.
        out: the .npz to write.
        keep_features: keep each image's features, for KID, precision and recall.
        resize: crop and resize images to this side, as ADM does.
        skip_bad: leave out images that cannot be read.
        lines: paths, where "-" is among the images.
        features: the extractor: "inception-v3-compat", "dinov2" or "efficientnet-lite0".
        weights: file of the extractor's weights; None downloads them at the first use.
        device: where features are computed.
        group: the ranks that share the work.
        note: takes remarks for the user.
        quiet: show no progress bar.

    Raises:
        VarError: images or weights cannot be used, or the file cannot be written.
    """
    group = group or ProcessGroup()
    check_features(("fid",), _extractor_class(features).shape)
    evaluator = Evaluator(features, weights, pick_device(device), group, note, quiet)
    images = evaluator.images(paths, resize, skip_bad, lines)
    needs = frozenset({"table"}) if keep_features else frozenset()
    if evaluator.extractor.shape.spatial:
        needs |= {"spatial"}
    evaluator.write_statistics(images, needs, out, "images")
    return list(comparability.skipped(images.skipped))


def _extractor_class(name: str) -> type[Any]:
    """The class of a feature extractor, by name.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in EXTRACTORS:
        raise UsageError(f"--features must be one of {', '.join(sorted(EXTRACTORS))} (got {name})")
    return EXTRACTORS[name]


def _imagenet_ids(images: EvalSource) -> tuple[int, ...]:
    """ImageNet's id of each class of the images.

    Raises:
        InputError: their classes are not known, or not ImageNet's.
    """
    entries = images.classes.entries
    if not any(label >= 0 for label in images.labels):
        raise InputError("--agreement needs images whose classes are known, such as folders named by class")
    if foreign := [entry.name for entry in entries if entry not in imagenet().entries]:
        raise InputError(f"--agreement needs ImageNet's classes (got {foreign[0]})")
    return tuple(entry.id for entry in entries)


# --- measuring -------------------------------------------------------------------------------------


class Evaluator:
    """Measures images with one network, on any number of ranks, and reads or makes references."""

    def __init__(
        self,
        features: str,
        weights: Path | None,
        device: torch.device,
        group: ProcessGroup,
        note: Callable[[str], None],
        quiet: bool,
    ) -> None:
        self.features, self.weights, self.device = features, weights, device
        self.group, self.note, self.quiet = group, note, quiet

    @cached_property
    def extractor(self) -> Extractor:
        """The network; not loaded or downloaded before the images have been opened, for what is wrong with these.

        Raises:
            UsageError: there is none of this name.
            CheckpointError: its weights are not available, or are of another network.
        """
        kind = _extractor_class(self.features)
        weights = find_weights(self.features, self.weights, not self.quiet) if kind.downloaded else self.weights
        extractor: Extractor = kind(weights, self.device)
        return extractor

    def measure(
        self, source: EvalSource, plan: EvalPlan, title: str, resumable: bool = True
    ) -> tuple[FeaturePass, Path | None]:
        """Measure all images; return the pass, and the file from which a killed run resumes.

        To be called by all ranks; the main one has the statistics.

        Raises:
            VarError: images are not available, or the file cannot be written.
        """
        decided = {name: value for name, value in asdict(plan).items() if name != "scored" or value}
        decided |= source.identity()
        identity = fingerprint(version=__version__, extractor=self.extractor.sha256, **decided)
        path = cache_folder() / "measurements" / f"{identity[:16]}.safetensors" if resumable else None
        measured = FeaturePass(plan, self.extractor.shape, identity, path, self.group)
        path = measured.path
        for line in source.images.account if isinstance(source, ExistingImages) else ():
            self.note(f"data: {line}")
        done = measured.statistics.count
        if measured.notice:
            self.note(measured.notice)
        if done:
            self.note(f"{title}: resuming after {done} of {plan.count}")
        resumed = bool(self.group.broadcast(done))
        with source.ready(resumed), progress(title, plan.count, self.quiet) as advance:
            advance(done)
            try:
                measured.run(source.watched, self.extractor, advance, source.unit)
            except KeyboardInterrupt:
                if path:
                    count = counted(measured.statistics.count, "image")
                    self.note(f"stopped after {count}; the same command resumes from there")
                raise
        source.join(self.group)
        return measured, path

    def images(
        self, paths: Sequence[str | Path], resize: int | None, skip_bad: bool, lines: Iterable[str] = ()
    ) -> ImageSet:
        """Open existing images; paths on stdin are read by the main rank, for all ranks."""
        listed = "-" in map(str, paths)
        names = self.group.broadcast(list(lines) if listed and self.group.is_main else [])
        return open_images(paths, resize=resize, skip_bad=skip_bad, lines=names)

    # --- references --------------------------------------------------------------------------------

    def usual_reference(
        self, name: str | None, usual: str | None, chosen: Sequence[str], resize: int | None
    ) -> Reference | None:
        """The reference that was named, or the usual one; None where no metric needs one.

        Raises:
            UsageError: there is none.
        """
        needing = [metric for metric in chosen if METRICS[metric].reference]
        if not needing and not (name and any(METRICS[metric].of_reference for metric in chosen)):
            return None
        name = name or usual
        if name is None:
            raise UsageError(
                f"no reference is known for these images: give --reference, one of {', '.join(references())}, "
                "a file of statistics, or images"
            )
        return self.reference(name, needs=needed_sums(needing), resize=resize)

    def reference(self, name: str, needs: frozenset[str], resize: int | None) -> Reference | None:
        """Open what to measure against; what takes long to compute is cached. The main rank has it.

        To be called by all ranks.

        Args:
            name: a reference known by name, a file of statistics, or a path of images.
            needs: what the metrics are computed from, see `Metric.needs`.
            resize: side to which images of a path are cropped and resized.

        Raises:
            VarError: there is no such reference, or it cannot be used.
        """
        path = self.group.broadcast(find_reference(name, progress=not self.quiet) if self.group.is_main else None)
        assert path is not None
        if self.group.broadcast(holds_images(path) if self.group.is_main else False):
            images = open_images([path], resize=resize)
            measured = self.reference_of(images, name, needs)
            return measured and replace(measured, sha256=_reference_sha256(name, path, images), path=None)
        read = read_reference(path, name) if self.group.is_main else None
        if read:
            read.check_extractor(self.extractor.name, self.extractor.sha256, self.extractor.shape)
        lacks_table = "table" in needs and read is not None and read.pool is None and read.path is not None
        if not self.group.broadcast(lacks_table):
            return read
        batch = self.reference_of(open_images([path]), name, frozenset({"table"}))  # ADM's: images of some
        return read and batch and replace(read, pool=batch.pool)

    def reference_of(self, images: ImageSet, name: str, needs: frozenset[str]) -> Reference | None:
        """Images as a reference: measured once, then read from the cache; as `reference` does."""
        if len(images) <= MAX_CACHED_FEATURES:
            needs |= {"table"}
        decided = {"pictures": images.fingerprint(), "features": "table" in needs}
        if "spatial" in needs:
            decided["spatial"] = True
        if self.extractor.shape.imagenet:
            decided["agreement"] = True
        identity = fingerprint(version=__version__, extractor=self.extractor.sha256, **decided)
        path = cache_folder() / "references" / f"{identity[:16]}.npz"
        if self.group.broadcast(path.is_file()):
            return read_reference(path, name) if self.group.is_main else None
        with tempfile.TemporaryDirectory() as folder:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                check_writable(path)
                self.note(f"measuring the reference {name} first, once: {counted(len(images), 'image')}")
            except (OSError, RunError) as error:
                path = Path(folder) / path.name
                self.note(f"measuring the reference {name} first, without keeping it: {error}")
            self.write_statistics(images, needs, path, "reference")
            return read_reference(path, name) if self.group.is_main else None

    def write_statistics(self, images: ImageSet, needs: frozenset[str], path: Path, title: str) -> None:
        """Measure images and write their statistics as a reference: moments, and what else is needed."""
        metrics = ("fid", *(name for need, name in (("table", "kid"), ("spatial", "sfid")) if need in needs))
        source = ExistingImages(images, [])
        scored: tuple[int, ...] = ()
        if self.extractor.shape.imagenet:
            with suppress(InputError):  # classes are not known, or are not ImageNet's
                scored = _imagenet_ids(source)
                metrics += ("agreement",)
        plan = EvalPlan(count=len(images), metrics=metrics, scored=scored)
        measured, state = self.measure(source, plan, title)
        if self.group.is_main:
            self.save_statistics(path, measured.statistics, images.side)
            if state:
                state.unlink(missing_ok=True)
        self.group.barrier()

    def figures(self, found: Statistics, reference: Reference | None) -> dict[str, float]:
        """All figures of statistics by the names that they have with this network."""
        figures = compute_figures(found, reference)
        return {_renamed(name, self.extractor.figure): value for name, value in figures.items()}

    def save_statistics(self, path: Path, found: Statistics, side: int) -> None:
        """Write statistics of images of a size as a reference file."""
        save_reference(
            path,
            found.moments(),
            pixels=side,
            extractor=self.extractor.sha256,
            pool=found.pool.numpy() if found.plan.keeps_table else None,
            spatial=found.spatial_moments() if "spatial" in found.plan.needs else None,
            agreement=found.agreement() if "labels" in found.plan.needs else None,
        )


def _reference_sha256(name: str, path: Path, images: ImageSet) -> str:
    """What identifies a reference of images: the hash of its file, or of a folder's content."""
    known = references().get(name)
    if known and known.sha256:
        return known.sha256
    return file_sha256(path) if path.is_file() else images.fingerprint()


# --- what is measured ------------------------------------------------------------------------------


def _paths(source: Any, folder: Path) -> list[str | Path]:
    """Paths of existing images; those in memory are written to a file in `folder`.

    Raises:
        InputError: those in memory are not uint8 of one size.
    """
    if isinstance(source, str | Path):
        return [source]
    given = list(source)
    if not given or isinstance(given[0], str | Path):
        return given
    arrays = [np.asarray(image.pil.convert("RGB") if isinstance(image, Image) else image) for image in given]
    for array in arrays:
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise InputError(f"images must be uint8 (height, width, 3) (got {array.dtype} {array.shape})")
        if array.shape != arrays[0].shape:
            raise InputError(f"images must have one size (got {arrays[0].shape[:2]} and {array.shape[:2]})")
    np.savez(folder / "images.npz", arr_0=np.stack(arrays))
    return [folder / "images.npz"]


def samples(
    model: Model,
    count: int,
    group: ProcessGroup,
    *,
    seed: int = 0,
    config: SampleConfig | None = None,
    best_of: float = 1,
    decide_at: int | None = None,
    classifier: str = "resnet101",
    batch_size: int | None = None,
    save_images: str | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Samples:
    """Images of a model's classes to measure, the same number of each; arguments and errors as for `evaluate`."""
    check_decision(decide_at, best_of, len(model.tokenizer_config.sides))
    config = config or model.settings("metrics")
    common = model.provenance(config, device=model.device.type if group.world_size > 1 else None)
    each, more = divmod(count, len(model.classes))
    kept = {label: each + (label < more) for label in range(len(model.classes)) if each or label < more}
    candidates = {
        label: next(class_requests([entry], candidate_count(kept[label], best_of), seed, model.classes, common))
        for label, entry in enumerate(model.classes.entries)
        if label in kept
    }
    sampler = model.sampler(config, batch_size, note)
    if decide_at is not None:
        check_one_by_one(sampler)
    return Samples(
        sampler=sampler,
        classes=model.classes,
        candidates=candidates,
        kept=kept,
        preset=presets(model.name)["metrics"],
        classifier=open_classifier(classifier, model, note) if best_of > 1 else None,
        decide_at=decide_at,
        save_images=save_images,
    )


def _usual_count(model: Model, reference: Reference | None) -> int:
    """Default number of images to sample: the paper's, else as many as the reference has."""
    entry = registry().get(model.name)
    if entry and entry.fid:
        return comparability.PUBLISHED_IMAGES
    return min(comparability.PUBLISHED_IMAGES, reference.count or DEFAULT_COUNT) if reference else DEFAULT_COUNT


def _reconstructed(
    model: Model,
    evaluator: Evaluator,
    paths: Sequence[str | Path],
    resize: int | None,
    skip_bad: bool,
    lines: Iterable[str],
    lpips_weights: Path | None,
    note: Callable[[str], None],
) -> Reconstructed:
    side = model.tokenizer_config.pixels
    if not paths:
        entry = registry().get(model.name)
        known = references().get(entry.reference or "") if entry else None
        if known is None or not known.bundled:
            raise UsageError(
                "--tokenizer needs images that the tokenizer was not trained on, such as ImageNet's validation set"
            )
        paths = [known.path]
    images = evaluator.images(paths, resize, skip_bad, lines)
    if images.side != side:
        raise InputError(f"the tokenizer takes images of {side} pixels per side (got {images.side}): --resize {side}")
    config = model.tokenizer_config
    distance = _lpips(lpips_weights, model.device, note)
    losses = Reconstructions(config.codebook_size, len(config.sides), distance, model.device)
    facts = {"name": model.name, "sha256": model.metadata["tokenizer_sha256"], "device": str(model.device)}
    return Reconstructed(images, [str(path) for path in paths], model.tokenizer, losses, facts | {"dtype": "fp32"})


def _lpips(folder: Path | None, device: torch.device, note: Callable[[str], None]) -> LPIPS | None:
    """LPIPS, None where its weights are missing; a folder that the user named must have them."""
    try:
        return load_lpips(folder or Path(torch.hub.get_dir()) / "checkpoints").to(device)
    except CheckpointError as error:
        if folder:
            raise
        note(f"without LPIPS, as {error}")
        return None


# --- the result ------------------------------------------------------------------------------------


def _result(
    source: EvalSource,
    reference: Reference | None,
    evaluator: Evaluator,
    found: Statistics,
    model: Model | None,
    chosen: Sequence[str],
    best_of: float,
    resize: int | None,
    seconds: dict[str, float],
) -> Result:
    """The figures, with all that they depend on."""
    sampled = source if isinstance(source, Samples) else None
    entry = registry().get(model.name) if model else None

    figures: dict[str, Any] = evaluator.figures(found, reference)
    if isinstance(source, Reconstructed):
        prefixes = {figure: metric.reconstruction_prefix for metric in METRICS.values() for figure in metric.figures}
        figures = {f"{prefixes.get(name, 'r')}{name}": value for name, value in figures.items()}
        figures |= source.reconstructions.figures()

    bias = next((value for name, value in figures.items() if name.endswith("_bias")), None)
    warnings = list(comparability.few_images(found.count, bias)) if chosen else []
    warnings += source.warnings()
    if reference:
        warnings += comparability.other_size(source.side, reference.pixels)
        warnings += comparability.small_reference(reference.count)
        if sampled and entry and entry.fid:
            warnings += comparability.other_reference(reference.name, entry.reference or "")

    protocol = protocol_of(chosen)
    if sampled and sampled.classifier:
        protocol |= {"best_of": best_of, "classifier": sampled.classifier.name}
        if sampled.decide_at is not None:
            protocol["decide_at"] = sampled.decide_at
    protocol |= {"pixels": source.side, "resize": resize}

    published = None
    if sampled and entry and entry.fid is not None:
        band, fid = entry.fid_band, figures.get("fid")
        inside = band[0] <= round(fid, 2) <= band[1] if band and fid is not None and not warnings else None
        published = Published(fid=entry.fid, inception_score=entry.inception_score, band=band, inside=inside)

    spreads = None
    if found.plan.classes:
        entries = source.classes.entries
        spreads = [
            ClassSpread(id=entries[label].id, name=entries[label].name, n=count, spread=spread)
            for label, (count, spread) in found.spreads().items()
        ]

    origin = None
    if reference:
        origin = ReferenceOrigin(
            name=reference.name, sha256=reference.sha256, n=reference.count, pixels=reference.pixels
        )
    return Result(
        version=__version__,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        what=source.what,
        checkpoint=source.checkpoint,
        source=source.source,
        n=found.count,
        classes=len({label for label in source.labels if label >= 0}) or None,
        reference=origin,
        extractor=Origin(name=evaluator.extractor.name, sha256=evaluator.extractor.sha256),
        protocol=protocol,
        metrics=figures,
        published=published,
        per_class=spreads,
        warnings=warnings,
        seconds=seconds,
        images=source.gallery.images(),
    )


def _renamed(name: str, figure: str) -> str:
    """The name of a Fréchet distance's figure by another extractor: fid_infinity is fd_dinov2_infinity."""
    return figure + name.removeprefix("fid") if name == "fid" or name.startswith("fid_") else name
