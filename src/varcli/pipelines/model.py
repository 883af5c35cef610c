"""A model ready to sample, edit and measure: what `varcli.load` returns and every command uses."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from varcli import __version__
from varcli.acceleration.devices import pick_device, pick_dtype, precision_note
from varcli.acceleration.dispatch import prepare
from varcli.checkpoints.registry import presets, registry, replaceable, resolve_checkpoint
from varcli.checkpoints.store import (
    Checkpoint,
    check_registered,
    load_model,
    load_tokenizer,
    read_config,
    read_metadata,
)
from varcli.classes import ClassEntry, ClassTable, imagenet, parse_classes
from varcli.config import SampleConfig, TokenizerConfig
from varcli.errors import CheckpointError, ConfigError, UsageError
from varcli.images.image import Image
from varcli.images.provenance import Provenance
from varcli.pipelines.requests import SampleRequest, class_requests, request
from varcli.sampling.batching import BatchSampler
from varcli.sampling.likelihood import CANDIDATES

if TYPE_CHECKING:
    from varcli.models.tokenizer import Tokenizer
    from varcli.pipelines.edit import EditTask, ImageInput
    from varcli.pipelines.likelihood import ClassScore, Score
    from varcli.sampling.editing import EditConfig

ClassName = str | int | None
"""A class as users name it: index, name, or None for "no class"."""


def load(
    checkpoint: str | Path = "tiny64",
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    progress: bool = True,
) -> "Model":
    """Load a model by name or file; a released checkpoint is downloaded at its first use.

    Args:
        checkpoint: a name of `var checkpoints list`, or a .safetensors file.
        device: auto, cpu, cuda, cuda:1 or mps.
        dtype: auto, fp32, bf16 or fp16; auto is 16 bits where the device computes faster in them.
        quantize: "int8" for 8-bit weights and activations.
        progress: show a bar while downloading.

    Raises:
        UsageError: this machine has no such device or precision.
        CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    where = pick_device(device)
    precision = pick_precision(dtype, quantize, where)
    path = resolve_checkpoint(str(checkpoint), progress=progress)
    return Model(str(checkpoint), path, where, precision, chosen=dtype == "auto", progress=progress)


def pick_precision(dtype: str, quantize: str | None, device: torch.device) -> str:
    """The precision of a model on a device: fp32, bf16, fp16 or int8.

    Raises:
        UsageError: two precisions are given, or the device does not have the one that is.
    """
    if quantize and dtype != "auto":
        raise UsageError(f"--quantize {quantize} sets the precision, so leave --dtype out (got --dtype {dtype})")
    return quantize or pick_dtype(dtype, device)


class Model:
    """A checkpoint on a device. Weights are read when they are first needed."""

    def __init__(
        self,
        name: str,
        path: Path,
        device: torch.device,
        dtype: str,
        *,
        chosen: bool = False,
        progress: bool = True,
    ) -> None:
        self.name = name
        """Name or path as given."""
        self.path = path
        self.device = device
        self.dtype = dtype
        """Precision of the transformer and the decoder: fp32, bf16, fp16 or int8."""
        with replaceable(name):
            self.metadata, _ = read_metadata(path)
            check_registered(name, path, self.metadata)
        self.precision_note = precision_note(dtype, device) if chosen and dtype != "int8" else None
        """A note that images depend on the batch in the chosen precision; None where not, or if the user chose it."""
        self.progress = progress
        """Whether a download shows a bar."""
        self._checkpoint: Checkpoint | None = None
        self._refiners: dict[str, Model] = {}

    @property
    def sha256(self) -> str:
        """Hash over weights, configurations and class table."""
        return self.metadata["sha256"]

    @cached_property
    def classes(self) -> ClassTable:
        """The classes the model knows.

        Raises:
            CheckpointError: the checkpoint is a tokenizer alone.
        """
        if "classes" not in self.metadata:
            raise CheckpointError(f"{self.path} is a tokenizer without a transformer, and a model is needed")
        return ClassTable.from_json(self.metadata["classes"])

    @cached_property
    def tokenizer_config(self) -> TokenizerConfig:
        """Shape of the tokenizer: image size, sides of the token maps, codebook size."""
        return read_config(self.path, self.metadata, TokenizerConfig, "tokenizer_config")

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """The tokenizer in float32, for encoding and decoding."""
        with replaceable(self.name):
            tokenizer = load_tokenizer(self.path)
        self._check_unchanged()
        return tokenizer.to(self.device)

    def load_weights(self, config: SampleConfig | None = None) -> None:
        """Read tokenizer and transformer now, so that a damaged file is found early.

        Args:
            config: settings, of which the refiner is read as well.

        Raises:
            CheckpointError: the file is damaged, was replaced meanwhile, or holds a tokenizer alone.
        """
        if config is not None and (refiner := self.refiner(config)):
            refiner.load_weights()
        if self._checkpoint is None:
            with replaceable(self.name):
                checkpoint = load_model(self.path)
            self._check_unchanged()
            self._checkpoint = checkpoint

    def _check_unchanged(self) -> None:
        """Raise CheckpointError if the file no longer has the hash that images will record."""
        if read_metadata(self.path)[0] != self.metadata:
            raise CheckpointError(f"the checkpoint {self.path} was replaced by another one meanwhile; start again")

    @cached_property
    def prepared(self) -> Checkpoint:
        """Tokenizer and transformer in the model's precision, made fast for its device."""
        self.load_weights()
        assert self._checkpoint is not None
        prepare(self._checkpoint.tokenizer, self._checkpoint.transformer, self.device, self.dtype)
        return self._checkpoint

    # --- sampling ----------------------------------------------------------------------------------

    def settings(self, preset: str = "looks", **changes: Any) -> SampleConfig:
        """The checkpoint's preset with some settings replaced.

        Args:
            preset: "looks", or "metrics" as published figures were measured.
            changes: fields of `SampleConfig`; None keeps the preset's value.

        Raises:
            TypeError: there is no such setting.
            ConfigError: a value makes no sense, or there is no such preset.
            UsageError: the model does not have the scales to guide, or those that the refiner should sample.
            CheckpointError: the refiner cannot be used with this model.
        """
        given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
        if "refiner" in given:
            given["refiner"] = str(given["refiner"])  # a path too
        known = list(SampleConfig.__dataclass_fields__)
        for name in given.keys() - known:
            close = get_close_matches(name, known, n=1) or known
            raise TypeError(f"there is no sampling setting {name}; there is {', '.join(close)}")
        starts = presets(self.name)
        if preset not in starts:
            raise ConfigError(f"--preset must be {' or '.join(starts)} (got {preset})")
        config = replace(starts[preset], **given)
        scales = len(self.tokenizer_config.sides)
        if config.guided_scales.start >= scales:
            raise UsageError(
                f"--cfg-scales must begin at a scale of the model, 1 to {scales} (got {config.cfg_scales})"
            )
        self.refiner(config)
        return config

    def refiner(self, config: SampleConfig) -> "Model | None":
        """The model that samples the fine scales with these settings; None where one model samples all.

        Raises:
            UsageError: the model does not have the first scale that the refiner should sample.
            CheckpointError: there is no such checkpoint, or its tokenizer or classes differ from the model's.
        """
        if not config.refiner:
            return None
        scales = len(self.tokenizer_config.sides)
        if config.refine_from > scales:
            raise UsageError(
                f"--refine-from must be a scale of the model, between 2 and {scales} (got {config.refine_from})"
            )
        if config.refiner not in self._refiners:
            path = resolve_checkpoint(config.refiner, progress=self.progress)
            refiner = Model(config.refiner, path, self.device, self.dtype, progress=self.progress)
            for key in ("tokenizer_sha256", "tokenizer_config", "classes"):
                if refiner.metadata.get(key) != self.metadata.get(key):
                    what = "other classes" if key == "classes" else "another tokenizer"
                    raise CheckpointError(
                        f"--refiner must have the tokenizer and the classes of {self.name} ({refiner.name} has {what})"
                    )
            self._refiners[config.refiner] = refiner
        return self._refiners[config.refiner]

    def sampler(
        self, config: SampleConfig, batch_size: int | None = None, note: Callable[[str], None] = lambda line: None
    ) -> BatchSampler:
        """A sampler with these settings; `batch_size` None means as many images at a time as memory holds."""
        models, refiner = self.prepared, self.refiner(config)
        fine = refiner.prepared.transformer if refiner else None
        return BatchSampler(models.tokenizer, models.transformer, config, batch_size, note, refiner=fine)

    def provenance(self, config: SampleConfig, *, device: str | None = None) -> Provenance:
        """The provenance that all images of these settings share; `device` is the name to record."""
        refiner = self.refiner(config)
        return Provenance(
            checkpoint=self.name,
            checkpoint_sha256=self.sha256,
            class_id=None,
            class_name="none",
            seed=0,
            settings=config,
            device=device or str(self.device),
            dtype=self.dtype,
            version=__version__,
            refiner_sha256=refiner.sha256 if refiner else "",
        )

    def one_class(self, name: ClassName, note: Callable[[str], None] = lambda line: None) -> ClassEntry | None:
        """The one class that a name or index means; None is "no class".

        If only a part of a name is given, `note` gets a remark that says which class it is.

        Raises:
            UsageError: it means several classes.
            InputError: the model does not know it.
        """
        entries = list(parse_classes([_spec(name)], self.classes, (), checkpoint_hint(), note))
        if len(entries) != 1:
            raise UsageError(f"--class takes exactly one class here, or none (got {name})")
        return entries[0]

    def sample(
        self,
        classes: ClassName | Sequence[ClassName],
        *,
        count: int = 1,
        seed: int = 0,
        preset: str = "looks",
        batch_size: int | None = None,
        **settings: Any,
    ) -> list[Image]:
        """Sample images of classes. The same class, seed and settings always give the same image.

        Args:
            classes: index, name, "all", "random", a list of these, or None for an unconditional image.
            count: images per class.
            seed: of each class's first image; the next ones count up from it.
            preset: "looks" or "metrics"; `settings` override it.
            batch_size: images at a time on a GPU in 16 bits; always 1 elsewhere.
            settings: cfg, top_k, top_p, refiner, refine_from and others: see `SampleConfig`.

        Returns:
            `count` images per class, class after class.

        Raises:
            InputError: a class is unknown.
            ConfigError: the count, the seed or a setting makes no sense.
        """
        names = [classes] if classes is None or isinstance(classes, str | int) else list(classes)
        entries = parse_classes([_spec(name) for name in names], self.classes, (), checkpoint_hint())
        config = self.settings(preset, **settings)
        requests = class_requests(entries, count, seed, self.classes, self.provenance(config))
        return list(self._images(chain.from_iterable(requests), config, batch_size))

    def stream(
        self,
        requests: Iterable[tuple[ClassName, int]],
        *,
        preset: str = "looks",
        batch_size: int | None = None,
        **settings: Any,
    ) -> Iterator[Image]:
        """Sample images lazily, reading one batch of requests ahead: memory stays flat however many there are.

        Args:
            requests: pairs of a class (index, name or None) and a seed.
            preset: as for `sample`, like the rest.
            batch_size: images at a time on a GPU in 16 bits.
            settings: fields of `SampleConfig`.
        """
        config = self.settings(preset, **settings)
        common = self.provenance(config)
        wanted = (request(self.one_class(name), seed, self.classes, common) for name, seed in requests)
        return self._images(wanted, config, batch_size)

    def grow(self, label: ClassName, *, seed: int = 0, preset: str = "looks", **settings: Any) -> Iterator[Image]:
        """Sample one image and yield it after each scale, coarse to fine.

        The last one is the image that `sample` returns; those before it carry its provenance.

        Args:
            label: class: index, name, or None.
            seed: of the image.
            preset: as for `sample`, like the rest.
            settings: fields of `SampleConfig`.

        Source: paper, figure 4.
        """
        config = self.settings(preset, **settings)
        wanted = request(self.one_class(label), seed, self.classes, self.provenance(config))
        return (Image(pixels, wanted.provenance) for pixels in self.sampler(config).growth(wanted))

    def _images(
        self, requests: Iterable[SampleRequest], config: SampleConfig, batch_size: int | None
    ) -> Iterator[Image]:
        for wanted, pixels in self.sampler(config, batch_size).images(requests):
            yield Image(pixels.copy(), wanted.provenance)  # a view would keep its whole batch in memory

    # --- editing -----------------------------------------------------------------------------------

    def inpaint(
        self,
        image: "ImageInput",
        mask: "ImageInput | None" = None,
        *,
        label: ClassName = None,
        box: str | Sequence[int] | None = None,
        alpha: bool = False,
        fit_mask: bool = False,
        seed: int = 0,
        best_of: int = 1,
        decide_at: int | None = None,
        feather: int | None = None,
        composite: bool = True,
        released_rule: bool = False,
        preset: str = "looks",
        **settings: Any,
    ) -> Image:
        """Fill a hole in an image so that it goes with the rest.

        Args:
            image: a file, Pillow's image or an array (height, width[, channels]) of uint8, of any size.
            mask: of the same size, white (or True) where to fill.
            label: class to paint: index, name, or None.
            box: instead of a mask, (left, top, right, bottom) in pixels.
            alpha: instead, fill where the mask, or without one the image, is transparent.
            fit_mask: resize a mask of another size.
            seed: of the first candidate.
            best_of: candidates; the one of best seam and likelihood is returned.
            decide_at: after which scale it is chosen, the coarsest being 1; None is after the last.
            feather: pixels outside the hole over which new fades into old; None is half a token.
            composite: take kept pixels from the image, bit by bit.
            released_rule: follow the released demonstration exactly.
            preset: "looks" or "metrics"; `settings` override it.
            settings: fields of `SampleConfig`.

        Returns:
            The image in its own size, channels and bits.

        Raises:
            InputError: an image cannot be read, or the mask marks nothing or everything.
            UsageError: not exactly one of mask, box and alpha says where.
        """
        from varcli.pipelines.edit import fill_task

        task = fill_task("inpaint", image, mask, alpha=alpha, box=box, fit_mask=fit_mask)
        rule = _rule(feather, composite, released_rule)
        return self._edited(task, label, seed, best_of, decide_at, rule, preset, settings)

    def edit(
        self,
        image: "ImageInput",
        label: ClassName,
        mask: "ImageInput | None" = None,
        *,
        box: str | Sequence[int] | None = None,
        alpha: bool = False,
        fit_mask: bool = False,
        seed: int = 0,
        best_of: int = 1,
        decide_at: int | None = None,
        feather: int | None = None,
        composite: bool = True,
        released_rule: bool = False,
        strength: float | None = None,
        from_label: ClassName = None,
        preset: str = "looks",
        **settings: Any,
    ) -> Image:
        """Repaint a region of an image with an object of another class, or, given a strength, the whole image.

        Args:
            image: as for `inpaint`.
            label: class to paint.
            mask: where; none of mask, box and alpha for the whole image.
            box: instead of a mask.
            alpha: instead, fill where it is transparent.
            fit_mask: resize a mask of another size.
            seed: of the first candidate.
            best_of: candidates, for a region.
            decide_at: for a region.
            feather: for a region.
            composite: for a region.
            released_rule: for a region.
            strength: of an edit of the whole image: 0 is the reconstruction, 1 the sample of this class and seed.
            from_label: with a strength, the class that the image shows, if any.
            preset: "looks" or "metrics".
            settings: fields of `SampleConfig`.

        Returns:
            The image in its own size, channels and bits; a whole one centre-cropped to a square, in the model's size.

        Raises:
            InputError: an image cannot be read, a class is unknown, or the mask marks nothing or everything.
            UsageError: not exactly one of mask, box, alpha and strength is given.
        """
        from varcli.pipelines.edit import check_strength, edit_whole, fill_task

        of_region = {
            "a mask": mask is not None,
            "box": box is not None,
            "alpha": alpha,
            "fit_mask": fit_mask,
            "best_of": best_of > 1,
            "decide_at": decide_at is not None,
            "feather": feather is not None,
            "composite": not composite,
            "released_rule": released_rule,
        }
        check_strength(strength, from_label, of_region)
        if strength is not None:
            config = self.settings(preset, **settings)
            edited, _ = next(edit_whole(self, image, label, [seed], config, strength, from_label))
            return edited
        task = fill_task("edit", image, mask, alpha=alpha, box=box, fit_mask=fit_mask)
        rule = _rule(feather, composite, released_rule)
        return self._edited(task, label, seed, best_of, decide_at, rule, preset, settings)

    def outpaint(
        self,
        image: "ImageInput",
        *,
        pad: str | Sequence[int] | None = None,
        to: str | tuple[int, int] | None = None,
        label: ClassName = None,
        seed: int = 0,
        best_of: int = 1,
        decide_at: int | None = None,
        feather: int | None = None,
        composite: bool = True,
        released_rule: bool = False,
        preset: str = "looks",
        **settings: Any,
    ) -> Image:
        """Extend an image beyond its borders.

        Args:
            image: as for `inpaint`, like the rest.
            pad: pixels to add: (left, top, right, bottom).
            to: (width, height) to reach, the image in the middle.
            label: class to paint: index, name, or None.
            seed: of the first candidate.
            best_of: candidates; the one of best seam and likelihood is returned.
            decide_at: after which scale it is chosen, the coarsest being 1; None is after the last.
            feather: pixels inside the image over which new fades into old.
            composite: take kept pixels from the image, bit by bit.
            released_rule: follow the released demonstration exactly.
            preset: "looks" or "metrics".
            settings: fields of `SampleConfig`.

        Raises:
            InputError: the image cannot be read.
            UsageError: not exactly one of `pad` and `to` is given.
        """
        from varcli.pipelines.edit import outpaint_task

        task = outpaint_task(image, pad=pad, to=to)
        rule = _rule(feather, composite, released_rule)
        return self._edited(task, label, seed, best_of, decide_at, rule, preset, settings)

    def _edited(
        self,
        task: "EditTask",
        label: ClassName,
        seed: int,
        best_of: int,
        decide_at: int | None,
        rule: "EditConfig",
        preset: str,
        settings: dict[str, Any],
    ) -> Image:
        from varcli.pipelines.edit import edit_images

        config = self.settings(preset, **settings)
        return next(edit_images(self, task, label, [seed], config, rule, best_of=best_of, decide_at=decide_at)).image

    # --- likelihoods -------------------------------------------------------------------------------

    def score(self, image: "ImageInput", label: ClassName = None) -> "Score":
        """How likely an image is given a class.

        Args:
            image: a file, Pillow's image or an array (height, width[, channels]) of uint8; it is
                centre-cropped to a square and resized to the model's size.
            label: index, name, or None for "no class".

        Returns:
            Nats of all tokens, of each scale and of each token, bits per token and per pixel.

        Raises:
            InputError: the image cannot be read, or the class is unknown.
        """
        from varcli.pipelines.likelihood import score

        return score(self, image, label)

    def classify(
        self, image: "ImageInput", *, candidates: Sequence[int] = CANDIDATES, encodings: int = 1
    ) -> "list[ClassScore]":
        """Which classes explain an image best.

        Args:
            image: as for `score`.
            candidates: how many classes stay after the first scales with a tenth of the tokens, with three tenths, and
                so on; () scores all classes on all scales, which takes several times as long.
            encodings: average over so many encodings of the image, all but the first with noise on the features.

        Returns:
            All classes, the one first that gives the image the highest likelihood.

        Raises:
            InputError: the image cannot be read.
            ConfigError: the numbers of candidates do not fall.
        """
        from varcli.pipelines.likelihood import classify

        return classify(self, image, candidates, encodings)

    # --- the tokenizer alone -----------------------------------------------------------------------

    def reconstruct(self, image: "ImageInput") -> Image:
        """Encode and decode an image, centre-cropped to a square and resized to the tokenizer's P × P: (P, P, 3)."""
        from varcli.pipelines.tokens import reconstruct

        return reconstruct(self, image).after

    def encode(self, image: "ImageInput") -> "list[torch.Tensor]":
        """Encode an image, centre-cropped to a square and resized to the tokenizer's size.

        Returns:
            Token maps, one per scale, coarse to fine: (1, side²) int64.
        """
        from varcli.pipelines.tokens import encode

        return encode(self, image)

    def decode(self, tokens: "Sequence[torch.Tensor]") -> list[Image]:
        """Decode token maps, one per scale, coarse to fine.

        Args:
            tokens: (B, side²) or (B, side, side) each, as `encode` returns them; the last scales may be missing.

        Raises:
            InputError: these are no token maps of this tokenizer.
        """
        from varcli.pipelines.tokens import decode

        return list(decode(self, tokens))


def _rule(feather: int | None, composite: bool, released_rule: bool) -> "EditConfig":
    from varcli.sampling.editing import EditConfig

    return EditConfig(feather=feather, composite=composite, released_rule=released_rule)


def _spec(name: ClassName) -> str:
    return "none" if name is None else str(name)


def checkpoint_hint() -> str:
    """A hint at a checkpoint that knows all of ImageNet's classes."""
    name = next(entry.name for entry in registry().values() if entry.classes == len(imagenet()))
    return f"{name} knows all {len(imagenet())}: --checkpoint {name}"
