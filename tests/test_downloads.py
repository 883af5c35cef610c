"""Files of a known address, from a server on this machine: resumed, checked, once, and explained when they fail."""

import hashlib
import json
import threading
import time

import pytest

from support import loopback_hub as fake_hub
from varcli import downloads
from varcli.downloads import fetch
from varcli.errors import CheckpointError, RunError

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SIZE = len(CONTENT)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with fake_hub.running() as server:
        server.files = {"x.npz": CONTENT}
        yield server


def get(server, folder, name="x.npz", size=SIZE, sha256=SHA256):
    address = f"{server.url}/FoundationVision/var/resolve/main/{name}"  # redirected, as release files are
    return fetch(address, folder / name, size=size, sha256=sha256, advice="bring it", progress=False)


@pytest.mark.parametrize("size", [SIZE, None])
def test_it_comes_whole_and_once(server, tmp_path, size):
    path = get(server, tmp_path / "cache", size=size)
    assert path.read_bytes() == CONTENT
    assert server.log == [("x.npz", None)]
    assert get(server, tmp_path / "cache", size=size) == path
    assert len(server.log) == 1
    assert [file.name for file in path.parent.iterdir() if file.suffix != ".lock"] == ["x.npz"]


@pytest.mark.parametrize("size", [SIZE, None])
def test_killed_download_is_resumed(server, tmp_path, size):
    (tmp_path / "x.npz.part").write_bytes(CONTENT[:4000])
    assert get(server, tmp_path, size=size).read_bytes() == CONTENT
    assert server.log == [("x.npz", "bytes=4000-")]


def test_broken_connection_is_resumed(server, tmp_path, monkeypatch):
    server.break_after = 1000
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.log == [("x.npz", None), ("x.npz", "bytes=1000-")]


@pytest.mark.parametrize("size", [SIZE, None])
def test_a_line_that_breaks_often_still_gets_there(server, tmp_path, size):
    """The hub's own transfer would ask for the whole file each time: it writes in steps of 10 MB."""
    server.break_every = 1000
    assert get(server, tmp_path, size=size).read_bytes() == CONTENT
    assert server.log == [("x.npz", f"bytes={start}-" if start else None) for start in range(0, SIZE, 1000)]


def test_what_came_before_a_lasting_break_is_kept(server, tmp_path, monkeypatch):
    server.break_every = 1000
    monkeypatch.setattr(time, "sleep", lambda seconds: setattr(server, "break_every", 0))
    monkeypatch.setattr(downloads, "WAITS", (1,))
    with pytest.raises(CheckpointError, match="cannot download"):
        get(server, tmp_path)
    assert (tmp_path / "x.npz.part").read_bytes() == CONTENT[:1000]
    server.break_every = None
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.log[-1] == ("x.npz", "bytes=1000-")


@pytest.mark.parametrize("status", downloads.BUSY)
def test_a_busy_server_is_asked_again(server, tmp_path, status):
    server.refusals = [status, status]
    assert get(server, tmp_path).read_bytes() == CONTENT
    server.refusals = [status] * 100
    with pytest.raises(CheckpointError, match=f"cannot download y.npz from .*{status}"):
        get(server, tmp_path, "y.npz")
    assert len(server.refusals) == 100 - 1 - len(downloads.WAITS)


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_told_at_once(server, tmp_path, status):
    server.refusals = [status]
    with pytest.raises(CheckpointError, match=f"cannot download x.npz from .*{status}"):
        get(server, tmp_path)
    assert server.refusals == [] and server.log == []


def test_a_server_that_says_nothing_is_not_waited_for(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "TIMEOUT", 0.1)
    server.silent = True
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=r"cannot download x\.npz from .*timed out"):
        get(server, tmp_path)
    assert time.monotonic() - begun < 5


def test_compressed_bytes_are_unpacked(server, tmp_path):
    server.gzipped = True
    assert get(server, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("known", [True, False])
def test_more_than_there_is_to_come_is_refused_and_not_kept(server, tmp_path, monkeypatch, gzipped, known):
    """A small answer may unpack to a disk full of zeros."""
    monkeypatch.setattr(downloads, "LARGEST", SIZE)
    server.gzipped, server.more = gzipped, bytes(10 * SIZE)
    monkeypatch.setattr(downloads, "_size", lambda address, size: size)
    with pytest.raises(CheckpointError, match=f"the server sends more than {SIZE} bytes"):
        get(server, tmp_path, size=SIZE if known else None)
    assert (tmp_path / "x.npz.part").stat().st_size == 0


@pytest.mark.parametrize("size", [SIZE, None])
def test_part_that_had_all_but_its_name(server, tmp_path, size):
    (tmp_path / "x.npz.part").write_bytes(CONTENT)
    assert get(server, tmp_path, size=size).read_bytes() == CONTENT
    assert server.log == []


@pytest.mark.parametrize("left", [b"rubbish", CONTENT + b"more"])
def test_a_damaged_part_is_not_believed(server, tmp_path, left):
    (tmp_path / "x.npz.part").write_bytes(left)
    if len(left) < SIZE:
        with pytest.raises(CheckpointError, match=r"x\.npz has sha256 [0-9a-f]{64} instead of .*; bring it"):
            get(server, tmp_path)
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_other_bytes_than_known_are_refused_and_not_kept(server, tmp_path):
    with pytest.raises(CheckpointError, match="has sha256"):
        get(server, tmp_path, sha256="0" * 64)
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".lock"] == []


def test_another_length_than_known_is_refused_before_the_transfer(server, tmp_path):
    with pytest.raises(CheckpointError, match=rf"x\.npz is another file: it has {SIZE} bytes instead of 5"):
        get(server, tmp_path, size=5)
    assert server.log == []


def test_offline_is_told_at_once_and_leaves_nothing(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it was tried again"))
    with pytest.raises(
        CheckpointError, match=r"cannot download x\.npz from http://127\.0\.0\.1:9/x\.npz: .*; bring it"
    ):
        fetch("http://127.0.0.1:9/x.npz", tmp_path / "x.npz", size=5, sha256=None, advice="bring it")
    assert caplog.text == ""
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".lock"] == []


def test_unknown_hash_is_recorded_at_the_first_download(server, tmp_path):
    path = get(server, tmp_path, sha256=None)
    assert json.loads((tmp_path / "sha256.json").read_text()) == {"x.npz": SHA256}
    path.unlink()
    server.files["x.npz"] = CONTENT[::-1]
    with pytest.raises(CheckpointError, match=f"has sha256 .* instead of {SHA256}"):
        get(server, tmp_path, sha256=None)


def test_file_that_changed_here_is_noticed(server, tmp_path):
    path = get(server, tmp_path)
    path.write_bytes(b"changed")
    with pytest.raises(CheckpointError, match=r"has sha256 .*; delete .*x\.npz to download it again"):
        get(server, tmp_path)


def test_two_at_once_download_once(server, tmp_path):
    threads = [threading.Thread(target=get, args=(server, tmp_path)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.log == [("x.npz", None)]


def test_it_is_gone_from_the_server(server, tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot download y\.npz from http://127.*404.*; bring it") as caught:
        get(server, tmp_path, "y.npz")
    assert "\n" not in str(caught.value)


def test_full_disk(server, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads, "_receive", full)
    with pytest.raises(
        RunError, match=r"cannot store x\.npz: No space left on device; the bytes received so far are kept"
    ):
        get(server, tmp_path)


def test_no_token_leaves_for_other_hosts(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    sent = []
    original = fake_hub.Handler.answer

    def answer(self):
        sent.append(self.headers.get("Authorization"))
        original(self)

    monkeypatch.setattr(fake_hub.Handler, "answer", answer)
    get(server, tmp_path, size=None)
    assert sent
    assert set(sent) == {None}
