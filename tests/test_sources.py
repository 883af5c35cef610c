"""Places of images that data sets for training do not lie in: tars, and files here and there."""

import tarfile
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pytest

from support.provenances import image, made
from varcli.images.sources import FileListSource, FolderSource, TarSource, ZipSource
from varcli.outputs.open import open_sink
from varcli.outputs.sinks import TAR_END, tar_member


def tar(path, contents):
    with tarfile.open(path, "w") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, BytesIO(content))
    return TarSource(path, path.name)


SAMPLES = {"a/0.png": b"first", "a/0.cls": b"207", "a/0.json": b"{}", "a/1.v2.jpg": b"second one", "note.txt": b"no"}


def test_images_of_a_tar(tmp_path):
    source = tar(tmp_path / "x.tar", SAMPLES)
    assert list(source.members()) == [("a/0.png", 5), ("a/1.v2.jpg", 10)]
    assert source.read("a/1.v2.jpg") == b"second one"


def test_files_beside_a_image_in_a_tar(tmp_path):
    source = tar(tmp_path / "x.tar", SAMPLES | {"a/1.cls": b"3", "2.png": b"", "2.cls": b"4"})
    list(source.members())
    assert source.beside("a/0.png", "cls") == b"207"
    assert source.beside("a/1.v2.jpg", "cls") == b"3"  # WebDataset: the name ends at its first point
    assert source.beside("2.png", "cls") == b"4"
    assert source.beside("2.png", "json") is None


def test_long_names_and_links_in_a_tar(tmp_path):
    name = "d" * 90 + "/" + "x" * 120 + ".png"
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        info = tarfile.TarInfo(name)
        info.size = 3
        archive.addfile(info, BytesIO(b"abc"))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, name
        archive.addfile(link)
    source = TarSource(tmp_path / "x.tar", "x.tar")
    assert list(source.members()) == [(name, 3)]
    assert source.read(name) == b"abc"


def test_shards_of_ours(tmp_path):
    with open_sink(str(tmp_path / "x.tar"), several=True) as shard:
        for seed in range(3):
            shard.add(image(seed), made(seed))
    source = TarSource(tmp_path / "x.tar", "x.tar")
    assert [name for name, _ in source.members()] == ["000000.png", "000001.png", "000002.png"]
    assert source.beside("000002.png", "cls") == b"207"


def test_files_by_their_paths(tmp_path):
    (tmp_path / "x").write_bytes(b"content")
    source = FileListSource([str(tmp_path / "x"), str(tmp_path / "absent")])
    assert list(source.members()) == [(str(tmp_path / "x"), 7), (str(tmp_path / "absent"), 0)]
    assert source.read(str(tmp_path / "x")) == b"content"
    with pytest.raises(FileNotFoundError):
        source.read(str(tmp_path / "absent"))


@pytest.fixture
def sources(tmp_path):
    """The same image in each kind of place, and its name there."""
    import zipfile

    content = bytes(range(256)) * 300
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "x.png").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as stored:
        stored.writestr("x.png", content)
    (tmp_path / "x.tar").write_bytes(tar_member("x.png", content) + tar_member("y.png", b"other") + TAR_END)
    places = [FolderSource(tmp_path / "f", "f"), ZipSource(tmp_path / "x.zip", "z"), TarSource(tmp_path / "x.tar", "t")]
    for place in places:
        list(place.members())
    return content, [*((place, "x.png") for place in places), (FileListSource([]), str(tmp_path / "f" / "x.png"))]


@pytest.mark.parametrize("most", [-1, 0, 10, 10**6])
def test_beginning_of_a_file(sources, most):
    content, places = sources
    for source, name in places:
        assert source.read(name, most) == content[: most if most >= 0 else None]


def test_threads_may_read_at_once(sources):
    content, places = sources
    with ThreadPoolExecutor(8) as pool:
        for source, name in places:
            assert set(pool.map(lambda _, source=source, name=name: source.read(name), range(50))) == {content}
