"""Archives of images: an .npz for FID toolkits, and a tar as a WebDataset shard. Both can be resumed."""

import os
import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from io import BytesIO
from math import prod
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from varcli.console import counted, note
from varcli.errors import InputError, RunError
from varcli.files import cannot_lock, cannot_write, replacing
from varcli.images.provenance import Provenance, provenance_from_json
from varcli.images.sources import ARCHIVE_ERRORS, PIXELS, PROVENANCE, array_header, npz_provenances
from varcli.outputs.sinks import TAR_END, Sink, tar_member

if TYPE_CHECKING:
    from varcli.images.provenance import PixelsOrRaster


class ArchiveSink(Sink):
    """What both kinds share: the unfinished file (the part), what is in it, and how it gets the final name.

    To resume a finished archive only its provenance is read at first; it becomes a part again when an image is added.
    """

    def __init__(self, path: Path) -> None:
        self.archive: Path = path
        self._part = path.with_name(path.name + ".part")
        self._files = ExitStack()
        self._count = 0
        self._growing = False
        self._done: Counter[Provenance] = Counter()
        self._like: Provenance | None = None

    def open(self, resume: bool) -> None:
        """Open the part; with `resume` find out what is in it, or in the finished archive."""
        self._growing = not (resume and self.archive.is_file() and not self._part.exists())
        with self._reported():
            self._keep_others_out()
            found = self._open_part(resume) if self._growing else self._finished()
        self._count = len(found)
        self._done = Counter(provenance.identity() for provenance in found)
        self._like = _in_common(found[0]) if found else None

    def left(self) -> Path | None:
        """The part of a run that was stopped, or the archive of one that was finished."""
        return next((path for path in (self._part, self.archive) if path.is_file()), None)

    def has(self, provenance: Provenance) -> bool:
        """Whether this image is in the archive, and no more often than it is."""
        self._check_like(provenance)
        settings = provenance.identity()
        if not self._done[settings]:
            return False
        self._done[settings] -= 1
        return True

    def unasked(self) -> int:
        """Number of images of an earlier run that `has` was not called for."""
        return self._done.total()

    def put(self, prepared: bytes, provenance: Provenance) -> None:
        """Append an image.

        Raises:
            InputError: images of another kind are in the archive.
            RunError: it cannot be written.
        """
        self._check_like(provenance)
        with self._reported():
            if not self._growing:
                self._unpack()
                self._open_part(resume=True)
                self._growing = True
            self._append(prepared, provenance)
            self._count += 1

    def close(self) -> None:
        """Give the archive its final name; without images there is no archive."""
        try:
            with self._reported():
                if self._growing and self._count > 0:
                    self._finish()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Leave the part for a run with `resume`, unless it is empty."""
        self._close_files()
        if self._growing and self._count == 0:
            self._remove_part()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        super().__exit__(kind, error, at)
        if kind is KeyboardInterrupt and self._growing and self._count > 0:
            count = counted(self._count, "image")
            note(f"{self._part} keeps {count}; the same command with --resume continues")

    def _keep_others_out(self) -> None:
        """Hold the archive until its files are closed; two processes would corrupt it.

        Raises:
            RunError: another one holds it.
        """
        lock = FileLock(f"{self._part}.lock", blocking=False)
        if not self._part.parent.is_dir():  # taking the lock would make it
            raise FileNotFoundError
        try:
            lock.acquire()
        except Timeout:
            what = f"{self.archive} is being written by another process"
            raise RunError(f"{what}; wait for it, or use another name") from None
        except (OSError, NotImplementedError) as error:
            Path(lock.lock_file).unlink(missing_ok=True)
            raise cannot_lock(self._part.parent, error) from error
        self._files.callback(lock.release)
        if os.name != "nt":  # there the release removes the file
            # Called first, for callbacks are called backwards: once released it may be another process's.
            self._files.callback(Path(lock.lock_file).unlink, missing_ok=True)

    def _close_files(self) -> None:
        with suppress(OSError):  # what could not be written a moment ago cannot be written now
            self._files.close()

    def _check_like(self, provenance: Provenance) -> None:
        self._like = self._like or _in_common(provenance)
        if _in_common(provenance) != self._like:
            raise InputError(
                f"{self.archive} holds images of another checkpoint or other settings: "
                "use another name, or leave out --resume to start over"
            )

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn what the system refuses into the one line a user can act on; leave no file open."""
        try:
            yield
        except OSError as error:
            self._close_files()
            kept = f"what is done is kept in {self._part}, and --resume continues"
            raise cannot_write(self.archive, error, kept if self._count and self._part.exists() else "") from error
        except InputError:
            self._close_files()
            raise

    def _open_part(self, resume: bool) -> list[Provenance]:
        """Open the part to append to; return what is in it, which is nothing without `resume`."""
        raise NotImplementedError

    def _finished(self) -> list[Provenance]:
        """What is in the finished archive."""
        raise NotImplementedError

    def _unpack(self) -> None:
        """Make a part of the finished archive."""
        raise NotImplementedError

    def _append(self, prepared: bytes, provenance: Provenance) -> None:
        """Write one image to the part, so that it is whole even if the next moment kills this process."""
        raise NotImplementedError

    def _finish(self) -> None:
        """Make the final file of the part."""
        raise NotImplementedError

    def _open(self, path: Path, resume: bool) -> BinaryIO:
        """Return a file of the part open for reading and writing, empty unless with `resume`."""
        return self._files.enter_context(path.open("r+b" if resume and path.exists() else "w+b"))

    def _remove_part(self) -> None:
        self._part.unlink(missing_ok=True)


def _in_common(provenance: Provenance) -> Provenance:
    """What all images of one archive share."""
    return replace(provenance.identity(), class_id=None, seed=0)


def foreign(path: Path) -> InputError:
    """Return the error about a finished archive to resume that does not say what is in it, or cannot be read."""
    return InputError(
        f"{path} is damaged, or was not written by var sample: choose another name, or replace it without --resume"
    )


class NpzSink(ArchiveSink):
    """``arr_0``, uint8 (images, height, width, 3), and ``provenance.jsonl``, one line per image.

    The part is the array as .npy, whose header leaves room for any count, with its lines beside it.
    """

    _file: BinaryIO
    _lines: BinaryIO

    def prepare(self, pixels: "PixelsOrRaster", provenance: Provenance) -> bytes:
        """Return an image as a .npy of one."""
        array = np.asarray(pixels)
        return _npy_header(1, array.shape) + array.tobytes()

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
        return [provenance_from_json(line, str(self._part)) for line in lines]

    def _offset(self, count: int) -> int:
        return _HEADER_BYTES + count * prod(self._shape) if self._shape and count else 0

    def _finished(self) -> list[Provenance]:
        try:
            with zipfile.ZipFile(self.archive) as stored:
                found = npz_provenances(stored, self.archive)
        except ARCHIVE_ERRORS as error:
            raise foreign(self.archive) from error
        if not found:
            raise foreign(self.archive)
        return found

    def _unpack(self) -> None:
        try:
            with zipfile.ZipFile(self.archive) as stored:
                for name, path in ((PROVENANCE, self._lines_part), (PIXELS, self._part)):
                    with stored.open(name) as source, path.open("wb") as target:
                        shutil.copyfileobj(source, target, _CHUNK)
        except ARCHIVE_ERRORS as error:
            self._remove_part()
            raise foreign(self.archive) from error

    def _append(self, prepared: bytes, provenance: Provenance) -> None:
        shape = _read_shape(BytesIO(prepared))
        if self._count == 0:
            self._shape = shape
            self._file.write(_npy_header(0, self._shape))
        if shape != self._shape:
            raise InputError(f"{self.archive} holds images of shape {self._shape}, not {shape}: use another name")
        self._file.write(memoryview(prepared)[_HEADER_BYTES:])
        self._file.flush()
        self._lines.write(provenance.to_json().encode() + b"\n")  # behind the pixels: a line without them means nothing
        self._lines.flush()

    def _finish(self) -> None:
        self._file.seek(0)
        self._file.write(_npy_header(self._count, self._shape))
        self._file.seek(0)
        self._lines.seek(0)
        with replacing(self.archive) as temporary, temporary.open("wb") as file:
            _zip(file, {PIXELS: self._file, PROVENANCE: self._lines})
        for part in (self._file, self._lines):
            part.close()  # Windows removes no open file
        self._remove_part()  # while the lock is held: a part after that is another process's

    def _remove_part(self) -> None:
        super()._remove_part()
        self._lines_part.unlink(missing_ok=True)


_CHUNK = 1 << 20
_HEADER_BYTES = 128
"""Of a .npy of images, however many."""


def _npy_header(count: int, shape: tuple[int, ...]) -> bytes:
    """Return the .npy header of `count` images, of the same length for every count."""
    form = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {(count, *shape)!r}, }}"
    return (
        b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little") + f"{form:<{_HEADER_BYTES - 11}}\n".encode()
    )


def _read_shape(file: IO[bytes]) -> tuple[int, ...]:
    """Return height, width and channels as the header of a part has them; nothing where it has no whole header."""
    try:
        shape, _, _ = array_header(file)
    except ValueError:
        return ()
    return tuple(shape[1:])


def _zip(target: IO[bytes], members: dict[str, IO[bytes]]) -> None:
    """Write open files into an uncompressed zip, as .npz are."""
    with zipfile.ZipFile(target, "w") as stored:
        for name, source in members.items():
            # ZipInfo of a bare name bears a fixed date: equal images make equal files.
            with stored.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                shutil.copyfileobj(source, member, _CHUNK)


class TarSink(ArchiveSink):
    """A WebDataset shard: ``000000.png``, ``.cls`` (the class id, -1 for no class) and ``.json`` (the provenance)."""

    _file: BinaryIO

    def _open_part(self, resume: bool) -> list[Provenance]:
        self._file = self._open(self._part, resume)
        found, end = _tar_samples(self._file, self._part)
        self._file.truncate(end)
        self._file.seek(end)
        return found

    def _finished(self) -> list[Provenance]:
        with self.archive.open("rb") as file:
            found, _ = _tar_samples(file, self.archive)
        if not found:
            raise foreign(self.archive)
        return found

    def _unpack(self) -> None:
        shutil.copyfile(self.archive, self._part)

    def _append(self, prepared: bytes, provenance: Provenance) -> None:
        class_id = -1 if provenance.class_id is None else provenance.class_id
        contents = {"png": prepared, "cls": str(class_id).encode(), "json": provenance.to_json().encode()}
        for ending, content in contents.items():
            self._file.write(tar_member(f"{self._count:06}.{ending}", content))
        self._file.flush()

    def _finish(self) -> None:
        self._file.write(TAR_END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._part.replace(self.archive)  # while the lock is held: a part after that is another process's


def _tar_samples(file: BinaryIO, path: Path) -> tuple[list[Provenance], int]:
    """Return the provenance of each whole sample of a shard, and where the last of them ends."""
    found, end, size = [], 0, file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # it would remember each to the end
                following = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if following > size:
                    break
                if member.name.endswith(".json"):  # the last of a sample's three
                    content = tar.extractfile(member) if member.isreg() else None  # a link may lead anywhere
                    found.append(provenance_from_json(content.read() if content else b"", str(path)))
                    end = following
    except tarfile.TarError:
        pass  # what was being written when the run was killed
    return found, end
