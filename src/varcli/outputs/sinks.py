"""Sinks that write each image at once: folders and streams.

Nothing half-written ever stands under a final name.
"""

import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from varcli.errors import UsageError
from varcli.files import cannot_write, check_folder, check_writable, write_atomically
from varcli.images.provenance import Provenance, image_filename, is_image, own_path, png_bytes

if TYPE_CHECKING:
    from varcli.images.provenance import PixelsOrRaster


class Sink:
    """Where images are written; a context manager, whose results are finished once it exits.

    An image is written in two steps. `prepare` does the work that needs no order, in any thread, and in any process
    with a sink that is not open. `put` is called by one thread of the process that opened the sink.
    """

    archive: Path | None = None
    """The one file that will hold all images, where there is one."""

    def open(self, resume: bool) -> None:
        """Check that images can be written here, and prepare for it.

        Args:
            resume: keep what an earlier run left here.

        Raises:
            UsageError: images cannot be written here.
            RunError: it cannot be written.
            InputError: with `resume`, what lies there was not written by varcli.
        """

    def left(self) -> Path | None:
        """The file of an earlier run that is lost unless this one resumes it; call it before `open`."""
        return None

    def has(self, provenance: Provenance) -> bool:
        """Whether an earlier run left this image here; call it once for each image, before `add`."""
        return False

    def unasked(self) -> int:
        """Number of images of an earlier run that `has` was not called for."""
        return 0

    def add(self, pixels: "PixelsOrRaster", provenance: Provenance) -> Path | None:
        """Put an image here; return its own file, None where it has none.

        Raises:
            RunError: it cannot be written.
        """
        return self.put(self.prepare(pixels, provenance), provenance)

    def prepare(self, pixels: "PixelsOrRaster", provenance: Provenance) -> Any:
        """Return an image as `put` takes it: the content of a PNG, unless a kind of sink overrides it."""
        return png_bytes(pixels, provenance)

    def put(self, prepared: Any, provenance: Provenance) -> Path | None:
        """Put the next image here, as `prepare` returned it; return its own file, None where it has none."""
        raise NotImplementedError

    def close(self) -> None:
        """Finish the output."""

    def abandon(self) -> None:
        """Leave the output unfinished, for `--resume` or for good."""

    def __enter__(self) -> "Sink":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


class FolderSink(Sink):
    """A folder of PNGs, in which no other file is replaced, or one PNG of a given name, which is."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self._folder = folder
        self._name = name
        self._resume = False

    def open(self, resume: bool) -> None:
        """Make the folder if need be."""
        self._resume = resume
        if self._name is not None:
            check_writable(self._folder / self._name)
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self._folder, error) from error
        check_folder(self._folder)

    def has(self, provenance: Provenance) -> bool:
        """Whether this very image is there."""
        if not self._resume:
            return False
        path = self._path(provenance)
        # Where the name is ours, no other image is there.
        return path.is_file() if self._name is None else is_image(path, provenance)

    def prepare(self, pixels: "PixelsOrRaster", provenance: Provenance) -> Path:
        """Write an image, which needs no order either; return its file."""
        path = self._path(provenance)
        write_atomically(path, png_bytes(pixels, provenance))
        return path

    def put(self, prepared: Path, provenance: Provenance) -> Path:
        """Return the file of an image."""
        return prepared

    def _path(self, provenance: Provenance) -> Path:
        if self._name is not None:
            return self._folder / self._name
        return own_path(self._folder / image_filename(provenance), provenance)


# --- streams ---------------------------------------------------------------------------------------


class StreamSink(Sink):
    """Standard output or a pipe: the bytes of one PNG, or a tar of several, which needs no rewinding."""

    _stream: BinaryIO | None = None

    def __init__(self, path: Path, several: bool) -> None:
        self._path = path
        self._several = several

    def open(self, resume: bool) -> None:
        """Open the pipe or device; a terminal is none."""
        with self._reported():
            if self._path == STANDARD_OUTPUT:
                self._stream = _standard_output()
            else:  # no buffer: to close one is to wait for the thread writing to it, whom a pipe may hold up for good
                self._stream = self._path.open("wb", buffering=0)

    def put(self, prepared: bytes, provenance: Provenance) -> None:
        """Send an image on its way."""
        self._send(tar_member(image_filename(provenance), prepared) if self._several else prepared)

    def close(self) -> None:
        """Send the end of the tar, if it is one."""
        self._send(TAR_END if self._several else b"")
        self.abandon()

    def abandon(self) -> None:
        """Close what was opened here, not standard output."""
        if self._stream and self._path != STANDARD_OUTPUT:
            with suppress(OSError):  # what could not be written a moment ago
                self._stream.close()

    def _send(self, content: bytes) -> None:
        if self._stream is None:
            return  # this process only prepares
        with self._reported():
            rest = memoryview(content)
            while rest:
                rest = rest[self._stream.write(rest) :]
            self._stream.flush()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn what the system refuses into one line; a pipe closed by its reader is not an error here."""
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise cannot_write(self._path, error) from error


STANDARD_OUTPUT = Path("-")


def _standard_output() -> BinaryIO:
    if sys.stdout.isatty():
        raise UsageError("--out - is a terminal; send images to a file or a pipe")
    return sys.stdout.buffer


# --- names -----------------------------------------------------------------------------------------


def tar_member(name: str, content: bytes) -> bytes:
    """Return a file as it stands in a tar; without a date, so that equal images make equal tars."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    return header.tobuf() + content + bytes(-len(content) % tarfile.BLOCKSIZE)


TAR_END = bytes(2 * tarfile.BLOCKSIZE)
"""What closes a tar."""
