"""Where images are stored: folders, zips, tars, arrays and lists of files."""

import io
import os
import pickle
import tarfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from support.provenances import image, made
from varcli.errors import InputError
from varcli.images import sources as sources_module
from varcli.images.decode import UnreadableImage, decode_image, reading_image
from varcli.images.provenance import image_filename
from varcli.images.sources import FileListSource, FolderSource, NpzSource, TarSource, ZipSource, open_source
from varcli.outputs.open import open_sink
from varcli.outputs.sinks import TAR_END, tar_member


def tar(path, contents):
    with tarfile.open(path, "w") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, BytesIO(content))
    return TarSource(path)


SAMPLES = {"a/0.png": b"first", "a/0.cls": b"207", "a/0.json": b"{}", "a/1.v2.jpg": b"second one", "note.txt": b"no"}


def test_images_of_a_tar(tmp_path):
    source = tar(tmp_path / "x.tar", SAMPLES)
    assert list(source.members()) == [("a/0.png", 5), ("a/1.v2.jpg", 10)]
    assert source.read("a/1.v2.jpg") == b"second one"


def test_files_that_describe_an_image_in_a_tar(tmp_path):
    source = tar(tmp_path / "x.tar", SAMPLES | {"a/1.cls": b"3", "2.png": b"", "2.cls": b"4"})
    list(source.members())
    assert source.sidecar("a/0.png", "cls") == b"207"
    assert source.sidecar("a/1.v2.jpg", "cls") == b"3"  # WebDataset: the name ends at its first dot
    assert source.sidecar("2.png", "cls") == b"4"
    assert source.sidecar("2.png", "json") is None


def test_long_names_and_links_in_a_tar(tmp_path):
    name = "d" * 90 + "/" + "x" * 120 + ".png"
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        info = tarfile.TarInfo(name)
        info.size = 3
        archive.addfile(info, BytesIO(b"abc"))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, name
        archive.addfile(link)
    source = TarSource(tmp_path / "x.tar")
    assert list(source.members()) == [(name, 3)]
    assert source.read(name) == b"abc"


def test_shards_of_ours(tmp_path):
    with open_sink(str(tmp_path / "x.tar"), several=True) as shard:
        for seed in range(3):
            shard.add(image(seed), made(seed))
    source = TarSource(tmp_path / "x.tar")
    assert [name for name, _ in source.members()] == ["000000.png", "000001.png", "000002.png"]
    assert source.sidecar("000002.png", "cls") == b"207"


def test_files_by_their_paths(tmp_path):
    (tmp_path / "x").write_bytes(b"content")
    source = FileListSource([str(tmp_path / "x"), str(tmp_path / "absent")])
    assert list(source.members()) == [(str(tmp_path / "x"), 7), (str(tmp_path / "absent"), 0)]
    assert source.read(str(tmp_path / "x")) == b"content"
    with pytest.raises(FileNotFoundError):
        source.read(str(tmp_path / "absent"))


@pytest.fixture
def sources(tmp_path):
    """The same file in each kind of source, and its name there."""
    content = bytes(range(256)) * 300
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "x.png").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as stored:
        stored.writestr("x.png", content)
    (tmp_path / "x.tar").write_bytes(tar_member("x.png", content) + tar_member("y.png", b"other") + TAR_END)
    sources = [FolderSource(tmp_path / "f"), ZipSource(tmp_path / "x.zip"), TarSource(tmp_path / "x.tar")]
    for source in sources:
        list(source.members())
    return content, [*((source, "x.png") for source in sources), (FileListSource([]), str(tmp_path / "f" / "x.png"))]


@pytest.mark.parametrize("limit", [-1, 0, 10, 10**6])
def test_beginning_of_a_file(sources, limit):
    content, named = sources
    for source, name in named:
        assert source.read(name, limit) == content[: limit if limit >= 0 else None]


def test_threads_may_read_at_once(sources):
    content, named = sources
    with ThreadPoolExecutor(8) as pool:
        for source, name in named:
            assert set(pool.map(lambda _, source=source, name=name: source.read(name), range(50))) == {content}


# --- hostile and foreign files ---------------------------------------------------------------------


def zip_of(path, names):
    """A zip of files whose names are raw bytes; in local headers and directory they are written over zeros."""
    with zipfile.ZipFile(path, "w") as archive:
        for i, (raw, extra) in enumerate(names):
            info = zipfile.ZipInfo(str(i) * len(raw))
            info.extra = extra
            archive.writestr(info, b"x")
    content = path.read_bytes()
    for i, (raw, _) in enumerate(names):
        content = content.replace((str(i) * len(raw)).encode(), raw)
    path.write_bytes(content)
    return ZipSource(path)


def unicode_path(raw, name):
    field = b"\x01" + zlib.crc32(raw).to_bytes(4, "little") + name.encode()
    return b"up" + len(field).to_bytes(2, "little") + field


GBK = "猫狗/1.png".encode("gbk")


@pytest.mark.parametrize(
    ("raw", "extra", "name", "told"),
    [
        ("café/1.png".encode(), b"", "café/1.png", False),
        (GBK, unicode_path(GBK, "猫狗/1.png"), "猫狗/1.png", False),
        (GBK, unicode_path(b"another name", "another name"), GBK.decode("cp437"), True),
        (GBK, b"", GBK.decode("cp437"), True),
    ],
)
def test_names_of_zips_in_other_code_pages(tmp_path, raw, extra, name, told):
    source = zip_of(tmp_path / "x.zip", [(raw, extra), (b"plain/2.png", b"")])
    assert [member for member, _ in source.members()] == [name, "plain/2.png"]
    assert source.read(name) == b"x"
    assert len(source.remarks) == told


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar", "x.tar.bz2", "x.tar.xz"])
def test_compressed_tars_are_told_from_others(tmp_path, name):
    how = {"x.tar.bz2": "bz2", "x.tar.xz": "xz"}.get(name, "gz")
    with tarfile.open(tmp_path / name, f"w:{how}") as archive:
        archive.addfile(tarfile.TarInfo("1.png"), BytesIO())
    with pytest.raises(
        InputError, match=rf"{name} is compressed; expected a \.tar that is not: (gunzip|bunzip2|unxz) < "
    ):
        open_source(tmp_path / name)


def test_a_single_array_is_no_source(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(InputError, match=r"x\.npy is a single array; expected an \.npz"):
        open_source(tmp_path / "x.npy")


@pytest.mark.skipif(os.name == "nt", reason="no pipes")
def test_pipes_and_devices_are_no_sources(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(InputError, match="is a pipe or device"):
            open_source(path)


def damaged(path, flag=None, method=None, spoil=False):
    """Change the encryption flag or the method of a zip's only member, or some of its bytes."""
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.index(signature) + offset
        if flag is not None:
            content[at] |= flag
        if method is not None:
            content[at + 2] = method
    if spoil:
        middle = len(content) // 2
        content[middle : middle + 8] = b"\xff" * 8
    path.write_bytes(content)
    return path


DAMAGE = {"encrypted": {"flag": 1}, "unknown method": {"method": 77}, "damaged": {"spoil": True}}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_arrays_end_in_one_line(tmp_path, method, damage):
    content = BytesIO()
    np.save(content, np.random.default_rng(0).integers(0, 255, (9, 20, 20, 3), np.uint8))
    with zipfile.ZipFile(tmp_path / "x.npz", "w", method) as archive:
        archive.writestr("arr_0.npy", content.getvalue())
    with pytest.raises(InputError, match="cannot read images from ") as caught:
        NpzSource(damaged(tmp_path / "x.npz", **damage))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_zips_end_in_one_line(tmp_path, damage):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", np.random.default_rng(0).bytes(1000))
    source = ZipSource(damaged(tmp_path / "x.zip", **damage))
    with pytest.raises(InputError), reading_image("1.png"):
        list(source.members())
        source.read("1.png")


def test_files_without_end_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "MOST_BYTES", 1 << 20)
    (tmp_path / "1.png").touch()
    os.truncate(tmp_path / "1.png", (1 << 20) + 1)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "1.png", "1.png")
    (tmp_path / "x.tar").write_bytes(tar_member("1.png", bytes((1 << 20) + 1)) + TAR_END)
    for source in (FolderSource(tmp_path), ZipSource(tmp_path / "x.zip"), TarSource(tmp_path / "x.tar")):
        list(source.members())
        assert len(source.read("1.png", 100)) == 100
        with pytest.raises(UnreadableImage, match="at most 0 GiB is read"), reading_image("1.png"):
            source.read("1.png")


# --- arrays ------------------------------------------------------------------------------------------

PIXELS = np.stack([image(seed, 4, 6) for seed in range(5)])


def save(path, pixels=PIXELS, compressed=False, **more):
    (np.savez_compressed if compressed else np.savez)(path, pixels, **more)
    return path


def add_provenance(path, lines):
    with zipfile.ZipFile(path, "a") as stored:
        stored.writestr("provenance.jsonl", "".join(each.to_json() + "\n" for each in lines))
    return path


def by_name(path):
    """Name and pixels of each image, as decoded."""
    source = NpzSource(path)
    return {name: np.asarray(decode_image(source.read(name), name)) for name, _ in source.members()}


def contents(images):
    return sorted(pixels.tobytes() for pixels in images)


@pytest.mark.parametrize("compressed", [False, True])
def test_images_are_those_of_the_array(tmp_path, compressed):
    found = by_name(save(tmp_path / "x.npz", compressed=compressed))
    assert contents(found.values()) == contents(PIXELS)


def test_shuffled_arrays_have_the_same_names_for_the_same_images(tmp_path):
    one = by_name(save(tmp_path / "1.npz"))
    two = by_name(save(tmp_path / "2.npz", PIXELS[::-1]))
    assert sorted(one) == sorted(two)
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_the_array_is_read_in_place(tmp_path):
    assert NpzSource(save(tmp_path / "x.npz"))._unpacked_NHW3 is None
    assert isinstance(NpzSource(save(tmp_path / "x.npz", compressed=True))._unpacked_NHW3, np.memmap)
    with zipfile.ZipFile(tmp_path / "y.npz", "w") as stored:  # a name and an extra field of other lengths before it
        stored.writestr("a_longer_name.npy", b"first")
        info = zipfile.ZipInfo("arr_0.npy")
        info.extra = b"\x99\x99\x04\x00abcd"
        content = io.BytesIO()
        np.save(content, PIXELS)
        stored.writestr(info, content.getvalue())
    assert contents(by_name(tmp_path / "y.npz").values()) == contents(PIXELS)


def test_equal_images_count_each(tmp_path):
    path = save(tmp_path / "x.npz", PIXELS[[0, 1, 0]])
    assert len(list(NpzSource(path).members())) == 3


@pytest.mark.parametrize("limit", [0, 5, 11, 12, 40, 10_000])
def test_beginning_of_an_image(tmp_path, limit):
    source = NpzSource(save(tmp_path / "x.npz"))
    name, size = next(source.members())
    assert source.read(name, limit) == source.read(name)[:limit]
    assert size == 4 * 6 * 3


def test_images_of_ours_are_called_as_in_a_folder(tmp_path):
    lines = [
        made(seed, class_id=1 + seed % 2, class_name=("goldfish", "great white shark")[seed % 2]) for seed in range(5)
    ]
    path = add_provenance(save(tmp_path / "x.npz"), lines)
    found = by_name(path)
    assert list(found) == [image_filename(each) for each in lines]
    assert all(np.array_equal(pixels, expected) for pixels, expected in zip(found.values(), PIXELS, strict=True))
    assert NpzSource(path).sidecar("1-goldfish-0.png", "json") == lines[0].to_json().encode()
    assert NpzSource(path).sidecar("1-goldfish-0.png", "cls") is None


def test_provenance_without_end_is_not_read(tmp_path):
    path = save(tmp_path / "x.npz")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as stored:
        stored.writestr("provenance.jsonl", bytes(1_000_000))
    with pytest.raises(InputError, match=r"its provenance\.jsonl has 1000000 bytes for 5 images"):
        NpzSource(path)


def test_labels_in_arr_1(tmp_path):
    source = NpzSource(save(tmp_path / "x.npz", arr_1=np.array([3, 3, 9, -1, 0])))
    labels = {
        decode_image(source.read(name), name).tobytes(): source.sidecar(name, "cls") for name, _ in source.members()
    }
    assert [labels[each.tobytes()] for each in PIXELS] == [b"3", b"3", b"9", b"-1", b"0"]


@pytest.mark.parametrize("labels", [np.zeros(4, int), np.zeros((5, 10), int), np.zeros(5), np.array(list("abcde"))])
def test_other_kinds_of_arr_1_are_ignored(tmp_path, labels):
    source = NpzSource(save(tmp_path / "x.npz", arr_1=labels))
    assert [source.sidecar(name, "cls") for name, _ in source.members()] == [None] * 5


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (PIXELS.astype(np.float32), r"float32 \(5, 4, 6, 3\)"),
        (PIXELS.transpose(0, 3, 1, 2), r"uint8 \(5, 3, 4, 6\)"),
        (PIXELS[0], r"uint8 \(4, 6, 3\)"),
        (PIXELS[:0], r"uint8 \(0, 4, 6, 3\)"),
        (np.array([{}], object), r"object \(1,\)"),
    ],
)
def test_other_arrays_are_refused(tmp_path, pixels, words):
    with pytest.raises(InputError, match=f"^cannot read images from .*x.npz: .*{words}; expected arr_0, uint8"):
        NpzSource(save(tmp_path / "x.npz", pixels))


@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_in_fortran_order(tmp_path, compressed):
    found = by_name(save(tmp_path / "f.npz", np.asfortranarray(PIXELS), compressed))
    assert found.keys() == by_name(save(tmp_path / "c.npz")).keys()
    assert contents(found.values()) == contents(PIXELS)


@pytest.mark.parametrize("name", ["arr_1", "arr_2", "more"])
def test_a_second_array_of_images_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=f"{name} has images too; numpy.concatenate makes one array of all"):
        NpzSource(save(tmp_path / "x.npz", **{name: PIXELS[:2]}))


def with_header(path, shape, content, labels=None):
    """An .npz whose arr_0, or whose arr_1, has a header of its own choice."""
    header = f"{{'descr': '{'|u1' if labels is None else '<i8'}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    array = b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header + content
    with zipfile.ZipFile(path, "w") as archive:
        if labels is None:
            archive.writestr("arr_0.npy", array)
        else:
            with archive.open("arr_0.npy", "w") as member:
                np.save(member, PIXELS)
            archive.writestr("arr_1.npy", array)
        archive.writestr("another.txt", bytes(10_000))
    return path


@pytest.mark.parametrize(
    "shape",
    [
        *("(12, 4, 6, 3)", "(4, 4, 6, 3)", "(9223372036854775808, 4, 6, 3)", "(-5, 4, 6, 3)", "(5, 4, -6, -3)"),
        *("(99999999999999, 4, 6, 3)", "(2000001, 1, 1, 3)", "(" * 5000, "'" * 3 + "(5,", "(5, 4, 6, 3.0)", "5"),
    ],
)
def test_members_must_hold_what_their_headers_say(tmp_path, shape):
    with pytest.raises(InputError, match="cannot read images from ") as caught:
        NpzSource(with_header(tmp_path / "x.npz", shape, PIXELS.tobytes()))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_few_kilobytes_of_endless_images_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "MOST_IMAGES", 4)
    with pytest.raises(InputError, match="at most 4 images are read from one file"):
        NpzSource(save(tmp_path / "x.npz", compressed=True))


@pytest.mark.parametrize("shape", ["(10000000000000,)", "(5, 10)", "(-5,)"])
def test_labels_of_other_shapes_are_not_read(tmp_path, shape):
    source = NpzSource(with_header(tmp_path / "x.npz", shape, bytes(40), labels=True))
    assert [source.sidecar(name, "cls") for name, _ in source.members()] == [None] * 5
    assert list(source.left_out) == ["arrays that are no labels, which would be integers (5,)"]


@pytest.mark.parametrize("compressed", [False, True])
def test_an_array_that_is_replaced_while_it_is_opened_is_told(tmp_path, monkeypatch, compressed):
    """Its header and its images come from one file."""
    path, check = save(tmp_path / "x.npz", compressed=compressed), sources_module._check_bytes

    def replacing(stored):
        check(stored)
        save(tmp_path / "y.npz", PIXELS[::-1].copy(), compressed).replace(path)

    monkeypatch.setattr(sources_module, "_check_bytes", replacing)
    with pytest.raises(InputError, match="changed while it was being read"):
        NpzSource(path)


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.png", bytes(200))
    return path


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("x.npz", save),
        ("x.npz", lambda path: save(path, compressed=True)),
        ("x.tar", lambda path: tar(path, {"1.png": b"12345678"}).path),
        ("x.zip", zipped),
    ],
)
@pytest.mark.parametrize("change", [lambda path: os.truncate(path, 100), lambda path: path.touch()])
def test_an_archive_that_changes_while_it_is_read_is_told(tmp_path, name, made, change):
    """By the process that listed it, or by a worker: an image must be what it was when it was counted."""
    path = made(tmp_path / name)
    os.utime(path, (0, 0))  # files written within a tick of the clock look alike
    source = open_source(path)
    (member, _), *_ = source.members()
    worker = pickle.loads(pickle.dumps(source))
    change(path)
    for reader in [worker] if name == "x.zip" else [source, worker]:  # the process that has a zip open sees its damage
        with (
            pytest.raises(UnreadableImage, match=r"changed while it was being read|not a zip file"),
            reading_image(member),
        ):
            reader.read(member)


def test_a_changed_bit_does_not_pass(tmp_path):
    path = save(tmp_path / "x.npz")
    content = bytearray(path.read_bytes())
    content[content.index(PIXELS[2].tobytes()) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="Bad CRC-32"):
        NpzSource(path)


def test_no_such_array_and_no_such_file(tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.zeros(3))
    (tmp_path / "y.npz").write_bytes(b"no zip")
    for name in ("x.npz", "y.npz", "absent.npz"):
        with pytest.raises(InputError, match=f"^cannot read images from .*{name}: .*; expected arr_0") as caught:
            NpzSource(tmp_path / name)
        assert "\n" not in str(caught.value)
