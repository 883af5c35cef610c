"""Provenance of images: what determines one, in its PNG file and its file name.

Pixels are uint8 arrays, height × width × 3, as everywhere below the sampler.
"""

import json
import os
import re
import shlex
import subprocess
import unicodedata
from dataclasses import asdict, dataclass, fields, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from varcli.config import SampleConfig
from varcli.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from varcli.images.png16 import Levels

    Pixels = NDArray[np.uint8]
    PixelsOrRaster: TypeAlias = "Pixels | Raster"


KEYWORD = "varcli"
"""Of the PNG text chunk that holds the provenance."""


@dataclass(frozen=True, slots=True)
class Raster:
    """An image of any kind that PNGs hold."""

    levels: "Levels"
    """(height, width, channels): grey, grey and alpha, RGB or RGBA, of 8 or 16 bits."""
    info: dict[str, Any]
    """Its resolution and colour profile, `dpi` and `icc_profile`, where it has them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """All that determines an image: bit for bit on the machine that made it, unless it is `batched`."""

    checkpoint: str
    """Name or path as given."""
    checkpoint_sha256: str
    """Over its weights, configurations and class table, not its file's bytes: `sha256` of `var checkpoints show`."""
    class_id: int | None
    """None is "no class"."""
    class_name: str
    """For people; "none" for no class."""
    seed: int
    """Of this image alone."""
    settings: SampleConfig
    """How it was sampled."""
    device: str
    """What it was computed on, e.g. "cpu"."""
    dtype: str
    """What it was computed in, e.g. "fp32"; "int8" stands for `--quantize int8`."""
    version: str
    """Of varcli."""

    def to_dict(self) -> dict[str, Any]:
        """All facts by name, the settings among them."""
        facts = asdict(self)
        return facts | facts.pop("settings")

    def to_json(self) -> str:
        """One line of JSON with sorted keys."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @property
    def batched(self) -> bool:
        """Whether it was made among others, whose number changes the rounding: in 16 bits on a GPU."""
        return self.device != "cpu" and self.dtype != "fp32"

    def identity(self) -> "Provenance":
        """The same without where the checkpoint lay and what computed the image.

        Two of these are equal if the same image is meant, which is how `--resume` knows what is done; another
        device or version may still round differently.
        """
        return replace(self, checkpoint="", class_name="", device="", version="")


@dataclass(frozen=True, kw_only=True, slots=True)
class EditProvenance(Provenance):
    """All that determines an image made from another one."""

    command: tuple[str, ...]
    """The words after `var` that make it again, but for where to put it."""
    source: str
    """What it was made from, for its file's name."""
    inputs: tuple[str, ...]
    """sha256 of the files it was made from, in the order of the command."""

    @classmethod
    def of(
        cls, provenance: Provenance, *, command: tuple[str, ...], source: str, inputs: tuple[str, ...]
    ) -> "EditProvenance":
        """A sampled image's provenance with what it was made from."""
        sampled = {field.name: getattr(provenance, field.name) for field in fields(Provenance)}
        return cls(**sampled, command=command, source=source, inputs=inputs)


def provenance_from_json(text: str, name: str) -> Provenance:
    """Return the provenance that `Provenance.to_json` wrote; `name` is where it was found, for messages.

    Raises:
        InputError: the text is no provenance.
    """
    try:
        facts = dict(json.loads(text))
        if "draft" in facts:  # the name of `approximate` in early files
            facts["approximate"] = facts.pop("draft")
        facts |= {name: tuple(value) for name, value in facts.items() if isinstance(value, list)}
        names = {field.name for field in fields(SampleConfig)}
        settings = SampleConfig(**{name: facts[name] for name in names & facts.keys()})
        kind = EditProvenance if "command" in facts else Provenance
        return kind(settings=settings, **{f.name: facts[f.name] for f in fields(kind) if f.name != "settings"})
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"the provenance of {name} is damaged, or of another version of varcli") from error


def read_provenance(path: Path) -> Provenance:
    """What a PNG says about how it was made.

    Raises:
        InputError: the file is no image, or says nothing.
    """
    try:
        with Image.open(path) as image:
            image.load()  # text may stand behind the pixels
            text = dict(image.info)
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not an image: give a PNG that var sample wrote") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"the image {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if KEYWORD not in text:
        raise InputError(f"{path} has no provenance: give a PNG that var sample wrote")
    return provenance_from_json(str(text[KEYWORD]), str(path))


def reproduction_command(provenance: Provenance) -> str:
    """Return the command that makes an image again, quoted for this system's shell."""
    if isinstance(provenance, EditProvenance):
        words = ["var", *provenance.command]
    else:
        words = ["var", "sample", *setting_options(provenance)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def setting_options(provenance: Provenance) -> list[str]:
    """Options that stand for an image's class, seed and settings."""
    options: dict[str, Any] = {
        "class": "none" if provenance.class_id is None else provenance.class_id,
        "seed": provenance.seed,
        "checkpoint": provenance.checkpoint,
        **asdict(provenance.settings),
        "device": provenance.device,
        "quantize" if provenance.dtype == "int8" else "dtype": provenance.dtype,
    }
    words: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [flag] * value
        elif value != "":
            words += [flag, str(value)]
    return words


def png_bytes(pixels: "PixelsOrRaster", provenance: Provenance | None = None) -> bytes:
    """Return an image as a PNG file's content, with its provenance as text where it has one.

    A raster also keeps its bits, and its resolution and colour profile if its `info` has them.
    """
    text = PngInfo()
    if provenance is not None:
        text.add_text("Title", f"{provenance.class_name}, seed {provenance.seed}")
        text.add_text("Software", f"varcli {provenance.version}")
        text.add_text(KEYWORD, provenance.to_json())
    levels, info = (pixels.levels, pixels.info) if isinstance(pixels, Raster) else (pixels, {})
    if levels.itemsize > 1 and levels.shape[2] > 1:  # Pillow has no colours of 16 bits
        from varcli.images.png16 import deep_png_bytes

        return deep_png_bytes(levels, [chunk[:2] for chunk in text.chunks], info, _COMPRESSION)
    content = BytesIO()
    image = Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)
    image.save(content, "PNG", pnginfo=text, compress_level=_COMPRESSION, **info)
    return content.getvalue()


_COMPRESSION = 3
"""Of PNGs: twice as fast as zlib's default for files 4 % larger."""


def image_filename(provenance: Provenance) -> str:
    """Return the file name of an image, fit for every file system.

    It is made of class id, class name and seed; of an edit of the given image's name, command and seed.
    """
    if isinstance(provenance, EditProvenance):
        return f"{file_words(provenance.source) or 'image'}-{provenance.command[0]}-{provenance.seed}.png"
    class_id = "none" if provenance.class_id is None else str(provenance.class_id)
    short = file_words(provenance.class_name)
    return (
        "-".join([class_id, *([short] if short and provenance.class_id is not None else []), str(provenance.seed)])
        + ".png"
    )


def file_words(name: str) -> str:
    """Return a name as it stands in file names: letters, digits and underscores, none of them at an end."""
    words = re.sub(r"[^\w]+", "_", unicodedata.normalize("NFC", name)).strip("_")
    return words.encode()[:_LONGEST_NAME].decode(errors="ignore")


_LONGEST_NAME = 120
"""Bytes of a class name in a file name; file systems take 255 for the whole."""
