"""What every command that runs a model makes of its options. No torch here."""

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from varcli import __version__
from varcli.checkpoints.registry import presets, registry
from varcli.classes import imagenet
from varcli.config import SampleConfig

if TYPE_CHECKING:
    from varcli.images.provenance import Provenance


def settings(checkpoint: str, preset: str, **given: Any) -> SampleConfig:
    """Return the checkpoint's preset with those settings replaced that were given."""
    return replace(presets(checkpoint)[preset], **{name: value for name, value in given.items() if value is not None})


def origin_of(checkpoint: str, sha256: str, config: SampleConfig, device: str, dtype: str) -> "Provenance":
    """Return what all images of a run have in common."""
    from varcli.images.provenance import Provenance

    return Provenance(
        checkpoint=checkpoint,
        checkpoint_sha256=sha256,
        class_id=None,
        class_name="none",
        seed=0,
        **asdict(config),
        device=device,
        dtype=dtype,
        version=__version__,
    )


def hint() -> str:
    """Return which checkpoint knows all of ImageNet's classes."""
    name = next(entry.name for entry in registry().values() if entry.classes == len(imagenet()))
    return f"{name} knows all {len(imagenet())}: --checkpoint {name}"
