"""Images to measure: whatever they lie in, in one order, of one size, each bad one named."""

import shutil
import tarfile
import zipfile
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from support.provenances import image, made
from varcli.errors import InputError
from varcli.images.decode import UnreadableImage, center_crop
from varcli.images.image_list import open_images
from varcli.images.provenance import image_filename, png_bytes
from varcli.images.sources import FolderSource
from varcli.outputs.open import open_sink

SIDE = 8
SAMPLES = [
    made(seed, class_id=class_id, class_name=name)
    for class_id, name in ((1, "goldfish"), (207, "golden retriever"), (None, "none"))
    for seed in (2, 10)
]


def encoded(pixels, kind="PNG", **options):
    content = BytesIO()
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


def fill(folder, names, side=SIDE):
    """Write an image of its own for each name."""
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image(seed, side, side)))
    return folder


@pytest.fixture
def folder(tmp_path):
    """What `var sample --out` leaves, two images each of two classes and of none."""
    (tmp_path / "samples").mkdir()
    for seed, each in enumerate(SAMPLES):
        (tmp_path / "samples" / image_filename(each)).write_bytes(png_bytes(image(seed, SIDE, SIDE), each))
    return tmp_path / "samples"


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as stored:
        for file in sorted(folder.rglob("*"), reverse=True):
            if file.is_file():
                stored.write(file, file.relative_to(folder).as_posix())
    return path


def everything(images):
    return [images.pixels(i).tobytes() for i in range(len(images))]


def last_names(images):
    return [name.rpartition("/")[2] for name in images.names]


# --- order -----------------------------------------------------------------------------------------


def test_order_is_that_in_which_torch_fidelity_takes_files(tmp_path):
    from torch_fidelity.utils import glob_samples_paths

    fill(tmp_path, ["b.png", "a/10.png", "a/9.png", "a.png", "B/x.png", "a/b/c.png", "a-b.png", "Z.png"])
    theirs = glob_samples_paths(str(tmp_path), True, "png", verbose=False)
    assert [f"{tmp_path.parent}/{name}" for name in open_images([tmp_path]).names] == theirs


def test_samples_are_the_same_list_in_every_kind_of_place(folder, tmp_path):
    with open_sink(str(tmp_path / "x.npz"), several=True) as npz:
        for seed in (3, 0, 5, 1, 4, 2):  # in another order
            npz.add(image(seed, SIDE, SIDE), SAMPLES[seed])
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for file in folder.iterdir():
            tar.add(file, file.name)
    zipped(folder, tmp_path / "x.zip")
    files = [str(path) for path in folder.iterdir()]
    reference = open_images([folder])
    assert reference.rows == [0, 0, 1, 1, -1, -1]
    assert [entry.name for entry in reference.classes.entries] == ["goldfish", "golden retriever"]
    for paths in ([tmp_path / "x.npz"], [tmp_path / "x.tar"], [tmp_path / "x.zip"], files, files[::-1]):
        images = open_images(paths)
        assert last_names(images) == last_names(reference)
        assert everything(images) == everything(reference)
        assert (images.rows, images.classes) == (reference.rows, reference.classes)


def test_arrays_without_names_are_in_one_order_however_shuffled(tmp_path):
    pixels = np.stack([image(seed, SIDE, SIDE) for seed in range(6)])
    labels = np.arange(6)
    np.savez(tmp_path / "1.npz", pixels, labels)
    np.savez(tmp_path / "2.npz", pixels[::-1], labels[::-1])
    one, two = (open_images([tmp_path / name]) for name in ("1.npz", "2.npz"))
    assert everything(one) == everything(two)
    assert one.rows == two.rows
    assert sorted(one.rows) == list(range(6))


def test_several_paths_are_one_list_in_whatever_order(tmp_path):
    one = fill(tmp_path / "one" / "samples", ["1.png", "2.png"])
    two = fill(tmp_path / "two" / "samples", ["2.png", "3.png"])
    lists = [open_images(paths) for paths in ([one, two], [two, one])]
    assert last_names(lists[0]) == ["1.png", "2.png", "2.png", "3.png"]
    assert everything(lists[0]) == everything(lists[1])


def test_paths_on_standard_input(folder, tmp_path):
    lines = [f"{path}\n" for path in folder.iterdir()]
    assert everything(open_images(["-"], lines=lines)) == everything(open_images([folder]))
    more = zipped(folder, tmp_path / "x.zip")
    assert len(open_images(["-", more], lines=["\n", *lines])) == 12
    assert len(open_images(["-"], lines=[f"{more}\r\n"])) == 6


# --- classes ---------------------------------------------------------------------------------------


def test_class_folders(tmp_path):
    fill(tmp_path, ["n02099601/a.png", "n01443537/b.png", "n02099601/c.png"])
    images = open_images([tmp_path])
    assert [entry.id for entry in images.classes.entries] == [1, 207]
    assert images.rows == [0, 1, 1]
    assert images.class_counts() == [1, 2]


def test_png_of_ours_under_another_name_says_its_class(folder):
    (folder / "1-goldfish-2.png").rename(folder / "my fish.png")
    images = open_images([folder])
    assert images.rows[images.names.index("samples/my fish.png")] == 0


def test_shard_of_ours_and_of_others(tmp_path):
    with open_sink(str(tmp_path / "ours.tar"), several=True) as shard:
        for seed, each in enumerate(SAMPLES):
            shard.add(image(seed, SIDE, SIDE), each)
    images = open_images([tmp_path / "ours.tar"])
    assert images.rows == [0, 0, 1, 1, -1, -1]
    assert images.classes.entries[1].name == "golden retriever"
    with tarfile.open(tmp_path / "theirs.tar", "w") as tar:
        for name, content in {
            "0.jpg": encoded(image(0), "JPEG"),
            "0.cls": b"7\n",
            "1.png": encoded(image(1)),
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    images = open_images([tmp_path / "theirs.tar"])
    assert [entry.id for entry in images.classes.entries] == [7]
    assert images.rows == [0, -1]


def test_no_classes(tmp_path):
    images = open_images([fill(tmp_path, ["1.png", "2.png"])])
    assert (images.rows, len(images.classes), images.class_counts()) == ([-1, -1], 0, [])


# --- facts -----------------------------------------------------------------------------------------


def test_jpegs_are_counted_by_content(tmp_path):
    fill(tmp_path, ["1.png", "2.png", "3.png"])
    (tmp_path / "2.png").write_bytes(encoded(image(2), "JPEG"))
    (tmp_path / "4.jpg").write_bytes(encoded(image(2), "JPEG"))
    assert open_images([tmp_path]).jpegs == 2


def test_fingerprint_knows_the_images_again(folder, tmp_path):
    known = open_images([folder]).fingerprint()
    shutil.copytree(folder, tmp_path / "elsewhere" / folder.name)
    assert open_images([tmp_path / "elsewhere" / folder.name]).fingerprint() == known
    assert open_images([folder], resize=4).fingerprint() != known
    (folder / "1-goldfish-2.png").rename(folder / "1-goldfish-3.png")
    assert open_images([folder]).fingerprint() != known


def test_opening_reads_beginnings_only(tmp_path, monkeypatch):
    fill(tmp_path, ["1.png", "2.png"], side=200)  # noise: 120 kB each
    read = FolderSource.read
    lengths = []
    monkeypatch.setattr(FolderSource, "read", lambda *args: lengths.append(len(read(*args))) or read(*args))
    open_images([tmp_path])
    assert len(lengths) == 2
    assert max(lengths) < 10_000


@pytest.mark.parametrize("ending", [".npz", ".tar", ""])
def test_fingerprint_tells_images_of_equal_names_and_lengths_apart(tmp_path, ending):
    found = set()
    for first in (0, 10):
        with open_sink(str(tmp_path / f"x{ending}"), several=True) as output:
            for seed, each in enumerate(SAMPLES):
                output.add(image(first + seed, SIDE, SIDE), each)
        images = open_images([tmp_path / f"x{ending}"])
        found.add((images.fingerprint(), sum(image.length for image in images._images)))
    assert len({fingerprint for fingerprint, _ in found}) == 2
    assert len({size for _, size in found}) == 1


# --- size ------------------------------------------------------------------------------------------


def test_side_is_that_of_the_images_or_the_one_asked_for(folder):
    assert open_images([folder]).side == SIDE
    smaller = open_images([folder], resize=3)
    assert smaller.side == 3
    assert np.array_equal(smaller.pixels(0), center_crop(Image.fromarray(open_images([folder]).pixels(0)), 3))


@pytest.mark.parametrize(("height", "width", "words"), [(8, 9, "9 × 8 pixels, most are 8 × 8"), (9, 9, "9 × 9 pixels")])
def test_another_size_is_refused_and_named(folder, height, width, words):
    (folder / "odd.png").write_bytes(encoded(image(0, height, width)))
    with pytest.raises(InputError, match=f"^images: samples/odd.png is {words}.*; squares of one size, or --resize"):
        open_images([folder])
    sized = open_images([folder], resize=6)
    ((_, pixels, _),) = sized.batches(range(len(sized)), 100)
    assert pixels.shape == (7, 6, 6, 3)


def test_rectangles_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", np.zeros((3, 8, 6, 3), np.uint8))
    with pytest.raises(InputError, match=r"is 6 × 8 pixels; squares of one size"):
        open_images([tmp_path / "x.npz"])
    assert open_images([tmp_path / "x.npz"], resize=4).pixels(0).shape == (4, 4, 3)


# --- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_batches_hold_what_was_asked_for_in_its_order(folder, size):
    images = open_images([folder])
    ranks = [5, 0, 3, 1, 4]
    batches = list(images.batches(ranks, size))
    assert [len(found) for found, *_ in batches] == [min(size, 5 - start) for start in range(0, 5, size)]
    assert [rank for found, *_ in batches for rank in found] == ranks
    assert [row for *_, rows in batches for row in rows] == [images.rows[rank] for rank in ranks]
    pixels = np.concatenate([pixels for _, pixels, _ in batches])
    assert pixels.dtype == np.uint8
    assert all(np.array_equal(pixels[at], images.pixels(rank)) for at, rank in enumerate(ranks))


def test_no_more_is_read_ahead_than_a_few_batches(folder, monkeypatch):
    images, read = open_images([folder]), []
    monkeypatch.setattr(images, "pixels", lambda i: read.append(i) or np.zeros((SIDE, SIDE, 3), np.uint8))
    batches = images.batches(iter(list(range(6)) * 100), 6)
    next(batches)
    batches.close()
    assert len(read) <= 18


# --- bad images ----------------------------------------------------------------------------------


@pytest.fixture
def spoilt(folder):
    """The same folder with one image that is none, and one cut off behind its header."""
    (folder / "text.png").write_bytes(b"no image")
    cut = encoded(np.random.RandomState(0).randint(0, 256, (SIDE, SIDE, 3)).astype(np.uint8))
    (folder / "cut.png").write_bytes(cut[:60])
    return folder


def test_what_is_no_image_shows_before_any_work(spoilt):
    (spoilt / "more.png").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"^images: 2 of 9 cannot be read, samples/\w+\.png \(no pic.*; .*--skip-bad"
    ) as e:
        open_images([spoilt])
    assert "samples/text.png" in str(e.value)
    assert "samples/more.png" in str(e.value)


def test_what_is_cut_off_shows_when_it_is_read(spoilt):
    (spoilt / "text.png").unlink()
    images = open_images([spoilt])
    with pytest.raises(UnreadableImage, match=r"samples/cut\.png cannot be read"):
        list(images.batches(range(len(images)), 3))


@pytest.mark.parametrize("size", [1, 3, 100])
def test_bad_ones_are_passed_over_and_named(spoilt, size):
    images = open_images([spoilt], skip_bad=True)
    assert len(images) == 7
    assert images.skipped == ["samples/text.png"]
    ranks = [rank for found, *_ in images.batches(range(7), size) for rank in found]
    assert images.skipped == ["samples/text.png", "samples/cut.png"]
    assert sorted({*range(7)} - {*ranks}) == [images.names.index("samples/cut.png")]


def test_many_bad_ones_are_counted(tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02}.png").write_bytes(b"no image")
    for skip_bad in (False, True):  # nothing would be left
        with pytest.raises(
            InputError, match=r"^images: 20 of 20 cannot be read, .*/00\.png .* and 15 more; "
        ) as caught:
            open_images([tmp_path], skip_bad=skip_bad)
        assert "\n" not in str(caught.value)


def test_image_gone_since_opening(folder):
    images = open_images([folder], skip_bad=True)
    (folder / "1-goldfish-2.png").unlink()
    assert [len(found) for found, *_ in images.batches(range(6), 6)] == [5]
    assert images.skipped == ["samples/1-goldfish-2.png"]


def test_long_headers_are_read_whole(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "x" * 30_000
    (tmp_path / "1.jpg").write_bytes(encoded(image(0), "JPEG", exif=exif, icc_profile=b"y" * 100_000))
    (tmp_path / "2.png").write_bytes(encoded(image(0), icc_profile=np.random.RandomState(0).bytes(100_000)))
    assert open_images([tmp_path]).side == 8


# --- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: [], "no path; each path once, and at least one"),
        (lambda root: ["-"], "no path; "),
        (lambda root: [root / "absent"], "absent; No such file"),
        (lambda root: [root], "has none; a folder, .zip, .npz or .tar of images"),
        (lambda root: [fill(root, ["1.png"]), root / "."], "each path once"),
        (lambda root: [fill(root, ["1.png"]) / "1.png"] * 2, "1.png; each path once"),
        (lambda root: [(root / "x.zip").write_bytes(b"none") and root / "x.zip"], "x.zip cannot be listed"),
        (lambda root: [(root / "x.tar").write_bytes(b"none") and root / "x.tar"], "x.tar cannot be listed"),
        (lambda root: [(root / "x.npz").write_bytes(b"none") and root / "x.npz"], "an .npz with arr_0"),
        (lambda root: [(root / "x.pt").write_bytes(b"none") and root / "x.pt"], "1 of 1 cannot be read"),
    ],
    ids=["nothing", "no lines", "absent", "empty", "twice", "file twice", "zip", "tar", "npz", "other"],
)
def test_unusable_paths(tmp_path, make, words):
    with pytest.raises(InputError, match=r"^images: ") as caught:
        open_images(make(tmp_path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_tar(folder, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for file in folder.iterdir():
            tar.add(file, file.name)
    content = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(content[:700])
    with pytest.raises(InputError, match=r"x\.tar|x\.tar/.*cannot be read"):
        open_images([tmp_path / "x.tar"])
    shutil.rmtree(folder)
