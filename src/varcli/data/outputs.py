"""Which place for pictures `--out` names.

Opening it finds out whether it can be written, before any work is done.
"""

from pathlib import Path

from varcli.data.images import check_writable, kind_there
from varcli.data.npz import Npz
from varcli.data.places import STANDARD_OUTPUT, Files, Output, Stream
from varcli.data.shards import Shard
from varcli.errors import UsageError


def open_output(out: str | None, *, several: bool, resume: bool = False) -> Output:
    """Return the place that `--out` names.

    ``-`` is standard output: one PNG, or several in a tar stream. A name ending in .png is a file, in
    .npz the array ``arr_0`` (pictures, height, width, 3) of uint8, in .tar a WebDataset shard; any
    other is a folder, made if need be. None is the current folder.

    Args:
        out: as typed.
        several: whether there is, or may be, more than one picture.
        resume: take what an earlier run left here for done.

    Raises:
        UsageError: the place cannot take these pictures.
        RunError: it cannot be written.
        InputError: with `resume`, what lies there was not written by varcli.
    """
    path = Path(out or ".")
    if path == STANDARD_OUTPUT or kind_there(path) == "device":
        return Stream(path, several)
    folder = kind_there(path) == "folder" or (out or "").endswith(("/", "\\"))
    kind = "" if folder else path.suffix.lower()
    if kind in (".npz", ".tar"):
        return Npz(path, resume) if kind == ".npz" else Shard(path, resume)
    if kind == ".png":
        if several:
            raise UsageError(f"out: {out} for several pictures; a folder, .npz or .tar, or - for a tar stream")
        return Files(path.parent, resume, path.name)
    if kind in _OTHER_FILES or kind_there(path) == "file":
        raise UsageError(f"out: {out}; a folder, a name ending in .png, .npz or .tar, or - for standard output")
    return Files(path, resume)


_OTHER_FILES = frozenset(
    (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".npy", ".zip", ".gz", ".tgz", ".xz", ".zst", ".json")
)
"""Endings that mean a file of a kind not written here, hardly a folder."""


def check_file(option: str, path: Path, endings: tuple[str, ...]) -> None:
    """Find out whether a picture file that an option names can be written, without touching it.

    Raises:
        UsageError: its name has none of these endings, such as ".png".
        RunError: it cannot be written.
    """
    if path.suffix.lower() not in endings:
        raise UsageError(f"{option}: {path}; a name ending in {' or '.join(endings)}")
    check_writable(path)
