"""The chunks of PNG files: what a file says of itself, and what of it is too large or damaged to be read."""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_TEXTS = (b"tEXt", b"zTXt", b"iTXt")

LARGEST_TEXT = 1 << 20
"""Bytes of a text or a colour profile, unpacked; Pillow refuses files in which one is larger."""

_LARGEST_TEXTS = 32 << 20
"""Bytes of all texts of a file, unpacked."""

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
    """Return a PNG file without descriptions that are damaged or unpack to more than a megabyte; others as they are.

    Viewers pass over them too.
    """
    dropped, texts = [], 0
    for chunk in chunks(content):
        if not chunk.name[:1].islower():
            continue  # what the image is made of
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
    """Return a PNG file with more chunks, names and contents, behind its header."""
    after_header = next(chunks(content)).end
    packed = b"".join(
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big") for name, data in added
    )
    return content[:after_header] + packed + content[after_header:]


def text_chunk(keyword: str, text: str) -> tuple[bytes, bytes]:
    """Return the chunk of a text: tEXt where Latin-1 has all its letters, else iTXt."""
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
