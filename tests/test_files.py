"""Files are there whole or not at all, on the disk, and a killed attempt's rest goes with the next one."""

import os

import pytest

from varcli.files import draft_name, replacing


def write(path, content):
    with replacing(path) as draft:
        draft.write_text(content)


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
    with pytest.raises(error), replacing(path) as draft:
        draft.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_write_left_goes_with_the_next_one(tmp_path):
    left = tmp_path / draft_name(tmp_path / "x.txt")
    left.mkdir()
    (left / "half").write_text("left by a killed process")
    write(tmp_path / "x.txt", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "x.txt", []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append((os.fstat(number).st_size, path.exists())))
    write(path, "12345")
    assert synced == [(5, False)]


@pytest.mark.skipif(os.name == "nt", reason="no umask")
def test_permissions_follow_the_umask(tmp_path):
    kept = os.umask(0o027)
    try:
        with replacing(tmp_path / "x.txt") as draft:
            draft.chmod(0o600)  # as safetensors makes its files
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
