"""Files with a known address: resumed after a break, checked, there whole or not at all.

The transfer is the Hugging Face hub's own, which knows proxies, retries and ranges, whatever host it is for.
"""

import contextlib
import errno
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub.file_download import http_get
from huggingface_hub.utils import (  # type: ignore[attr-defined, unused-ignore]  # public, but exported lazily
    WeakFileLock,
    disable_progress_bars,
    get_session,
)

from varcli.errors import CheckpointError, RunError, VarError
from varcli.files import file_sha256, replacing

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)


def fetch(
    address: str, path: Path, *, size: int | None, sha256: str | None, advice: str, progress: bool = True
) -> Path:
    """Return `path`, having downloaded it from `address` if it was not there, checked either way.

    Args:
        address: where it comes from.
        path: where it belongs, with the name it is known by.
        size: in bytes, None where not known.
        sha256: of its bytes; None takes that of its first download here, which is kept beside it.
        advice: ends the message where it cannot be had: how to bring it otherwise.
        progress: show a bar on stderr, if that is a terminal.

    Raises:
        CheckpointError: the server cannot be reached or has another file, or the file here has changed.
        RunError: it cannot be stored.
    """
    if not progress:
        disable_progress_bars()
    with translated(path.name, address, advice), one_at_a_time(path.parent):
        if path.is_file():
            _check_hash(path, path, sha256, f"delete {path} to download it again")
            return path
        part = path.with_name(path.name + ".part")
        transfer(address, part, _size(address, size), path.name)
        try:
            _check_hash(part, path, sha256, advice)
        except CheckpointError:
            part.unlink()
            raise
        part.replace(path)
    return path


def transfer(address: str, part: Path, size: int | None, name: str, headers: Mapping[str, str] | None = None) -> None:
    """Bring a file's bytes to `part`, going on where an earlier attempt stopped; `name` is for the bar."""
    part.parent.mkdir(parents=True, exist_ok=True)
    if part.exists() and part.stat().st_size > (size or 0):
        part.unlink()
    with part.open("ab") as file:
        got, sent = file.tell(), dict(headers or {})
        http_get(address, file, resume_size=got, headers=sent, expected_size=size, displayed_filename=name)


def recorded(folder: Path) -> dict[str, str]:
    """Return the sha256 that files had at their first download, by name."""
    try:
        return dict(json.loads((folder / _RECORD).read_text()))
    except (OSError, ValueError):
        return {}


def record(folder: Path, name: str, sha256: str) -> None:
    """Keep the sha256 of a file for later downloads."""
    with replacing(folder / _RECORD) as temporary:
        temporary.write_text(json.dumps(recorded(folder) | {name: sha256}, indent=1, sort_keys=True))


_RECORD = "sha256.json"


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait for other processes that download to a folder: the second one then finds everything there."""
    folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder / "download.lock"):
        yield


@contextlib.contextmanager
def translated(name: str, where: str, advice: str) -> Iterator[None]:
    """Turn what network and disk may raise into one line that says what to do."""
    try:
        yield
    except VarError:
        raise
    except Exception as error:  # the hub's library has changed what it raises with every major version
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        why = str(text).splitlines()[0].rstrip(".")
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise RunError(f"cannot store {name}: {why}; what came so far is kept") from error
        raise CheckpointError(f"cannot download {name} from {where}: {why}; {advice}") from error


def _check_hash(there: Path, path: Path, sha256: str | None, advice: str) -> None:
    """Hold a file's bytes to the sha256 known, or recorded at its first download; record it if new.

    Raises:
        CheckpointError: it is another one.
    """
    found = file_sha256(there)
    expected = sha256 or recorded(path.parent).get(path.name)
    if expected and found != expected:
        raise CheckpointError(f"{path.name}: wrong sha256 {found}; it should be {expected}; {advice}")
    if not expected:
        record(path.parent, path.name, found)


def _size(address: str, known: int | None) -> int | None:
    """Return a file's size in bytes as its server says, which is asked once: offline it is to be told at once.

    Raises:
        CheckpointError: it is not the size known.
    """
    answer = get_session().head(address, follow_redirects=True)
    answer.raise_for_status()
    length = int(answer.headers.get("Content-Length", known or 0))
    if known and length != known:
        raise CheckpointError(f"{address} is another file; {length} bytes, known are {known}")
    return length or None
