"""Metadata of image files, and the chunks of PNG files that hold it.

Metadata is a dictionary with any of `dpi`, `aspect` (the shape of a pixel), `icc_profile`, `exif`, `xmp`, `texts` (of a
PNG: a list of keywords, each with its chunk) and the names of the PNG chunks in `COLOUR_CHUNKS`.
"""

import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from PIL import Image

# --- chunks of PNG files ---------------------------------------------------------------------------

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_TEXTS = (b"tEXt", b"zTXt", b"iTXt")

LARGEST_TEXT = 1 << 20
"""Most bytes of a text or a colour profile, decompressed; Pillow refuses files with a larger one."""

_LARGEST_TEXTS = 32 << 20
"""Most bytes of all texts of a file, decompressed."""

_SHORTEST = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9}
"""Least length of chunks that decoders fail on if they are cut off."""


class Chunk(NamedTuple):
    """A part of a PNG file."""

    name: bytes
    data: bytes
    start: int
    """Where it begins in the file."""
    end: int


def chunks(content: bytes) -> Iterator[Chunk]:
    """Yield the whole chunks of a PNG file; nothing if it is none."""
    start = len(SIGNATURE) if content.startswith(SIGNATURE) else len(content)
    while start + 12 <= len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        if end > len(content):
            return
        yield Chunk(content[start + 4 : start + 8], content[start + 8 : end - 4], start, end)
        start = end


def readable_png(content: bytes) -> bytes:
    """Return a PNG file without metadata that is damaged or decompresses to more than a megabyte; others unchanged.

    Viewers skip it too.
    """
    dropped, texts = [], 0
    for chunk in chunks(content):
        if not chunk.name[:1].islower():
            continue  # a critical chunk
        size = _unpacked_size(chunk)
        texts += size
        damaged = zlib.crc32(chunk.name + chunk.data).to_bytes(4, "big") != content[chunk.end - 4 : chunk.end]
        malformed = len(chunk.data) < _SHORTEST.get(chunk.name, 0)
        malformed |= chunk.name == b"eXIf" and chunk.data[:4] not in (b"II*\0", b"MM\0*")
        if damaged or malformed or size > LARGEST_TEXT or texts > _LARGEST_TEXTS:
            dropped.append(chunk)
    if not dropped:
        return content
    starts, ends = [0, *(chunk.end for chunk in dropped)], [*(chunk.start for chunk in dropped), len(content)]
    return b"".join(content[start:end] for start, end in zip(starts, ends, strict=True))


def png_texts(content: bytes) -> dict[str, str]:
    """Return the texts of a PNG file by keyword, those that can be read."""
    return {
        keyword: _text(chunk)[1].decode("utf-8" if chunk.name == b"iTXt" else "latin-1", "replace")
        for keyword, chunk in text_chunks(readable_png(content))
    }


def text_chunks(content: bytes) -> list[tuple[str, Chunk]]:
    """Return the chunks of a PNG file that hold texts, each with its keyword."""
    return [(_text(chunk)[0].decode("latin-1"), chunk) for chunk in chunks(content) if chunk.name in _TEXTS]


def with_chunks(content: bytes, added: list[tuple[bytes, bytes]]) -> bytes:
    """Return a PNG file with chunks, given by name and content, inserted after its header."""
    after_header = next(chunks(content)).end
    packed = b"".join(
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big") for name, data in added
    )
    return content[:after_header] + packed + content[after_header:]


def text_chunk(keyword: str, text: str) -> tuple[bytes, bytes]:
    """Return the chunk of a text: tEXt where it fits Latin-1, else iTXt."""
    name = keyword.encode("latin-1")
    try:
        return b"tEXt", name + b"\0" + text.encode("latin-1")
    except UnicodeEncodeError:
        return b"iTXt", name + b"\0\0\0\0\0" + text.encode("utf-8", "backslashreplace")


def _text(chunk: Chunk) -> tuple[bytes, bytes]:
    """Return the keyword and the text of a chunk, at most one byte more than may be read."""
    keyword, _, rest = chunk.data.partition(b"\0")
    packed = chunk.name in (b"zTXt", b"iCCP")
    if packed:
        rest = rest[1:]  # the method
    elif chunk.name == b"iTXt":
        packed = rest[:1] == b"\1"
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]  # behind the language and the keyword in it
    if packed:
        try:
            rest = zlib.decompressobj().decompress(rest, LARGEST_TEXT + 1)
        except zlib.error:
            rest = b""
    return keyword, rest


def _unpacked_size(chunk: Chunk) -> int:
    return len(_text(chunk)[1]) if chunk.name in (*_TEXTS, b"iCCP") else 0


# --- metadata --------------------------------------------------------------------------------------

COLOUR_CHUNKS = ("cICP", "mDCV", "cLLI", "gAMA", "cHRM", "sRGB")
"""PNG chunks about colours, besides a profile."""

_ORIENTATION, _RESOLUTION, _EXIF_IFD = 0x0112, (0x011A, 0x011B, 0x0128), 0x8769
_PIXEL_SIZE = (0xA002, 0xA003)
_TURNED = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""

_TIFF_DESCRIPTIONS = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298, _EXIF_IFD, 0x8825)
"""TIFF tags that describe a photograph; the others say how the file is built."""

_OTHER_SPACES = (b"CMYK", b"CMY ", b"Lab ", b"Luv ", b"XYZ ", b"YCbr", b"Yxy ", b"HSV ", b"HLS ")
"""Colour spaces of profiles that do not fit grey or RGB."""

_OTHER_METADATA = ("XML:com.adobe.xmp", "Raw profile type ")
"""Keywords of texts that hold XMP, or EXIF and profiles as ImageMagick writes them, in a PNG."""

_PER_METRE = 0.0254
"""Inches to metres."""


def read_metadata(opened: Image.Image, upright: Image.Image, content: bytes) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the metadata that a PNG can hold, and names of what is left out because it is too large or damaged.

    Args:
        opened: the image, loaded.
        upright: the same, with its EXIF orientation applied.
        content: its file.
    """
    found: dict[str, Any] = {c.name.decode("latin-1"): c.data for c in chunks(content)}
    info, left_out = {name: found[name] for name in COLOUR_CHUNKS if name in found}, []
    turned = opened.getexif().get(_ORIENTATION) in _TURNED
    for name, pair in (("dpi", _resolution(opened)), ("aspect", _aspect(opened))):
        if pair and name not in info:
            info[name] = pair[::-1] if turned else pair
    profile = opened.info.get("icc_profile") or b""
    xmp = upright.info.get("xmp") or upright.info.get("XML:com.adobe.xmp") or b""
    xmp = xmp if isinstance(xmp, bytes) else str(xmp).encode()
    for name, value in (("icc_profile", profile), ("xmp", xmp)):
        if len(value) > LARGEST_TEXT:
            left_out.append(f"{'colour profile' if name == 'icc_profile' else 'XMP'} of {len(value) / 2**20:.1f} MB")
        elif value and not (name == "icc_profile" and value[16:20] in _OTHER_SPACES):
            info[name] = value
    texts = text_chunks(readable_png(content))
    if described := [text for text in texts if not text[0].startswith(_OTHER_METADATA)]:
        info["texts"] = described
    for keyword in sorted({keyword for keyword, _ in text_chunks(content)} - {keyword for keyword, _ in texts}):
        left_out.append(f"text {keyword} (damaged, or larger than 1 MB)")
    if "iCCP" in found and not profile:
        left_out.append("colour profile (damaged, or larger than 1 MB)")
    try:
        exif = _exif(opened)
    except Exception:  # cameras may write anything
        left_out.append("EXIF data (damaged)")
    else:
        info |= {"exif": exif} if exif else {}
    return info, tuple(left_out)


def _resolution(image: Image.Image) -> tuple[float, float] | None:
    """Return pixels per inch in both directions, None where a file has none that a PNG can hold."""
    if image.format == "TIFF" and _RESOLUTION[0] not in image.getexif():
        return None  # Pillow makes it 1
    with suppress(TypeError, ValueError, ArithmeticError):
        across, down = (float(value) for value in image.info.get("dpi", ()))
        if all(0.5 <= value / _PER_METRE < 2**31 - 1 for value in (across, down)):
            return across, down
    return None


def _aspect(image: Image.Image) -> tuple[int, int] | None:
    """Return the aspect ratio of a pixel as numbers of pixels of equal length, None where pixels are square."""
    pair = image.info.get("aspect") or (image.info.get("jfif_unit") == 0 and image.info.get("jfif_density"))
    if not pair or pair[0] == pair[1] or min(pair) < 1:
        return None
    return int(pair[0]), int(pair[1])


def _exif(image: Image.Image) -> bytes:
    """Return the EXIF data without what no longer holds: orientation, size, resolution and thumbnail."""
    exif = image.getexif()
    for tag in list(exif):
        structure = image.format == "TIFF" and tag not in _TIFF_DESCRIPTIONS
        if structure or tag in (_ORIENTATION, *_RESOLUTION):
            del exif[tag]
    if _EXIF_IFD in exif:
        for tag in _PIXEL_SIZE:
            exif.get_ifd(_EXIF_IFD).pop(tag, None)
    return exif.tobytes().removeprefix(b"Exif\0\0") if len(exif) else b""


def metadata_chunks(info: dict[str, Any]) -> tuple[list[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]:
    """Return the PNG chunks of metadata: those about colours, and those that follow the texts."""
    colours = [(name.encode(), info[name]) for name in COLOUR_CHUNKS if name in info]
    if "icc_profile" in info:
        colours = [chunk for chunk in colours if chunk[0] != b"sRGB"]  # the standard allows one of both
        colours.insert(0, (b"iCCP", b"ICC Profile\0\0" + zlib.compress(info["icc_profile"])))
    others = []
    if "xmp" in info:
        others.append((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + info["xmp"]))
    if "dpi" in info:
        others.append((b"pHYs", struct.pack(">IIB", *(int(value / _PER_METRE + 0.5) for value in info["dpi"]), 1)))
    elif "aspect" in info:
        others.append((b"pHYs", struct.pack(">IIB", *info["aspect"], 0)))
    if "exif" in info:
        others.append((b"eXIf", info["exif"]))
    return colours, others
