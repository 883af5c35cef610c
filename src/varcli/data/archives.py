"""Many pictures in one file, written as they come: what .npz and .tar have in common.

The file grows under its name with ``.part`` behind it, and takes its final name when whole. A run that
was killed leaves the part; one with `resume` keeps what is whole of it and goes on from there. Memory
stays flat however many pictures there are.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from filelock import FileLock, Timeout

from varcli.data.images import Provenance, cannot_write, provenance_from_json
from varcli.data.places import Output
from varcli.errors import InputError, RunError
from varcli.reporting import note


class Archive(Output):
    """What both kinds share: the part, what is in it, and its way to the final name.

    Of a finished archive that is taken up again only the provenance is read at first; it turns back into
    a part when a picture is to be added.
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
        self._done = Counter(made.settings() for made in found)
        self._like = _in_common(found[0]) if found else None

    def has(self, made: Provenance) -> bool:
        """Return whether this picture is in the archive, and no more often than it is."""
        self._check_like(made)
        settings = made.settings()
        if not self._done[settings]:
            return False
        self._done[settings] -= 1
        return True

    def unasked(self) -> int:
        """Return how many pictures an earlier run left here that `has` was not asked for."""
        return self._done.total()

    def put(self, prepared: bytes, made: Provenance) -> None:
        """Append a picture.

        Raises:
            InputError: pictures of another kind are in the archive.
            RunError: it cannot be written.
        """
        self._check_like(made)
        with self._reported():
            if not self._growing:
                self._unpack()
                self._open_part(resume=True)
                self._growing = True
            self._append(prepared, made)
            self._count += 1

    def close(self) -> None:
        """Give the archive its final name; without any picture there is no archive."""
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
            note(f"{self._count} pictures are kept in {self._part}; the same command with --resume goes on from there")

    def _keep_others_out(self) -> None:
        """Hold the archive until its files are closed; two processes would tear it.

        Raises:
            RunError: another one holds it.
        """
        lock = FileLock(f"{self._part}.lock", blocking=False)
        if not self._part.parent.is_dir():  # taking the lock would make it
            raise FileNotFoundError
        try:
            lock.acquire()
        except Timeout:
            what = f"output: {self.archive} is being written by another process"
            raise RunError(f"{what}; wait for it, or use another name") from None
        self._files.callback(lock.release)
        if os.name != "nt":  # there the release removes the file
            # Called first, for callbacks are called backwards: once released it may be another process's.
            self._files.callback(Path(lock.lock_file).unlink, missing_ok=True)

    def _close_files(self) -> None:
        with suppress(OSError):  # what could not be written a moment ago cannot be written now
            self._files.close()

    def _check_like(self, made: Provenance) -> None:
        self._like = self._like or _in_common(made)
        if _in_common(made) != self._like:
            raise InputError(
                f"output: {self.archive} holds pictures of another checkpoint or other settings; "
                "another name, or no --resume to begin anew"
            )

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn what the system refuses into the one line a user can act on; leave no file open."""
        try:
            yield
        except OSError as error:
            self._close_files()
            kept = f"what is done is kept in {self._part}, --resume goes on from there"
            raise cannot_write(self.archive, error, kept if self._count else "") from error
        except InputError:
            self._close_files()
            raise

    def _open_part(self, resume: bool) -> list[Provenance]:
        """Open the part to append to; return what is in it, which is nothing without `resume`."""
        raise NotImplementedError

    def _finished(self) -> list[Provenance]:
        """Return what is in the finished archive."""
        raise NotImplementedError

    def _unpack(self) -> None:
        """Make a part of the finished archive."""
        raise NotImplementedError

    def _append(self, prepared: bytes, made: Provenance) -> None:
        """Write one picture to the part, so that it is whole even if the next moment kills this process."""
        raise NotImplementedError

    def _finish(self) -> None:
        """Make the final file of the part."""
        raise NotImplementedError

    def _open(self, path: Path, resume: bool) -> BinaryIO:
        """Return a file of the part open for reading and writing, empty unless with `resume`."""
        return self._files.enter_context(path.open("r+b" if resume and path.exists() else "w+b"))

    def _remove_part(self) -> None:
        self._part.unlink(missing_ok=True)


def _in_common(made: Provenance) -> Provenance:
    """Return what all pictures of one archive share."""
    return replace(made.settings(), class_id=None, seed=0)


def provenances(lines: bytes, path: Path) -> list[Provenance]:
    """Return the provenance of each line found in `path`."""
    return [provenance_from_json(line, str(path)) for line in lines.decode().splitlines()]


def foreign(path: Path) -> InputError:
    """Return the error about a finished archive to resume that does not say what is in it."""
    return InputError(f"output: {path} was not written by var sample; another name, or no --resume to replace it")
