"""Which sink `--out` names.

Opening it checks that it can be written, before any work is done.
"""

from pathlib import Path

from varcli.errors import UsageError
from varcli.files import check_folder, check_writable, kind_there
from varcli.outputs.archives import NpzSink, TarSink
from varcli.outputs.sinks import STANDARD_OUTPUT, FolderSink, Sink, StreamSink


def open_sink(out: str | None, *, several: bool, resume: bool = False) -> Sink:
    """Open the sink that `--out` names.

    Args:
        out: as typed.
        several: whether there is, or may be, more than one image.
        resume: keep what an earlier run left here.

    Raises:
        UsageError: the sink cannot hold these images.
        RunError: it cannot be written.
        InputError: with `resume`, what lies there was not written by varcli.
    """
    output = find_sink(out, several=several)
    output.open(resume)
    return output


def find_sink(out: str | None, *, several: bool) -> Sink:
    """The sink that `--out` names, not open.

    ``-`` is standard output: one PNG, or several in a tar stream. A name ending in .png is a file, in
    .npz the array ``arr_0`` (images, height, width, 3) of uint8, in .tar a WebDataset shard; any
    other is a folder, made if need be. None is the current folder.

    Args:
        out: as typed.
        several: whether there is, or may be, more than one image.

    Raises:
        UsageError: the sink cannot hold these images.
    """
    path, kind = Path(out or "."), _kind(out)
    if kind == "stream":
        return StreamSink(path, several)
    if kind == ".npz":
        return NpzSink(path)
    if kind == ".tar":
        return TarSink(path)
    if kind == "folder":
        return FolderSink(path)
    if several:
        raise UsageError(
            f"--out {out} is one file, but there are several images; use a folder, .npz, .tar, or - for a tar stream"
        )
    return FolderSink(path.parent, path.name)


def check_sink(out: str | None) -> None:
    """Check that the place that `--out` names can be written, without touching it.

    Raises:
        UsageError: there is no such kind of output.
        RunError: it cannot be written.
    """
    path, kind = Path(out or "."), _kind(out)
    if kind == "folder":
        there = next((folder for folder in (path, *path.parents) if kind_there(folder) != "nothing"), path)
        check_folder(there, path)
    elif kind != "stream":
        check_writable(path)


def _kind(out: str | None) -> str:
    """Which kind of output `--out` names: "stream", "folder", ".png", ".npz" or ".tar"."""
    path = Path(out or ".")
    there = kind_there(path)
    if path == STANDARD_OUTPUT or there == "device":
        return "stream"
    if there == "folder" or (out or "").endswith(("/", "\\")):
        return "folder"
    ending = path.suffix.lower()
    if ending in (".png", ".npz", ".tar"):
        return ending
    if ending in _OTHER_FILES or there == "file":
        raise UsageError(
            f"--out must be a folder, a name ending in .png, .npz or .tar, or - for standard output (got {out})"
        )
    return "folder"


_OTHER_FILES = frozenset(
    (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".npy", ".zip", ".gz", ".tgz", ".xz", ".zst", ".json")
)
"""Endings that mean a file of a kind not written here, hardly a folder."""


def check_file(option: str, path: Path, endings: tuple[str, ...]) -> None:
    """Check that an image file that an option names can be written, without touching it.

    Raises:
        UsageError: its name has none of these endings, such as ".png".
        RunError: it cannot be written.
    """
    if path.suffix.lower() not in endings:
        raise UsageError(f"--{option} must be a name ending in {' or '.join(endings)} (got {path})")
    check_writable(path)


def check_outputs(out: str | None, grid: Path | None = None, growth: Path | None = None) -> None:
    """Check that everything to be written can be, before anything is downloaded or computed.

    Raises:
        UsageError: a name is of no kind that can be written.
        RunError: a place cannot be written.
    """
    check_sink(out)
    if grid:
        check_file("grid", grid, (".png",))
    if growth:
        check_file("growth", growth, (".png", ".gif"))
