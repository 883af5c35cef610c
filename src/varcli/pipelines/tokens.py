"""The tokenizer alone: images to token maps, and token maps to images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from varcli import __version__
from varcli.checkpoints.safetensors_io import checkpoint_sha256
from varcli.checkpoints.token_files import load_tokens, save_tokens, token_maps
from varcli.config import SampleConfig
from varcli.errors import InputError
from varcli.files import write_atomically
from varcli.images.contact_sheet import contact_sheet, save_growth
from varcli.images.editable import SourceImage, read_source_image
from varcli.images.image import Image
from varcli.images.provenance import EditProvenance, png_bytes
from varcli.pipelines.edit import ImageInput, crop, read_input, stem, word
from varcli.pipelines.model import Model
from varcli.sampling import reconstruction
from varcli.sampling.sampler import Pixels

NOT_SAMPLED = SampleConfig(cfg=0, top_k=0, top_p=0)
"""Settings in the provenance of images that are decoded and not sampled."""


class ReadableImages:
    """Images that are read one after the other, each with its number; unreadable ones are skipped, and noted."""

    def __init__(self, images: Sequence[str], note: Callable[[str], None]) -> None:
        """Read a single image at once, so that no checkpoint is downloaded for an unreadable one."""
        self._images, self._note, self._failed = images, note, 0
        self._alone = read_source_image(images[0]) if len(images) == 1 else None

    def __iter__(self) -> Iterator[tuple[int, SourceImage]]:
        for number, image in enumerate(self._images):
            try:
                yield number, self._alone or read_source_image(image)
            except InputError as error:
                self._note(str(error))
                self._failed += 1

    def check(self) -> None:
        """Raise InputError, after all others are done, if an image was skipped."""
        if self._failed:
            raise InputError(f"{self._failed} of {len(self._images)} images cannot be used; the others are done")


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """An image before and after the tokenizer."""

    before: Pixels
    """(P, P, 3) uint8: the image, centre-cropped to a square and resized to the tokenizer's size."""
    after: Image
    psnr: float
    """In dB; infinite if nothing changed."""
    bits_per_pixel: float
    """Size of its tokens."""


def reconstruct(model: Model, image: ImageInput, number: int = 0, *, growth: Path | None = None) -> Reconstruction:
    """Encode and decode an image.

    Args:
        model: its tokenizer is used.
        image: an image of any size.
        number: which of several images it is, for its file name.
        growth: also write the reconstruction growing scale by scale, .png or .gif.

    Raises:
        InputError: the image cannot be read.
    """
    source = read_input(image)
    before = crop(model, source)
    tokens = reconstruction.encode(model.tokenizer, before[None])
    pixels = reconstruction.rebuilt(model.tokenizer, tokens)
    if growth:
        sides = model.tokenizer_config.sides
        frames = list(reconstruction.growth(model.tokenizer, tokens))
        labels = [
            f"{side} × {side}, {reconstruction.psnr(before, frame):.1f} dB"
            for side, frame in zip(sides, frames, strict=True)
        ]
        save_growth(growth, frames, labels)
    provenance = _provenance(model, ("reconstruct", word(image)), stem(image), number, (source.sha256,))
    return Reconstruction(
        before,
        Image(pixels, provenance),
        reconstruction.psnr(before, pixels),
        reconstruction.bits_per_pixel(model.tokenizer_config),
    )


def save_pairs(path: Path, pairs: Sequence[tuple[ImageInput, Reconstruction]]) -> None:
    """Write a contact sheet of images beside their reconstructions, .png."""
    labels = [text for image, pair in pairs for text in (stem(image), f"{pair.psnr:.2f} dB")]
    shown = [pixels for _, pair in pairs for pixels in (pair.before, pair.after.array)]
    write_atomically(path, png_bytes(contact_sheet(shown, labels)))


def encode(model: Model, image: ImageInput) -> list[Tensor]:
    """The token maps of an image, one per scale, (1, l) int64.

    Raises:
        InputError: the image cannot be read.
    """
    return reconstruction.encode(model.tokenizer, crop(model, read_input(image))[None])


def encode_to(model: Model, images: Iterable[ImageInput], path: Path, advance: Callable[[], None]) -> int:
    """Write the token maps of images as a token file, if there are any; return how many there are.

    The images are read one after the other, and `advance` is called after each.

    Raises:
        InputError: an image cannot be read.
        RunError: the file cannot be written.
    """
    tokens, names = [], []
    for image in images:
        source = read_input(image)
        tokens.append(reconstruction.encode(model.tokenizer, crop(model, source)[None]))
        names.append(stem(source))
        advance()
    if tokens:
        save_tokens(path, tokens, names, model.tokenizer_config, model.metadata["tokenizer_sha256"])
    return len(tokens)


def decode(
    model: Model,
    tokens: Sequence[Tensor],
    *,
    file: str = "-",
    names: Sequence[str] | None = None,
    inputs: tuple[str, ...] = (),
) -> Iterator[Image]:
    """Decode token maps.

    Args:
        model: its tokenizer is used.
        tokens: one map per scale, (B, l) or (B, side, side); the last scales may be missing.
        file: where they come from, for the provenance.
        names: of the B images, for their file names.
        inputs: sha256 of the file.

    Raises:
        InputError: these are no token maps of this tokenizer.
    """
    maps = [idx_Bl.to(model.device) for idx_Bl in token_maps(tokens, model.tokenizer_config)]
    names = names or [f"tokens_{i}" for i in range(len(maps[0]))]
    for number, name in enumerate(names):
        pixels = reconstruction.rebuilt(model.tokenizer, [idx_Bl[number : number + 1] for idx_Bl in maps])
        yield Image(pixels, _provenance(model, ("tokens", "decode", file), name, number, inputs))


def decode_file(model: Model, path: Path, file: str) -> tuple[int, Iterator[Image]]:
    """Read a token file, called `file` in its images' provenance; its number of images, and the images one by one.

    Raises:
        InputError: the file cannot be read, or holds no tokens of this shape.
        CheckpointError: another tokenizer made them.
    """
    name = "standard input" if file == "-" else file
    loaded = load_tokens(path, model.tokenizer_config, model.metadata["tokenizer_sha256"], name)
    maps = [idx_Bl.clone() for idx_Bl in loaded.maps]  # the file may go before they are decoded
    images = decode(model, maps, file=file, names=loaded.names, inputs=(checkpoint_sha256(path),))
    return len(loaded.names), images


def _provenance(
    model: Model, words: tuple[str, ...], source: str, number: int, inputs: tuple[str, ...]
) -> EditProvenance:
    """Provenance of an image that does not depend on a seed."""
    return EditProvenance(
        checkpoint=model.name,
        checkpoint_sha256=model.sha256,
        class_id=None,
        class_name="none",
        seed=number,
        settings=NOT_SAMPLED,
        device=str(model.device),
        dtype="fp32",
        version=__version__,
        command=(*words, "--checkpoint", model.name, "--device", str(model.device)),
        source=source,
        inputs=inputs,
    )
