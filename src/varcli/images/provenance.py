"""Provenance of images: all that determines one, in its PNG file and its file name.

Pixels are uint8 arrays, height × width × 3, as everywhere below the sampler.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import unicodedata
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_type_hints

from PIL import Image

from varcli.config import SampleConfig
from varcli.errors import InputError
from varcli.images.decode import open_image, read_image_file
from varcli.images.metadata import chunks, metadata_chunks, png_texts, text_chunk, with_chunks

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
    """Its metadata, as `read_metadata` returns it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """All that determines an image: bit for bit on the same machine, unless it is `batched`."""

    checkpoint: str
    """Name or path as given."""
    checkpoint_sha256: str
    """Over its weights, configurations and class table, not its file's bytes: `sha256` of `var checkpoints show`."""
    class_id: int | None
    """None is "no class"."""
    class_name: str
    """For display; "none" for no class."""
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
    refiner_sha256: str = ""
    """As `checkpoint_sha256`, of the model that sampled the fine scales; "" where one model sampled all."""

    def to_dict(self) -> dict[str, Any]:
        """All facts by name, the settings among them."""
        facts = asdict(self)
        return facts | facts.pop("settings")

    def to_json(self) -> str:
        """One line of JSON with sorted keys."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @property
    def batched(self) -> bool:
        """Whether it was sampled in a batch, whose size changes the rounding: in 16 bits on a GPU."""
        return self.device != "cpu" and self.dtype != "fp32"

    def identity(self) -> "Provenance":
        """The same without the checkpoint's path, the device and the version.

        Two of these are equal if they mean the same image, by which `--resume` finds finished ones; another device or
        version may still round differently.
        """
        settings = replace(self.settings, refiner=self.refiner_sha256 or self.settings.refiner)
        return replace(self, checkpoint="", settings=settings, class_name="", device="", version="")

    @property
    def series(self) -> str:
        """What images of one series have in common, for people: weights, precision and settings."""
        known = self.identity()
        settings = [f"{name.replace('_', '-')} {value}" for name, value in known.settings.stated().items()]
        return ", ".join([f"checkpoint {known.checkpoint_sha256[:8]}", known.dtype, *settings])


@dataclass(frozen=True, kw_only=True, slots=True)
class EditProvenance(Provenance):
    """All that determines an image made from another one."""

    command: tuple[str, ...]
    """The arguments of `var` that reproduce it, without the output."""
    source: str
    """Name of its input, for its file name."""
    inputs: tuple[str, ...]
    """sha256 of the files it was made from, in the order of the command."""

    @classmethod
    def of(
        cls, provenance: Provenance, *, command: tuple[str, ...], source: str, inputs: tuple[str, ...]
    ) -> "EditProvenance":
        """A sampled image's provenance with what it was made from."""
        sampled = {field.name: getattr(provenance, field.name) for field in fields(Provenance)}
        return cls(**sampled, command=command, source=source, inputs=inputs)


def provenance_from_json(text: str | bytes, name: str) -> Provenance:
    """Return the provenance that `Provenance.to_json` wrote; `name` is where it was found, for messages.

    Raises:
        InputError: the text is no provenance.
    """
    try:
        facts = dict(json.loads(text))  # file names may hold lone surrogates, which `parse_json` refuses
        if "draft" in facts:  # the name of `approximate` in early files
            facts["approximate"] = facts.pop("draft")
        facts |= {name: tuple(value) for name, value in facts.items() if isinstance(value, list)}
        names = {field.name for field in fields(SampleConfig)}
        settings = SampleConfig(**{name: _typed(SampleConfig, name, facts[name]) for name in names & facts.keys()})
        kind = EditProvenance if "command" in facts else Provenance
        facts.setdefault("refiner_sha256", "")  # which early files do not mention
        own = {f.name: _typed(kind, f.name, facts[f.name]) for f in fields(kind) if f.name != "settings"}
        return kind(settings=settings, **own)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"the provenance of {name} is damaged, or of another version of varcli") from error


def _typed(kind: type, name: str, value: Any) -> Any:
    """Return the value of a field if it is of the field's type; files may hold anything.

    Raises:
        TypeError: it is not.
    """
    expected = get_type_hints(kind)[name]
    if expected == tuple[str, ...]:
        right = isinstance(value, tuple) and len(value) > 0 and all(isinstance(word, str) for word in value)
    elif expected is float:
        right = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        right = isinstance(value, expected) and (expected is bool or not isinstance(value, bool))
    if not right:
        raise TypeError(f"{name} is {value!r}")
    return value


def read_provenance(path: str | Path) -> Provenance:
    """Read the provenance of a PNG; "-" is one on standard input.

    Raises:
        InputError: the file is no image, or has no provenance.
    """
    name = "standard input" if str(path) == "-" else str(path)
    try:
        with nullcontext(sys.stdin.buffer) if str(path) == "-" else Path(path).open("rb") as file:
            content = read_image_file(file, name)
    except OSError as error:
        raise InputError(
            f"the image {name} cannot be read: {error.strerror or error}; give a PNG that var sample wrote"
        ) from error
    last = b""
    for chunk in chunks(content):
        last = chunk.name
    if last and last != b"IEND":
        raise InputError(f"the image {name} cannot be read: it is cut off")
    text = png_texts(content).get(KEYWORD)
    if text is not None:
        return provenance_from_json(text, name)
    try:
        open_image(content)
    except Exception as error:  # damaged files raise nearly anything
        raise InputError(f"{name} is not an image: give a PNG that var sample wrote") from error
    raise InputError(f"{name} has no provenance: give a PNG that var sample wrote")


def input_files(provenance: Provenance) -> dict[str, str]:
    """The files that an image was made from, as its command names them, and their sha256."""
    if not isinstance(provenance, EditProvenance):
        return {}
    words = provenance.command
    names = [*words[2 if words[0] == "tokens" else 1 :][:1]]
    if len(provenance.inputs) > 1:
        names += words[words.index("--mask") + 1 :][:1] if "--mask" in words else words[2:3]
    return dict(zip(names, provenance.inputs, strict=False))


def reproduction_command(provenance: Provenance) -> str:
    """Return the command that reproduces an image, quoted for this system's shell."""
    if isinstance(provenance, EditProvenance):
        words = ["var", *provenance.command]
    else:
        words = ["var", "sample", *setting_options(provenance)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def setting_options(provenance: Provenance) -> list[str]:
    """Options for an image's class, seed and settings."""
    options: dict[str, Any] = {
        "class": "none" if provenance.class_id is None else provenance.class_id,
        "seed": provenance.seed,
        "checkpoint": provenance.checkpoint,
        **provenance.settings.stated(),
        "device": provenance.device,
        "quantize" if provenance.dtype == "int8" else "dtype": provenance.dtype,
    }
    words: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [flag] * value
        else:
            words += [flag, str(value)]
    return words


def png_bytes(pixels: "PixelsOrRaster", provenance: Provenance | None = None) -> bytes:
    """Return an image as a PNG file's content, with its provenance as text where it has one.

    A raster keeps its bits and its metadata, except for an earlier provenance.
    """
    texts = {"Title": "", "Software": "", KEYWORD: ""}
    if provenance is not None:
        texts["Title"] = f"{provenance.class_name}, seed {provenance.seed}"
        texts["Software"] = f"varcli {provenance.version}"
        texts[KEYWORD] = provenance.to_json()
    levels, info = (pixels.levels, pixels.info) if isinstance(pixels, Raster) else (pixels, {})
    if levels.itemsize > 1 and levels.shape[2] > 1:  # Pillow has no colours of 16 bits
        from varcli.images.png16 import deep_png_bytes

        content = deep_png_bytes(levels, _COMPRESSION)
    else:
        file = BytesIO()
        image = Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)
        image.save(file, "PNG", compress_level=_COMPRESSION)
        content = file.getvalue()
    colours, others = metadata_chunks(info)
    own = [text_chunk(keyword, text) for keyword, text in texts.items() if text]
    kept = [(chunk.name, chunk.data) for keyword, chunk in info.get("texts", ()) if keyword not in texts]
    return with_chunks(content, [*colours, *own, *others, *kept])


_COMPRESSION = 3
"""Of PNGs: twice as fast as zlib's default for files 4 % larger."""


def image_filename(provenance: Provenance) -> str:
    """Return the file name of an image, fit for every file system.

    It has class id, class name and seed; for an edit the input's name, the command and the seed.
    """
    if isinstance(provenance, EditProvenance):
        return f"{file_words(provenance.source) or 'image'}-{provenance.command[0]}-{provenance.seed}.png"
    class_id = "none" if provenance.class_id is None else str(provenance.class_id)
    short = file_words(provenance.class_name)
    return (
        "-".join([class_id, *([short] if short and provenance.class_id is not None else []), str(provenance.seed)])
        + ".png"
    )


def own_path(path: Path, provenance: Provenance) -> Path:
    """Return a path for an image that does not overwrite another file.

    A file with this very image is replaced, since the command was run again. If another file has the name, digits of a
    hash of all that determines the image are appended.
    """
    digest = sha256(provenance.identity().to_json().encode()).hexdigest()
    names = [path, *(path.with_name(f"{path.stem}-{digits}{path.suffix}") for digits in (digest[:8], digest))]
    free = []
    for name in names:
        # Each name is checked once: another thread may be writing this very image.
        if not name.exists():
            free.append(name)
        elif is_image(name, provenance):
            return name
    return free[0] if free else names[-1]


def is_image(path: Path, provenance: Provenance) -> bool:
    """Whether a file is the image of this provenance: one of the same name made with other settings is not."""
    try:
        return path.is_file() and read_provenance(path).identity() == provenance.identity()
    except InputError:
        return False


def file_words(name: str) -> str:
    """Return a name as it stands in file names: letters, digits and underscores, none of them at an end."""
    words = re.sub(r"[^\w]+", "_", unicodedata.normalize("NFC", name)).strip("_")
    return words.encode()[:_LONGEST_NAME].decode(errors="ignore")


_LONGEST_NAME = 120
"""Most bytes of a class name in a file name; file systems allow 255 for the whole."""
