"""Pictures as a WebDataset shard: a tar with three files for each."""

import os
import shutil
import tarfile
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from varcli.data.archives import Archive, foreign
from varcli.data.images import Provenance, provenance_from_json
from varcli.data.places import TAR_END, tar_member


class Shard(Archive):
    """A WebDataset shard: ``000000.png``, ``.cls`` (the class id, -1 for no class) and ``.json`` (the provenance)."""

    _file: BinaryIO

    def _open_part(self, resume: bool) -> list[Provenance]:
        self._file = self._open(self._part, resume)
        found, end = _samples(self._file, self._part)
        self._file.truncate(end)
        self._file.seek(end)
        return found

    def _finished(self) -> list[Provenance]:
        with self.archive.open("rb") as file:
            found, _ = _samples(file, self.archive)
        if not found:
            raise foreign(self.archive)
        return found

    def _unpack(self) -> None:
        shutil.copyfile(self.archive, self._part)

    def _append(self, prepared: bytes, made: Provenance) -> None:
        class_id = -1 if made.class_id is None else made.class_id
        contents = {"png": prepared, "cls": str(class_id).encode(), "json": made.to_json().encode()}
        for ending, content in contents.items():
            self._file.write(tar_member(f"{self._count:06}.{ending}", content))
        self._file.flush()

    def _finish(self) -> None:
        self._file.write(TAR_END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._files.close()
        self._part.replace(self.archive)


def _samples(file: BinaryIO, path: Path) -> tuple[list[Provenance], int]:
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
                    content = tar.extractfile(member) or BytesIO()
                    found.append(provenance_from_json(content.read().decode(), str(path)))
                    end = following
    except tarfile.TarError:
        pass  # what was being written when the run was killed
    return found, end
