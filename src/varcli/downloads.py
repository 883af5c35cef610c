"""Downloads of files with a known address: resumed, checked, and complete or absent.

Requests to any host go through the Hugging Face hub's client, which handles proxies. Its own transfer is not used: it
writes in steps of 10 MB, and loses the current one when the connection breaks.
"""

import contextlib
import errno
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.utils import (  # type: ignore[attr-defined, unused-ignore]  # public, but exported lazily
    WeakFileLock,
    disable_progress_bars,
    get_session,
    tqdm,
)

from varcli.errors import CheckpointError, RunError, VarError
from varcli.files import file_sha256, parse_json, replacing

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)
TIMEOUT = 30.0
"""Seconds in which a server must answer."""
BUSY = (429, 500, 502, 503, 504)
"""Status codes after which a later try may succeed."""
WAITS = (1, 2, 4, 8)
"""Seconds before each further try."""
LARGEST = 64 * 10**9
"""Most bytes of a file of unknown size; the largest released checkpoint is 9 GB."""

Answer = TypeVar("Answer")


def fetch(
    address: str, path: Path, *, size: int | None, sha256: str | None, advice: str, progress: bool = True
) -> Path:
    """Download `path` from `address` unless it exists; check it either way, and return it.

    Args:
        address: where it comes from.
        path: where to store it.
        size: in bytes, None where not known.
        sha256: of its bytes; None takes that of its first download here, which is recorded beside it.
        advice: end of the error message: how else to get it.
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
            found = _check_hash(part, path, sha256, advice)
        except CheckpointError:
            part.unlink()
            raise
        part.replace(path)
        if not sha256:
            record(path.parent, path.name, found)
    return path


def transfer(address: str, part: Path, size: int | None, name: str, headers: Mapping[str, str] | None = None) -> None:
    """Download a file's bytes to `part`; received bytes are kept, and the next request is for the rest.

    Args:
        address: where it comes from.
        part: the unfinished file, of an earlier attempt or none.
        size: in bytes, None where not known; no more than that are taken.
        name: for the bar.
        headers: to send.
    """
    part.parent.mkdir(parents=True, exist_ok=True)
    if part.exists() and part.stat().st_size > (size or 0):
        part.unlink()
    part.touch()
    waits = iter(WAITS)
    with tqdm(total=size, initial=part.stat().st_size, desc=name, unit="B", unit_scale=True, disable=None) as bar:  # type: ignore[no-untyped-call]
        while size is None or part.stat().st_size < size:
            before = part.stat().st_size
            try:
                patiently(lambda: _receive(address, part, size, dict(headers or {}), bar.update))
            except Exception as error:
                if isinstance(error, OSError | VarError) or getattr(error, "response", None) is not None:
                    raise  # neither a broken connection nor a timeout
                if part.stat().st_size > before:
                    waits = iter(WAITS)  # with a connection that breaks often, it still completes
                wait = next(waits, None)
                if wait is None:
                    raise
                time.sleep(wait)
            else:
                if size is None:
                    return
                if part.stat().st_size == before:
                    raise OSError(f"the server ends after {before} of {size} bytes")


_PARTIAL = 206
"""Status code of an answer with the requested range."""


def _receive(
    address: str, part: Path, size: int | None, headers: Mapping[str, str], advance: Callable[[int], Any]
) -> None:
    """Append the answer of one request to an unfinished file."""
    got = part.stat().st_size
    sent = {**headers, "Accept-Encoding": "identity"} | ({"Range": f"bytes={got}-"} if got else {})
    with get_session().stream("GET", address, headers=sent, follow_redirects=True, timeout=TIMEOUT) as answer:
        answer.raise_for_status()
        goes_on = answer.headers.get("Content-Range", "").startswith(f"bytes {got}-")
        if answer.status_code == _PARTIAL and not goes_on:
            raise OSError("the server sends another part than requested")
        with part.open("ab") as file:
            if answer.status_code != _PARTIAL:
                file.truncate(0)  # the server does not support ranges
                advance(-got)
            for block in answer.iter_bytes():
                if file.tell() + len(block) > (size or LARGEST):
                    file.truncate(0)
                    raise OSError(f"the server sends more than {size or LARGEST} bytes")
                file.write(block)
                file.flush()
                advance(len(block))


def patiently(ask: Callable[[], Answer]) -> Answer:
    """Return the answer of a request, which is repeated after a while if the server is busy."""
    for wait in WAITS:
        try:
            return ask()
        except Exception as error:  # the hub's library has kinds of its own
            answer: Any = getattr(error, "response", None)
            if answer is None or answer.status_code not in BUSY:
                raise
            asked = str(answer.headers.get("Retry-After", ""))
            time.sleep(min(int(asked), TIMEOUT) if asked.isdecimal() and len(asked) < 9 else wait)
    return ask()


def recorded(folder: Path) -> dict[str, str]:
    """Return the sha256 of files at their first download, by name."""
    try:
        return dict(parse_json((folder / _RECORD).read_text()))
    except (OSError, ValueError, TypeError):
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
    """Turn errors of network and disk into one line that says what to do."""
    try:
        yield
    except VarError:
        raise
    except Exception as error:  # the hub's library has changed what it raises with every major version
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        why = str(text).splitlines()[0].rstrip(".")
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise RunError(f"cannot store {name}: {why}; the bytes received so far are kept") from error
        raise CheckpointError(f"cannot download {name} from {where}: {why}; {advice}") from error


def _check_hash(there: Path, path: Path, sha256: str | None, advice: str) -> str:
    """Check a file's sha256 against the known one, or that of its first download; return it.

    Raises:
        CheckpointError: it differs.
    """
    found = file_sha256(there)
    expected = sha256 or recorded(path.parent).get(path.name)
    if expected and found != expected:
        raise CheckpointError(f"{path.name} has sha256 {found} instead of {expected}; {advice}")
    return found


def _size(address: str, known: int | None) -> int | None:
    """Return a file's size in bytes as its server reports it, by a single request: being offline must show at once.

    Raises:
        CheckpointError: it is not the size known.
    """

    def ask() -> Any:
        sent = {"Accept-Encoding": "identity"}
        return get_session().head(address, headers=sent, follow_redirects=True, timeout=TIMEOUT).raise_for_status()

    length = int(patiently(ask).headers.get("Content-Length", known or 0))
    if known and length != known:
        raise CheckpointError(f"{address} is another file: it has {length} bytes instead of {known}")
    return length or None
