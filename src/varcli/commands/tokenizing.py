"""What `reconstruct` and `tokens` share: a tokenizer from a checkpoint, and pictures in its size."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from varcli import __version__
from varcli.checkpoints.registry import find

if TYPE_CHECKING:
    from varcli.data.images import EditProvenance, Pixels
    from varcli.data.photographs import Photograph
    from varcli.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Loaded:
    """A tokenizer ready for work, and what pictures made with it say."""

    tokenizer: "Tokenizer"
    checkpoint: str
    """As the user named it."""
    sha256: str
    """Of the checkpoint."""
    tokenizer_sha256: str
    device: str

    def made(self, words: tuple[str, ...], source: str, number: int, inputs: tuple[str, ...]) -> "EditProvenance":
        """Return the provenance of a picture, nothing of which is drawn.

        Args:
            words: the command with what it names.
            source: name of what it was made from, for the file.
            number: which of the pictures it is.
            inputs: sha256 of the files.
        """
        from varcli.data.images import EditProvenance  # noqa: PLC0415 - Pillow

        return EditProvenance(
            checkpoint=self.checkpoint,
            checkpoint_sha256=self.sha256,
            class_id=None,
            class_name="none",
            seed=number,
            cfg=0,
            top_k=0,
            top_p=0,
            smooth=False,
            device=self.device,
            dtype="fp32",
            version=__version__,
            command=(*words, "--checkpoint", self.checkpoint, "--device", self.device),
            source=source,
            inputs=inputs,
        )


def load(checkpoint: str, device: str, quiet: bool) -> Loaded:
    """Return the tokenizer of a checkpoint, on a device, in float32."""
    from varcli.checkpoints.store import load_tokenizer, read_metadata  # noqa: PLC0415 - torch
    from varcli.sampling.devices import pick_device  # noqa: PLC0415 - torch

    where = pick_device(device)
    path = find(checkpoint, progress=not quiet)
    metadata, _ = read_metadata(path)
    tokenizer = load_tokenizer(path).to(where)
    return Loaded(tokenizer, checkpoint, metadata["sha256"], metadata["tokenizer_sha256"], str(where))


def stem(name: str) -> str:
    """Return what to call a picture's results: its file's name without folders and ending."""
    return "picture" if name == "-" else Path(name).stem


def fitted(given: "Photograph", pixels: int) -> "Pixels":
    """Return the largest square in the middle of a picture, in the tokenizer's size."""
    from PIL import Image  # noqa: PLC0415 - Pillow

    from varcli.data.datasets import square_crop  # noqa: PLC0415 - numpy

    return square_crop(Image.fromarray(given.pixels()), pixels)
