"""Released checkpoints from the Hugging Face hub: resumed, checked, converted.

The hub's library does not resume a download in another process, so the bytes are fetched here, into their path in its
cache.
"""

import re
from contextlib import ExitStack
from pathlib import Path

import huggingface_hub as hub
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (  # type: ignore[attr-defined, unused-ignore]  # public, but exported lazily
    build_hf_headers,
    disable_progress_bars,
)

from varcli.checkpoints.conversion import convert
from varcli.checkpoints.registry import Entry, SourceFile, cache_folder
from varcli.checkpoints.safetensors_io import checkpoint_sha256, load_header
from varcli.console import note
from varcli.downloads import TIMEOUT, one_at_a_time, patiently, record, recorded, transfer, translated
from varcli.errors import CheckpointError


def download(entry: Entry, progress: bool = True) -> Path:
    """Return the converted file of a released checkpoint, having downloaded what is missing.

    Raises:
        CheckpointError: the hub cannot be reached, or gives other bytes than expected.
        RunError: the disk is full, or the cache cannot be written.
    """
    if not progress:
        disable_progress_bars()
    if not entry.commercial:
        note(f"{entry.name} is for non-commercial use only: its licence is {entry.licence}, see {entry.source}")
    names = " ".join(file.name for file in entry.files)
    advice = (
        "go online or set HF_ENDPOINT to a mirror and try again, or bring its files and run: "
        f"var checkpoints convert {names} --out FILE"
    )
    with ExitStack() as lock:
        with translated(entry.name, constants.ENDPOINT, advice):
            lock.enter_context(one_at_a_time(cache_folder()))
            fetched = [] if entry.path.exists() else [fetch(file) for file in entry.files]
        if fetched:
            hashes = {file.name: recorded_sha256(file) for file in entry.files}
            convert(fetched, entry.path, run={"source": entry.source, "sha256": hashes})
            record(cache_folder(), entry.path.name, load_header(entry.path)[1]["sha256"])
    return entry.path


def fetch(file: SourceFile) -> Path:
    """Return a file of the hub, from its cache or downloaded into it, checked either way.

    Raises:
        CheckpointError: its sha256 is not the expected one.
    """
    found = hub.try_to_load_from_cache(file.repository, file.name)
    if not isinstance(found, str):
        return _transfer(file)
    path = Path(found)
    try:
        sha256 = check(file, path, path.resolve().name)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete {path} to download it again") from error
    if not recorded_sha256(file):
        record(cache_folder(), file.name, sha256)
    return path


def _transfer(file: SourceFile) -> Path:
    """Download a file into the hub's cache, resuming an earlier attempt."""
    url = hub.hf_hub_url(file.repository, file.name)
    about = patiently(lambda: hub.get_hf_file_metadata(url, timeout=TIMEOUT))
    etag = about.etag or ""
    if not re.fullmatch("[0-9a-f]{32,64}", etag):  # it names a file here
        raise OSError(f"{url} is not on a hub: its ETag is no hash")
    expected = recorded_sha256(file)
    if expected and _is_sha256(etag) and etag != expected:
        raise CheckpointError(f"the hub has another file {file.name}: its sha256 is {etag}, not {expected}")
    folder = repo_folder_name(repo_id=file.repository, repo_type="model")
    part = Path(constants.HF_HUB_CACHE) / folder / "blobs" / f"{etag}.incomplete"
    transfer(url, part, about.size, file.name, build_hf_headers())
    try:
        found = check(file, part, etag)
    except CheckpointError:
        part.unlink()
        raise
    part.replace(part.with_name(etag))
    if not recorded_sha256(file):
        record(cache_folder(), file.name, found)
    return Path(hub.hf_hub_download(file.repository, file.name))


def check(file: SourceFile, path: Path, reported: str) -> str:
    """Check a file's sha256 against the known one or, failing that, the one that the hub reports; return it.

    Raises:
        CheckpointError: it differs.
    """
    found = checkpoint_sha256(path)
    expected = recorded_sha256(file) or (reported if _is_sha256(reported) else found)
    if found != expected:
        raise CheckpointError(f"{file.name} has sha256 {found} instead of {expected}")
    return found


def recorded_sha256(file: SourceFile) -> str | None:
    """Return the expected sha256 of a file: the registry's, or that of its first download here."""
    return file.sha256 or recorded(cache_folder()).get(file.name)


def _is_sha256(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", text) is not None
