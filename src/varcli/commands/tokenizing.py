"""What `reconstruct` and `tokens` share: a tokenizer from a checkpoint, and images in its size."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from varcli import __version__
from varcli.checkpoints.registry import resolve_checkpoint

if TYPE_CHECKING:
    from varcli.images.editable import SourceImage
    from varcli.images.provenance import EditProvenance, Pixels
    from varcli.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Loaded:
    """A tokenizer ready for work, and what images made with it say."""

    tokenizer: "Tokenizer"
    checkpoint: str
    """As the user named it."""
    sha256: str
    """Of the checkpoint."""
    tokenizer_sha256: str
    device: str

    def made(self, words: tuple[str, ...], source: str, number: int, inputs: tuple[str, ...]) -> "EditProvenance":
        """Return the provenance of an image, nothing of which is drawn.

        Args:
            words: the command with what it names.
            source: name of what it was made from, for the file.
            number: which of the images it is.
            inputs: sha256 of the files.
        """
        from varcli.images.provenance import EditProvenance

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
    from varcli.acceleration.devices import pick_device
    from varcli.checkpoints.store import load_tokenizer, read_metadata

    where = pick_device(device)
    path = resolve_checkpoint(checkpoint, progress=not quiet)
    metadata, _ = read_metadata(path)
    tokenizer = load_tokenizer(path).to(where)
    return Loaded(tokenizer, checkpoint, metadata["sha256"], metadata["tokenizer_sha256"], str(where))


def stem(name: str) -> str:
    """Return what to call an image's results: its file's name without folders and ending."""
    return "image" if name == "-" else Path(name).stem


def fitted(given: "SourceImage", pixels: int) -> "Pixels":
    """Return the largest square in the middle of an image, in the tokenizer's size."""
    from PIL import Image

    from varcli.images.decode import square_crop

    return square_crop(Image.fromarray(given.pixels()), pixels)
