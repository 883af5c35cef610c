"""Files are there whole or not at all, on the disk, and a killed attempt's rest goes with the next one."""

import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from varcli.files import read_in_pieces, replacing


def write(path, content):
    with replacing(path) as temporary:
        temporary.write_text(content)


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "x.txt"
    for content in ("old", "new"):
        write(path, content)
        assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyError, KeyboardInterrupt])
def test_a_failed_write_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


ELSEWHERE = """
import sys
from pathlib import Path
from varcli.files import read_in_pieces, replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("elsewhere")
    print("writing", flush=True)
    sys.stdin.read(1)
"""


def elsewhere(path):
    """Begin to write a file in another process, which finishes it when it is told to."""
    words = [sys.executable, "-c", ELSEWHERE, str(path)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    return process


def test_several_processes_may_write_one_name_at_once(tmp_path):
    path = tmp_path / "x.txt"
    other = elsewhere(path)
    write(path, "here")
    assert path.read_text() == "here"
    other.communicate(b"!")
    assert other.returncode == 0 and path.read_text() == "elsewhere"
    assert list(tmp_path.iterdir()) == [path]


def test_several_threads_may_write_one_name_at_once(tmp_path):
    path, together = tmp_path / "x.txt", Barrier(4)

    def once(content):
        with replacing(path) as temporary:
            temporary.write_text(content)
            together.wait(20)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(once, "abcd"))
    assert path.read_text() in set("abcd")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="which processes run cannot be asked there")
def test_what_a_killed_write_left_goes_with_the_next_one(tmp_path):
    killed, at_work = elsewhere(tmp_path / "x.txt"), elsewhere(tmp_path / "y.txt")
    killed.kill()
    killed.communicate()
    assert len(list(tmp_path.iterdir())) == 2
    write(tmp_path / "x.txt", "whole")
    at_work.communicate(b"!")
    assert at_work.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.txt", "y.txt"]


def test_a_temporary_folder_of_another_machine_goes_when_it_is_old(tmp_path):
    old, new = (tmp_path / f".varcli-{name * 16}-0f0f-1-1.tmp" for name in "ab")
    for left in (old, new):
        left.mkdir()
        (left / "half").write_text("ha")
    os.utime(old, (0, 0))
    write(tmp_path / "x.txt", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [new.name, "x.txt"]


def test_a_full_folder_is_looked_through_once(tmp_path, monkeypatch):
    looked, iterdir = [], Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: looked.append(self) or iterdir(self))
    for name in "abc":
        write(tmp_path / name, name)
    assert looked == [tmp_path]


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "x.txt", []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append((os.fstat(number).st_size, path.exists())))
    write(path, "12345")
    assert synced == [(5, False)]


@pytest.mark.skipif(os.name == "nt", reason="no umask")
@pytest.mark.parametrize("most", [0, 5, 40_000])
def test_what_is_read_in_pieces_takes_no_more_memory_than_there_is(most):
    asked = []

    class File(io.BytesIO):
        def read(self, size):
            asked.append(size)
            return super().read(size)

    content = os.urandom(20_000)
    assert read_in_pieces(File(content), most) == content[:most]
    assert max(asked) <= 1 << 14


def test_permissions_follow_the_umask(tmp_path):
    kept = os.umask(0o027)
    try:
        with replacing(tmp_path / "x.txt") as temporary:
            temporary.chmod(0o600)  # as safetensors makes its files
    finally:
        os.umask(kept)
    assert (tmp_path / "x.txt").stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(os.name == "nt", reason="names are counted in other units")
@pytest.mark.parametrize("name", ["x" * 251 + ".txt", "é" * 127, os.fsdecode(b"\xff.txt")])
def test_any_name_can_be_written(tmp_path, name):
    write(tmp_path / name, "whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "absent" / "x.txt", "whole")
