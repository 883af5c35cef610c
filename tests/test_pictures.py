"""Pictures to measure: whatever they lie in, in one order, of one size, each bad one named."""

import shutil
import tarfile
import zipfile
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from provenance import made, picture
from varcli.data.datasets import UnreadablePicture
from varcli.data.images import png_bytes
from varcli.data.outputs import open_output
from varcli.data.places import picture_name
from varcli.data.sources import Folder
from varcli.errors import InputError
from varcli.evaluation.pictures import open_pictures
from varcli.evaluation.resizing import center_crop

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
    """Write a picture of its own for each name."""
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(seed, side, side)))
    return folder


@pytest.fixture
def folder(tmp_path):
    """What `var sample --out` leaves, two pictures each of two classes and of none."""
    (tmp_path / "samples").mkdir()
    for seed, each in enumerate(SAMPLES):
        (tmp_path / "samples" / picture_name(each)).write_bytes(png_bytes(picture(seed, SIDE, SIDE), each))
    return tmp_path / "samples"


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as stored:
        for file in sorted(folder.rglob("*"), reverse=True):
            if file.is_file():
                stored.write(file, file.relative_to(folder).as_posix())
    return path


def everything(pictures):
    return [pictures.pixels(i).tobytes() for i in range(len(pictures))]


def last_names(pictures):
    return [name.rpartition("/")[2] for name in pictures.names]


# --- order -----------------------------------------------------------------------------------------


def test_order_is_that_in_which_torch_fidelity_takes_files(tmp_path):
    from torch_fidelity.utils import glob_samples_paths

    fill(tmp_path, ["b.png", "a/10.png", "a/9.png", "a.png", "B/x.png", "a/b/c.png", "a-b.png", "Z.png"])
    theirs = glob_samples_paths(str(tmp_path), True, "png", verbose=False)
    assert [f"{tmp_path.parent}/{name}" for name in open_pictures([tmp_path]).names] == theirs


def test_samples_are_the_same_list_in_every_kind_of_place(folder, tmp_path):
    with open_output(str(tmp_path / "x.npz"), several=True) as npz:
        for seed in (3, 0, 5, 1, 4, 2):  # in another order
            npz.add(picture(seed, SIDE, SIDE), SAMPLES[seed])
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for file in folder.iterdir():
            tar.add(file, file.name)
    zipped(folder, tmp_path / "x.zip")
    files = [str(path) for path in folder.iterdir()]
    reference = open_pictures([folder])
    assert reference.rows == [0, 0, 1, 1, -1, -1]
    assert [entry.name for entry in reference.classes.entries] == ["goldfish", "golden retriever"]
    for paths in ([tmp_path / "x.npz"], [tmp_path / "x.tar"], [tmp_path / "x.zip"], files, files[::-1]):
        pictures = open_pictures(paths)
        assert last_names(pictures) == last_names(reference)
        assert everything(pictures) == everything(reference)
        assert (pictures.rows, pictures.classes) == (reference.rows, reference.classes)


def test_arrays_without_names_are_in_one_order_however_shuffled(tmp_path):
    pixels = np.stack([picture(seed, SIDE, SIDE) for seed in range(6)])
    labels = np.arange(6)
    np.savez(tmp_path / "1.npz", pixels, labels)
    np.savez(tmp_path / "2.npz", pixels[::-1], labels[::-1])
    one, two = (open_pictures([tmp_path / name]) for name in ("1.npz", "2.npz"))
    assert everything(one) == everything(two)
    assert one.rows == two.rows
    assert sorted(one.rows) == list(range(6))


def test_several_paths_are_one_list_in_whatever_order(tmp_path):
    one = fill(tmp_path / "one" / "samples", ["1.png", "2.png"])
    two = fill(tmp_path / "two" / "samples", ["2.png", "3.png"])
    lists = [open_pictures(paths) for paths in ([one, two], [two, one])]
    assert last_names(lists[0]) == ["1.png", "2.png", "2.png", "3.png"]
    assert everything(lists[0]) == everything(lists[1])


def test_paths_on_standard_input(folder, tmp_path):
    lines = [f"{path}\n" for path in folder.iterdir()]
    assert everything(open_pictures(["-"], lines=lines)) == everything(open_pictures([folder]))
    more = zipped(folder, tmp_path / "x.zip")
    assert len(open_pictures(["-", more], lines=["\n", *lines])) == 12
    assert len(open_pictures(["-"], lines=[f"{more}\r\n"])) == 6


# --- classes ---------------------------------------------------------------------------------------


def test_class_folders(tmp_path):
    fill(tmp_path, ["n02099601/a.png", "n01443537/b.png", "n02099601/c.png"])
    pictures = open_pictures([tmp_path])
    assert [entry.id for entry in pictures.classes.entries] == [1, 207]
    assert pictures.rows == [0, 1, 1]
    assert pictures.class_counts() == [1, 2]


def test_png_of_ours_under_another_name_says_its_class(folder):
    (folder / "1-goldfish-2.png").rename(folder / "my fish.png")
    pictures = open_pictures([folder])
    assert pictures.rows[pictures.names.index("samples/my fish.png")] == 0


def test_shard_of_ours_and_of_others(tmp_path):
    with open_output(str(tmp_path / "ours.tar"), several=True) as shard:
        for seed, each in enumerate(SAMPLES):
            shard.add(picture(seed, SIDE, SIDE), each)
    pictures = open_pictures([tmp_path / "ours.tar"])
    assert pictures.rows == [0, 0, 1, 1, -1, -1]
    assert pictures.classes.entries[1].name == "golden retriever"
    with tarfile.open(tmp_path / "theirs.tar", "w") as tar:
        for name, content in {
            "0.jpg": encoded(picture(0), "JPEG"),
            "0.cls": b"7\n",
            "1.png": encoded(picture(1)),
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    pictures = open_pictures([tmp_path / "theirs.tar"])
    assert [entry.id for entry in pictures.classes.entries] == [7]
    assert pictures.rows == [0, -1]


def test_no_classes(tmp_path):
    pictures = open_pictures([fill(tmp_path, ["1.png", "2.png"])])
    assert (pictures.rows, len(pictures.classes), pictures.class_counts()) == ([-1, -1], 0, [])


# --- facts -----------------------------------------------------------------------------------------


def test_jpegs_are_counted_by_content(tmp_path):
    fill(tmp_path, ["1.png", "2.png", "3.png"])
    (tmp_path / "2.png").write_bytes(encoded(picture(2), "JPEG"))
    (tmp_path / "4.jpg").write_bytes(encoded(picture(2), "JPEG"))
    assert open_pictures([tmp_path]).jpegs == 2


def test_fingerprint_knows_the_pictures_again(folder, tmp_path):
    known = open_pictures([folder]).fingerprint()
    shutil.copytree(folder, tmp_path / "elsewhere" / folder.name)
    assert open_pictures([tmp_path / "elsewhere" / folder.name]).fingerprint() == known
    assert open_pictures([folder], resize=4).fingerprint() != known
    (folder / "1-goldfish-2.png").rename(folder / "1-goldfish-3.png")
    assert open_pictures([folder]).fingerprint() != known


def test_opening_reads_beginnings_only(tmp_path, monkeypatch):
    fill(tmp_path, ["1.png", "2.png"], side=200)  # noise: 120 kB each
    read = Folder.read
    lengths = []
    monkeypatch.setattr(Folder, "read", lambda *args: lengths.append(len(read(*args))) or read(*args))
    open_pictures([tmp_path])
    assert len(lengths) == 2
    assert max(lengths) < 10_000


@pytest.mark.parametrize("ending", [".npz", ".tar", ""])
def test_fingerprint_tells_pictures_of_equal_names_and_lengths_apart(tmp_path, ending):
    found = set()
    for first in (0, 10):
        with open_output(str(tmp_path / f"x{ending}"), several=True) as output:
            for seed, each in enumerate(SAMPLES):
                output.add(picture(first + seed, SIDE, SIDE), each)
        pictures = open_pictures([tmp_path / f"x{ending}"])
        found.add((pictures.fingerprint(), sum(picture.length for picture in pictures._pictures)))
    assert len({fingerprint for fingerprint, _ in found}) == 2
    assert len({size for _, size in found}) == 1


# --- size ------------------------------------------------------------------------------------------


def test_side_is_that_of_the_pictures_or_the_one_asked_for(folder):
    assert open_pictures([folder]).side == SIDE
    smaller = open_pictures([folder], resize=3)
    assert smaller.side == 3
    assert np.array_equal(smaller.pixels(0), center_crop(Image.fromarray(open_pictures([folder]).pixels(0)), 3))


@pytest.mark.parametrize(("height", "width", "words"), [(8, 9, "9 × 8 pixels, most are 8 × 8"), (9, 9, "9 × 9 pixels")])
def test_another_size_is_refused_and_named(folder, height, width, words):
    (folder / "odd.png").write_bytes(encoded(picture(0, height, width)))
    with pytest.raises(InputError, match=f"^pictures: samples/odd.png is {words}.*; squares of one size, or --resize"):
        open_pictures([folder])
    sized = open_pictures([folder], resize=6)
    ((_, pixels, _),) = sized.batches(range(len(sized)), 100)
    assert pixels.shape == (7, 6, 6, 3)


def test_rectangles_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", np.zeros((3, 8, 6, 3), np.uint8))
    with pytest.raises(InputError, match=r"is 6 × 8 pixels; squares of one size"):
        open_pictures([tmp_path / "x.npz"])
    assert open_pictures([tmp_path / "x.npz"], resize=4).pixels(0).shape == (4, 4, 3)


# --- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_batches_hold_what_was_asked_for_in_its_order(folder, size):
    pictures = open_pictures([folder])
    ranks = [5, 0, 3, 1, 4]
    batches = list(pictures.batches(ranks, size))
    assert [len(found) for found, *_ in batches] == [min(size, 5 - start) for start in range(0, 5, size)]
    assert [rank for found, *_ in batches for rank in found] == ranks
    assert [row for *_, rows in batches for row in rows] == [pictures.rows[rank] for rank in ranks]
    pixels = np.concatenate([pixels for _, pixels, _ in batches])
    assert pixels.dtype == np.uint8
    assert all(np.array_equal(pixels[at], pictures.pixels(rank)) for at, rank in enumerate(ranks))


def test_no_more_is_read_ahead_than_a_few_batches(folder, monkeypatch):
    pictures, read = open_pictures([folder]), []
    monkeypatch.setattr(pictures, "pixels", lambda i: read.append(i) or np.zeros((SIDE, SIDE, 3), np.uint8))
    batches = pictures.batches(iter(list(range(6)) * 100), 6)
    next(batches)
    batches.close()
    assert len(read) <= 18


# --- bad pictures ----------------------------------------------------------------------------------


@pytest.fixture
def spoilt(folder):
    """The same folder with one picture that is none, and one cut off behind its header."""
    (folder / "text.png").write_bytes(b"no picture")
    cut = encoded(np.random.RandomState(0).randint(0, 256, (SIDE, SIDE, 3)).astype(np.uint8))
    (folder / "cut.png").write_bytes(cut[:60])
    return folder


def test_what_is_no_picture_shows_before_any_work(spoilt):
    (spoilt / "more.png").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"^pictures: 2 of 9 cannot be read, samples/\w+\.png \(no pic.*; .*--skip-bad"
    ) as e:
        open_pictures([spoilt])
    assert "samples/text.png" in str(e.value)
    assert "samples/more.png" in str(e.value)


def test_what_is_cut_off_shows_when_it_is_read(spoilt):
    (spoilt / "text.png").unlink()
    pictures = open_pictures([spoilt])
    with pytest.raises(UnreadablePicture, match=r"samples/cut\.png cannot be read"):
        list(pictures.batches(range(len(pictures)), 3))


@pytest.mark.parametrize("size", [1, 3, 100])
def test_bad_ones_are_passed_over_and_named(spoilt, size):
    pictures = open_pictures([spoilt], skip_bad=True)
    assert len(pictures) == 7
    assert pictures.skipped == ["samples/text.png"]
    ranks = [rank for found, *_ in pictures.batches(range(7), size) for rank in found]
    assert pictures.skipped == ["samples/text.png", "samples/cut.png"]
    assert sorted({*range(7)} - {*ranks}) == [pictures.names.index("samples/cut.png")]


def test_many_bad_ones_are_counted(tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02}.png").write_bytes(b"no picture")
    for skip_bad in (False, True):  # nothing would be left
        with pytest.raises(
            InputError, match=r"^pictures: 20 of 20 cannot be read, .*/00\.png .* and 15 more; "
        ) as caught:
            open_pictures([tmp_path], skip_bad=skip_bad)
        assert "\n" not in str(caught.value)


def test_picture_gone_since_opening(folder):
    pictures = open_pictures([folder], skip_bad=True)
    (folder / "1-goldfish-2.png").unlink()
    assert [len(found) for found, *_ in pictures.batches(range(6), 6)] == [5]
    assert pictures.skipped == ["samples/1-goldfish-2.png"]


def test_long_headers_are_read_whole(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "x" * 30_000
    (tmp_path / "1.jpg").write_bytes(encoded(picture(0), "JPEG", exif=exif, icc_profile=b"y" * 100_000))
    (tmp_path / "2.png").write_bytes(encoded(picture(0), icc_profile=np.random.RandomState(0).bytes(100_000)))
    assert open_pictures([tmp_path]).side == 8


# --- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: [], "no path; each path once, and at least one"),
        (lambda root: ["-"], "no path; "),
        (lambda root: [root / "absent"], "absent; No such file"),
        (lambda root: [root], "has none; a folder, .zip, .npz or .tar of pictures"),
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
    with pytest.raises(InputError, match=r"^pictures: ") as caught:
        open_pictures(make(tmp_path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_tar(folder, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for file in folder.iterdir():
            tar.add(file, file.name)
    content = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(content[:700])
    with pytest.raises(InputError, match=r"x\.tar|x\.tar/.*cannot be read"):
        open_pictures([tmp_path / "x.tar"])
    shutil.rmtree(folder)
