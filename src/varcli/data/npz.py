"""Pictures as one array in an .npz, as FID toolkits read it."""

import os
import shutil
import zipfile
from io import BytesIO
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO

import numpy as np

from varcli.data.archives import Archive, foreign, provenances
from varcli.data.images import Provenance
from varcli.errors import InputError
from varcli.files import replacing

if TYPE_CHECKING:
    from varcli.data.images import Picture


class Npz(Archive):
    """``arr_0``, uint8 (pictures, height, width, 3), and ``provenance.jsonl``, one line a picture.

    The part is the array as .npy, whose header leaves room for any count, with its lines beside it.
    """

    _file: BinaryIO
    _lines: BinaryIO

    def prepare(self, pixels: "Picture", made: Provenance) -> bytes:
        """Return a picture as a .npy of one."""
        array = np.asarray(pixels)
        return _header(1, array.shape) + array.tobytes()

    @property
    def _lines_part(self) -> Path:
        return self._part.with_name(self._part.name + ".jsonl")

    def _open_part(self, resume: bool) -> list[Provenance]:
        self._file = self._open(self._part, resume)
        self._lines = self._open(self._lines_part, resume)
        self._shape = _read_shape(self._file)
        size = self._file.seek(0, os.SEEK_END)
        whole = (size - _HEADER_BYTES) // prod(self._shape) if self._shape else 0
        lines = [line for line in self._lines.read().splitlines(keepends=True) if line.endswith(b"\n")][: max(whole, 0)]
        for file, length in ((self._lines, sum(map(len, lines))), (self._file, self._offset(len(lines)))):
            file.truncate(length)
            file.seek(length)
        return provenances(b"".join(lines), self._part)

    def _offset(self, count: int) -> int:
        return _HEADER_BYTES + count * prod(self._shape) if self._shape and count else 0

    def _finished(self) -> list[Provenance]:
        try:
            with zipfile.ZipFile(self.archive) as stored:
                return provenances(stored.read(_LINES_NAME), self.archive)
        except (KeyError, zipfile.BadZipFile) as error:
            raise foreign(self.archive) from error

    def _unpack(self) -> None:
        with zipfile.ZipFile(self.archive) as stored:
            for name, path in ((_LINES_NAME, self._lines_part), (_ARRAY_NAME, self._part)):
                with stored.open(name) as source, path.open("wb") as target:
                    shutil.copyfileobj(source, target, _CHUNK)

    def _append(self, prepared: bytes, made: Provenance) -> None:
        shape = _read_shape(BytesIO(prepared))
        if self._count == 0:
            self._shape = shape
            self._file.write(_header(0, self._shape))
        if shape != self._shape:
            raise InputError(f"output: {self.archive} holds pictures of {self._shape}, not {shape}; another name")
        self._file.write(memoryview(prepared)[_HEADER_BYTES:])
        self._file.flush()
        self._lines.write(made.to_json().encode() + b"\n")  # behind the pixels: a line without them means nothing
        self._lines.flush()

    def _finish(self) -> None:
        self._file.seek(0)
        self._file.write(_header(self._count, self._shape))
        self._file.seek(0)
        self._lines.seek(0)
        with replacing(self.archive) as draft, draft.open("wb") as file:
            _zip(file, {_ARRAY_NAME: self._file, _LINES_NAME: self._lines})
        self._files.close()
        self._remove_part()

    def _remove_part(self) -> None:
        super()._remove_part()
        self._lines_part.unlink(missing_ok=True)


_ARRAY_NAME, _LINES_NAME = "arr_0.npy", "provenance.jsonl"
_CHUNK = 1 << 20
_HEADER_BYTES = 128
"""Of a .npy of pictures, however many."""


def _header(count: int, shape: tuple[int, ...]) -> bytes:
    """Return the .npy header of `count` pictures, of the same length for every count."""
    form = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {(count, *shape)!r}, }}"
    return (
        b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little") + f"{form:<{_HEADER_BYTES - 11}}\n".encode()
    )


def _read_shape(file: IO[bytes]) -> tuple[int, ...]:
    """Return height, width and channels as the header of a part has them; nothing where it has no whole header."""
    try:
        np.lib.format.read_magic(file)
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
    except ValueError:
        return ()
    return tuple(shape[1:])


def _zip(target: IO[bytes], members: dict[str, IO[bytes]]) -> None:
    """Write open files into an uncompressed zip, as .npz are."""
    with zipfile.ZipFile(target, "w") as stored:
        for name, source in members.items():
            # ZipInfo of a bare name bears a fixed date: equal pictures make equal files.
            with stored.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                shutil.copyfileobj(source, member, _CHUNK)
