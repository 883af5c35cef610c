"""Which sink `--out` names.

Opening it checks that it can be written, before any work is done.
"""

from collections.abc import Sequence
from pathlib import Path

from varcli.errors import UsageError
from varcli.files import check_folder, check_not_read, check_writable, kind_there
from varcli.outputs.archives import NpzSink, TarSink
from varcli.outputs.sinks import STANDARD_OUTPUT, FolderSink, Sink, StreamSink


def open_sink(out: str | None, *, several: bool, resume: bool = False, archives: bool = True) -> Sink:
    """Open the sink that `--out` names.

    Args:
        out: as typed.
        several: whether there is, or may be, more than one image.
        resume: keep what an earlier run left here.
        archives: whether .npz and .tar are written.

    Raises:
        UsageError: the sink cannot hold these images.
        RunError: it cannot be written.
        InputError: with `resume`, what lies there was not written by varcli.
    """
    output = find_sink(out, several=several, archives=archives)
    output.open(resume)
    return output


def find_sink(out: str | None, *, several: bool, archives: bool = True) -> Sink:
    """The sink that `--out` names, not open.

    ``-`` is standard output: one PNG, or several in a tar stream. A name ending in .png is a file, in
    .npz the array ``arr_0`` (images, height, width, 3) of uint8, in .tar a WebDataset shard; any
    other is a folder, made if need be. None is the current folder.

    Args:
        out: as typed.
        several: whether there is, or may be, more than one image.
        archives: whether .npz and .tar are written.

    Raises:
        UsageError: the sink cannot hold these images.
    """
    path, kind = Path(out or "."), _kind(out, archives)
    if kind == "stream":
        return StreamSink(path, several)
    if kind == ".npz":
        return NpzSink(path)
    if kind == ".tar":
        return TarSink(path)
    if kind == "folder":
        return FolderSink(path)
    if several:
        others = "a folder, .npz, .tar," if archives else "a folder"
        raise UsageError(f"--out {out} is one file, but there are several images; use {others} or - for a tar stream")
    return FolderSink(path.parent, path.name)


def check_sink(out: str | None, *, archives: bool = True) -> None:
    """Check that the place that `--out` names can be written, without touching it.

    Raises:
        UsageError: there is no such kind of output.
        RunError: it cannot be written.
    """
    path, kind = Path(out or "."), _kind(out, archives)
    if kind == "folder":
        there = next((folder for folder in (path, *path.parents) if kind_there(folder) != "nothing"), path)
        check_folder(there, path)
    elif kind != "stream":
        check_writable(path)


def _kind(out: str | None, archives: bool) -> str:
    """Which kind of output `--out` names: "stream", "folder", ".png", ".npz" or ".tar"."""
    path = Path(out or ".")
    there = kind_there(path)
    if path == STANDARD_OUTPUT or there == "device":
        return "stream"
    if there == "folder" or (out or "").endswith(("/", "\\")):
        return "folder"
    ending = path.suffix.lower()
    if ending == ".png" or (archives and ending in (".npz", ".tar")):
        return ending
    if ending in _OTHER_FILES or there == "file":
        endings = "a name ending in .png, .npz or .tar" if archives else "a name ending in .png"
        raise UsageError(f"--out must be a folder, {endings}, or - for standard output (got {out})")
    return "folder"


_OTHER_FILES = frozenset(
    (
        *(".apng", ".avif", ".bmp", ".dib", ".dng", ".eps", ".exr", ".gif", ".hdr", ".heic", ".heif", ".ico", ".j2k"),
        *(".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jxl", ".pbm", ".pcx", ".pdf", ".pgm", ".pnm", ".ppm", ".ps"),
        *(".psd", ".qoi", ".svg", ".tga", ".tif", ".tiff", ".webp", ".xcf"),
        *(".mkv", ".mov", ".mp4", ".webm"),
        *(".7z", ".bz2", ".gz", ".npy", ".npz", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst"),
        *(".bak", ".csv", ".json", ".jsonl", ".parquet", ".pt", ".pth", ".safetensors", ".tmp", ".txt"),
    )
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


def check_outputs(
    out: str | None,
    grid: Path | None = None,
    growth: Path | None = None,
    *,
    archives: bool = True,
    inputs: Sequence[str] = (),
) -> None:
    """Check that everything to be written can be, before anything is downloaded or computed.

    Args:
        out: as typed.
        grid: where a contact sheet goes.
        growth: where the growing image goes.
        archives: whether .npz and .tar are written.
        inputs: files that are read, which none of these may replace.

    Raises:
        UsageError: a name is of no kind that can be written, is an input, or is given twice.
        RunError: a place cannot be written.
    """
    check_sink(out, archives=archives)
    files = {"out": out if _kind(out, archives) not in ("folder", "stream") else None, "grid": grid, "growth": growth}
    given = {option: Path(path) for option, path in files.items() if path}
    for option, path in given.items():
        check_not_read(option, path, inputs)
    if len({path.resolve() for path in given.values()}) < len(given):
        options = " and ".join(f"--{option} {path}" for option, path in given.items())
        raise UsageError(f"{options} must be different files")
    if grid:
        check_file("grid", grid, (".png",))
    if growth:
        check_file("growth", growth, (".png", ".gif"))
