"""Archives: .npz and .tar that grow without memory, survive any death, and go on bit for bit."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from support.provenances import image, listing, made
from varcli.errors import InputError, RunError
from varcli.images.provenance import png_bytes
from varcli.outputs.archives import _npy_header
from varcli.outputs.open import open_sink

KINDS = ["x.npz", "x.tar"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(out, seeds, resume=False):
    """Put images into an archive as the sampler does; return the seeds that were not there."""
    with open_sink(out, several=True, resume=resume) as output:
        missing = [seed for seed in seeds if not output.has(made(seed))]
        for seed in missing:
            assert output.add(image(seed), made(seed)) is None
    return missing


def interrupted(out, seeds, resume=False):
    """Put images into an archive and be stopped before the end."""
    with pytest.raises(KeyboardInterrupt), open_sink(out, several=True, resume=resume) as output:
        for seed in seeds:
            output.add(image(seed), made(seed))
        raise KeyboardInterrupt


@pytest.fixture(params=KINDS)
def whole(request, here):
    """An archive of six images: its name and bytes."""
    put(request.param, range(6))
    content = (here / request.param).read_bytes()
    (here / request.param).unlink()
    return request.param, content


# --- what is in them -------------------------------------------------------------------------------


def test_npz_is_what_fid_toolkits_read(here):
    put("x.npz", range(5))
    assert listing(here) == ["x.npz"]
    with np.load("x.npz") as stored:
        pixels = stored["arr_0"]
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, [image(seed) for seed in range(5)])
    with zipfile.ZipFile("x.npz") as stored:
        assert stored.testzip() is None
        lines = stored.read("provenance.jsonl").decode().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == list(range(5))


@pytest.mark.parametrize("count", [0, 1, 50000, 10**12])
@pytest.mark.parametrize("side", [8, 1024])
def test_header_has_one_length_and_numpy_reads_it(count, side):
    header = _npy_header(count, (side, side, 3))
    assert len(header) == 128
    file = io.BytesIO(header)
    assert np.lib.format.read_magic(file) == (1, 0)
    assert np.lib.format.read_array_header_1_0(file) == ((count, side, side, 3), False, np.dtype(np.uint8))
    assert file.tell() == 128


def test_shard_is_what_webdataset_reads(here):
    with open_sink("x.tar", several=True) as output:
        output.add(image(0), made(0))
        output.add(image(1), made(1, class_id=None, class_name="none"))
    assert output.archive == Path("x.tar")
    assert listing(here) == ["x.tar"]
    with tarfile.open("x.tar") as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar}
    assert list(found) == [f"00000{i}.{ending}" for i in (0, 1) for ending in ("png", "cls", "json")]
    assert found["000000.png"] == png_bytes(image(0), made(0))
    assert (found["000000.cls"], found["000001.cls"]) == (b"207", b"-1")
    assert json.loads(found["000001.json"])["class_id"] is None


@pytest.mark.parametrize("out", KINDS)
def test_equal_images_make_equal_archives(here, out):
    put(out, range(3))
    first = (here / out).read_bytes()
    put(out, range(3))
    assert (here / out).read_bytes() == first


@pytest.mark.parametrize("out", KINDS)
def test_no_image_makes_no_archive(here, out):
    put(out, [])
    assert listing(here) == []
    with open_sink(out, several=True) as output:
        assert listing(here) != []  # tried before any image is made
    assert output.archive is not None


@pytest.mark.slow
@pytest.mark.parametrize("out", KINDS)
def test_memory_stays_flat(here, out):
    output = open_sink(out, several=True)
    output.add(image(0, 64, 64), made(0))
    tracemalloc.start()
    for seed in range(400):
        output.add(np.full((64, 64, 3), seed % 256, np.uint8), made(seed))
    output.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if out == "x.npz":
        assert (here / out).stat().st_size > 400 * 64 * 64 * 3
    assert peak < 2.5 * 2**20  # chunks of 1 MiB, and not a byte an image; the images are 5 MB


# --- resume ----------------------------------------------------------------------------------------


def test_interrupted_archive_goes_on_bit_for_bit(whole, here):
    out, content = whole
    interrupted(out, range(4))
    assert out not in listing(here)
    assert put(out, range(6), resume=True) == [4, 5]
    assert (here / out).read_bytes() == content
    assert listing(here) == [out]


def test_without_resume_a_part_is_begun_anew(whole, here):
    out, content = whole
    interrupted(out, [7, 8, 9])
    assert put(out, range(6)) == list(range(6))
    assert (here / out).read_bytes() == content
    assert listing(here) == [out]


def test_part_cut_anywhere_goes_on_bit_for_bit(whole, here):
    out, content = whole
    interrupted(out, range(4))
    names = [name for name in listing(here) if name.startswith(out)]
    parts = {name: (here / name).read_bytes() for name in names}
    for name, part in parts.items():
        for length in {0, 1, 100, 128, 129, 511, 512, len(part) - 1, *range(0, len(part), 333)}:
            for other, bytes_ in parts.items():
                (here / other).write_bytes(bytes_)
            (here / name).write_bytes(part[:length])
            missing = put(out, range(6), resume=True)
            assert missing[-2:] == [4, 5]
            assert missing == list(range(missing[0], 6))
            assert (here / out).read_bytes() == content
            assert listing(here) == [out]


def test_one_of_the_two_files_of_an_npz_part_is_gone(here):
    put("y.npz", range(6))
    for gone in ("x.npz.part", "x.npz.part.jsonl"):
        interrupted("x.npz", range(4))
        (here / gone).unlink()
        put("x.npz", range(6), resume=True)
        assert (here / "x.npz").read_bytes() == (here / "y.npz").read_bytes()
        (here / "x.npz").unlink()


def test_whole_archive_is_left_alone(whole, here):
    out, content = whole
    (here / out).write_bytes(content)
    before = (here / out).stat()
    assert put(out, range(6), resume=True) == []
    assert (here / out).stat().st_mtime_ns == before.st_mtime_ns
    assert listing(here) == [out]


def test_whole_archive_takes_more_images(whole, here):
    out, content = whole
    put(out, range(3))
    assert put(out, range(6), resume=True) == [3, 4, 5]
    assert (here / out).read_bytes() == content
    assert listing(here) == [out]


@pytest.mark.parametrize("out", KINDS)
def test_old_archive_stays_until_the_new_one_is_whole(here, out):
    put(out, range(3))
    before = (here / out).read_bytes()
    interrupted(out, range(5))
    assert (here / out).read_bytes() == before


@pytest.mark.parametrize("content", [b"\xff{", b"[" * 100_000, b"", None], ids=["no text", "deep", "empty", "link"])
def test_a_shard_of_damaged_provenance_is_not_taken_up(here, content):
    put("x.tar", range(2))
    with tarfile.open("x.tar") as old, tarfile.open("new.tar", "w") as new:
        for member in old:
            taken = old.extractfile(member).read()
            if member.name == "000000.json":
                member.type = tarfile.LNKTYPE if content is None else member.type
                taken, member.linkname = content or b"", "/etc/passwd" if content is None else ""
            member.size = len(taken)
            new.addfile(member, io.BytesIO(taken))
    Path("new.tar").replace("x.tar")
    before = Path("x.tar").read_bytes()
    with pytest.raises(InputError, match=r"^the provenance of x\.tar is damaged"):
        put("x.tar", range(3), resume=True)
    assert Path("x.tar").read_bytes() == before and listing(here) == ["x.tar"]


NPZ_DAMAGE = {
    "encrypted": (1, (b"PK\3\4", 6), (b"PK\1\2", 8)),
    "unknown method": (77, (b"PK\3\4", 8), (b"PK\1\2", 10)),
    "provenance": (0xFF, (b'"class_id"', 0)),
    "a pixel": (0xAA, (b"\x93NUMPY", 200)),
}


@pytest.mark.parametrize(("byte", "places"), [(byte, places) for byte, *places in NPZ_DAMAGE.values()], ids=NPZ_DAMAGE)
def test_a_damaged_npz_is_not_taken_up(here, byte, places):
    """Where its last member is encrypted or packed by an unknown method, or bytes were changed."""
    put("x.npz", range(2))
    content = bytearray(Path("x.npz").read_bytes())
    for mark, offset in places:
        content[content.rindex(mark) + offset] = byte
    Path("x.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.npz is damaged"):
        put("x.npz", range(3), resume=True)
    assert Path("x.npz").read_bytes() == content and listing(here) == ["x.npz"]


def test_an_npz_whose_provenance_unpacks_without_end_is_not_taken_up(here):
    put("x.npz", range(2))
    with zipfile.ZipFile("x.npz") as old, zipfile.ZipFile("y.npz", "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr("arr_0.npy", old.read("arr_0.npy"))
        new.writestr("provenance.jsonl", bytes(1 << 20))
    with pytest.raises(InputError, match=r"y\.npz is damaged"):
        put("y.npz", range(3), resume=True)


@pytest.mark.parametrize("out", KINDS)
def test_image_asked_for_twice_is_there_twice(here, out):
    interrupted(out, [0])
    assert put(out, [0, 0, 1], resume=True) == [0, 1]


@pytest.mark.parametrize("out", KINDS)
def test_images_of_other_settings_are_not_mixed_in(here, out):
    interrupted(out, range(2))
    for finished in (False, True):
        with (
            pytest.raises(InputError, match="another checkpoint or other settings"),
            open_sink(out, several=True, resume=True) as output,
        ):
            output.has(made(0, cfg=4.0))
        if not finished:
            put(out, range(3), resume=True)


def test_images_of_another_size_are_not_mixed_in(here):
    with pytest.raises(InputError, match=r"\(8, 8, 3\)"), open_sink("x.npz", several=True) as output:
        output.add(image(0), made(0))
        output.add(image(1, 9, 9), made(1))


DYING = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
from support.provenances import made, image
from varcli.outputs.open import open_sink
with open_sink(sys.argv[1], several=True, resume=True) as output:
    for seed in range(6):
        if not output.has(made(seed)):
            output.add(image(seed), made(seed))
        if seed == 3:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name == "nt", reason="no such signal")
def test_killed_process_loses_nothing(whole, here):
    out, content = whole
    code = DYING.format(tests=str(Path(__file__).parent))
    assert subprocess.run([sys.executable, "-c", code, out], check=False).returncode == -signal.SIGKILL
    assert out not in listing(here)
    assert put(out, range(6), resume=True) == [4, 5]
    assert (here / out).read_bytes() == content


# --- a full disk -----------------------------------------------------------------------------------


def test_full_disk_keeps_what_is_done(whole, here):
    resource = pytest.importorskip("resource")
    out, content = whole
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(RunError, match=r"x\.\w+\.part, and --resume continues$") as caught:
        try:
            with open_sink(out, several=True) as output:
                for seed in range(6):
                    if seed == 3:
                        here_now = (here / f"{out}.part").stat().st_size
                        resource.setrlimit(resource.RLIMIT_FSIZE, (here_now + 100, limits[1]))
                    output.add(image(seed), made(seed))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value).startswith(f"{out} cannot be written: File too large; ")
    assert out not in listing(here)
    assert put(out, range(6), resume=True) == [3, 4, 5]
    assert (here / out).read_bytes() == content
    assert listing(here) == [out]


def test_disk_full_at_the_very_end_keeps_what_is_done(here, monkeypatch):
    put("y.npz", range(3))
    with monkeypatch.context() as patch, pytest.raises(RunError, match=r"No space left.*--resume"):
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        put("x.npz", range(3))
    assert listing(here) == ["x.npz.part", "x.npz.part.jsonl", "y.npz"]
    assert put("x.npz", range(3), resume=True) == []
    assert (here / "x.npz").read_bytes() == (here / "y.npz").read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="no file can be removed there while it is held")
def test_nobody_loses_the_lock_to_the_one_who_leaves(here, monkeypatch):
    """Its file is gone before it is released: afterwards it may be the next one's."""
    there, release = [], FileLock.release
    monkeypatch.setattr(FileLock, "release", lambda lock: there.append(Path(lock.lock_file).exists()) or release(lock))
    put("x.npz", range(2))
    assert there == [False]
    assert listing(here) == ["x.npz"]


@pytest.mark.skipif(os.name == "nt", reason="no file can be removed there while it is held")
@pytest.mark.parametrize("out", KINDS)
def test_the_archive_has_its_name_before_another_may_begin(here, monkeypatch, out):
    there, release = [], FileLock.release
    monkeypatch.setattr(FileLock, "release", lambda lock: there.append(listing(here)) or release(lock))
    put(out, range(2))
    assert there == [[out]]


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError()])
def test_file_systems_without_locks_are_one_line(here, monkeypatch, error):
    def refuse(self, *arguments, **options):
        Path(self.lock_file).touch()
        raise error

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(RunError, match=r"cannot be locked \(.*\): choose a folder on another file system"):
        put("x.tar", [0])
    assert listing(here) == []


def test_two_writers_of_one_archive_are_refused(tmp_path):
    with open_sink(str(tmp_path / "both.tar"), several=True), pytest.raises(RunError, match="by another process"):
        open_sink(str(tmp_path / "both.tar"), several=True)
    assert list(tmp_path.iterdir()) == []
