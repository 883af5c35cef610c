"""The options of `var eval`, and what goes together among them. No torch here."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from varcli.distributed import launched
from varcli.errors import UsageError


@dataclass(frozen=True, slots=True)
class Ask:
    """The options of `var eval`."""

    paths: list[str] | None
    fid: bool
    inception_score: bool
    kid: bool
    prc: bool
    num: int | None
    reference: str | None
    tokenizer: bool
    checkpoint: str
    seed: int
    settings: dict[str, Any]
    preset: str
    best_of: float
    classifier: str
    resize: int | None
    skip_bad: bool
    inception: Path | None
    lpips_weights: Path | None
    save_stats: Path | None
    save_images: str | None
    out: Path | None
    batch_size: int | None
    device: str
    dtype: str
    quantize: str | None
    nproc: int
    quiet: bool

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Ask":
        """Return a command's options."""
        return cls(**{field.name: given[field.name] for field in fields(cls)})

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is measured, by the names of `evaluation.statistics.METRICS`."""
        asked = {"fid": self.fid, "is": self.inception_score, "kid": self.kid, "prc": self.prc}
        chosen = tuple(name for name, wanted in asked.items() if wanted)
        return chosen or (("fid",) if self.tokenizer else ("fid", "is"))

    @property
    def made(self) -> bool:
        """Whether images are made, and not there already."""
        return not (self.paths or self.tokenizer)


def check(ask: Ask) -> None:
    """Find out whether the options go together and results can be written.

    Raises:
        VarError: they do not, or cannot.
    """
    _check_together(ask)
    _check_places(ask)


def _check_together(ask: Ask) -> None:
    only_made = {"num-images": ask.num, "save-images": ask.save_images, **ask.settings}
    only_made["best-of"] = ask.best_of if ask.best_of > 1 else None
    for name, value in only_made.items():
        if value is not None and not ask.made:
            raise UsageError(f"--{name.replace('_', '-')} is for images to be sampled, not for images that exist")
    if ask.resize and ask.made:
        raise UsageError("resize: without images; those that are made have their size")
    if ask.tokenizer and (ask.inception_score or ask.kid or ask.prc):
        raise UsageError("tokenizer: with --is, --kid or --prc; it is measured by FID, PSNR, SSIM and LPIPS")
    if ask.save_stats and "fid" not in ask.metrics:
        raise UsageError("save-stats: without --fid; statistics are what FID is of")


def _check_places(ask: Ask) -> None:
    from varcli.outputs.open import check_file, check_sink, find_sink
    from varcli.outputs.sinks import StreamSink

    if ask.save_images:
        check_sink(ask.save_images)
        place = find_sink(ask.save_images, several=True)
        if isinstance(place, StreamSink):
            raise UsageError(f"save-images: {ask.save_images}; a folder, .npz or .tar: the result goes to stdout")
        if place.archive and (ask.nproc > 1 or launched()):
            raise UsageError(f"save-images: {ask.save_images} with several processes; a folder")
    for option, path, ending in (("out", ask.out, ".json"), ("save-stats", ask.save_stats, ".npz")):
        if path:
            check_file(option, path, (ending,))
