"""Data sets: folders and zips of class folders, their order, and images of every kind."""

import multiprocessing
import os
import pickle
import shutil
import struct
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from varcli.classes import ClassTable
from varcli.errors import InputError, UsageError
from varcli.images.dataset import natural_key, open_image_set
from varcli.images.decode import UnreadableImage, decode_image, square_crop


def encoded(image, kind="PNG", **options):
    content = BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def plain(value, side=8):
    """An image file of one grey."""
    return encoded(Image.new("RGB", (side, side), (value, value, value)))


def fill(root, names):
    for value, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(plain(value))
    return root


def zipped(folder, target, top=""):
    with zipfile.ZipFile(target, "w") as stored:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                stored.writestr(top + path.relative_to(folder).as_posix(), path.read_bytes())
    return target


NAMES = ["cats/cat_1.png", "cats/cat_2.png", "cats/cat_10.png", "dogs/b.png", "dogs/a.png"]


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "pets", NAMES)


def order(images):
    return [images.name(i).split("/", 1)[1] for i in range(len(images))]


# --- finding images ------------------------------------------------------------------------------


def test_folder_lists_in_order_of_class_and_number(folder):
    images = open_image_set([folder])
    assert order(images) == ["cats/cat_1.png", "cats/cat_2.png", "cats/cat_10.png", "dogs/a.png", "dogs/b.png"]
    assert images.rows == [0, 0, 0, 1, 1]
    assert [(e.id, e.wnid, e.name) for e in images.classes.entries] == [(0, "cats", "cats"), (1, "dogs", "dogs")]
    assert images.name(0) == "pets/cats/cat_1.png"
    assert images.read(2).getpixel((0, 0)) == (2, 2, 2)


@pytest.mark.parametrize("top", ["", "pets/", "data/pets/", "./"])
def test_zip_is_as_good_as_its_folder(folder, tmp_path, top):
    stored = open_image_set([zipped(folder, tmp_path / "pets.zip", top)])
    unpacked = open_image_set([folder])
    assert stored.rows == unpacked.rows
    assert [stored.read(i).tobytes() for i in range(5)] == [unpacked.read(i).tobytes() for i in range(5)]
    assert stored.name(0) == f"pets.zip/{top}cats/cat_1.png"
    if not top:
        assert stored.fingerprint() == unpacked.fingerprint()


def test_sources_together_make_one_set_in_one_order(tmp_path):
    one = fill(tmp_path / "one", ["cats/1.png", "cats/10.png", "dogs/3.png"])
    two = zipped(fill(tmp_path / "two", ["cats/2.png", "birds/4.png"]), tmp_path / "two.zip")
    both = [open_image_set([one, two]), open_image_set([two, one])]
    for images in both:
        assert order(images) == ["birds/4.png", "cats/1.png", "cats/2.png", "cats/10.png", "dogs/3.png"]
        assert images.rows == [0, 1, 1, 1, 2]
    assert both[0].fingerprint() == both[1].fingerprint()


def test_wordnet_folders_get_imagenet_ids(tmp_path):
    images = open_image_set([fill(tmp_path, ["n02099601/a.png", "n01443537/a.png"])])
    assert [(e.id, e.name) for e in images.classes.entries] == [(1, "goldfish"), (207, "golden retriever")]
    assert images.rows == [0, 1]


def test_one_wordnet_folder_is_a_class_not_a_wrapping(tmp_path):
    images = open_image_set([fill(tmp_path, ["n02099601/images/a.png"])])
    assert [entry.id for entry in images.classes.entries] == [207]


def test_numbered_folders_get_their_numbers(tmp_path):
    images = open_image_set([fill(tmp_path, [f"{i}/a.png" for i in range(12)])])
    assert [entry.name for entry in images.classes.entries] == [str(i) for i in range(12)]


def test_what_is_no_image_is_passed_over(folder, tmp_path):
    fill(folder, [".git/x.png", "__MACOSX/cats/._cat_1.png", "cats/._cat_1.png", "loose.png"])
    (folder / "cats" / "labels.txt").write_text("no image")
    (folder / "cats" / "Thumbs.db").write_bytes(b"no image")
    assert len(open_image_set([folder])) == 5
    assert len(open_image_set([zipped(folder, tmp_path / "x.zip", "pets/")])) == 5


def test_classes_of_several_parts_are_told_apart_by_the_first_folder(tmp_path):
    images = open_image_set([fill(tmp_path, ["cats/images/1.png", "cats/more/2.PNG", "dogs/3.png"])])
    assert images.rows == [0, 0, 1]


def test_windows_made_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as stored:
        for value, name in enumerate(["cats\\1.png", "dogs\\2.png"]):
            info = zipfile.ZipInfo()
            info.filename = name  # past the constructor, which would mend it on Windows
            stored.writestr(info, plain(value))
    images = open_image_set([tmp_path / "x.zip"])
    assert images.rows == [0, 1]
    assert images.read(1).getpixel((0, 0)) == (1, 1, 1)


def test_class_names_taken_apart_by_a_mac_are_the_same_class(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    one, two = fill(tmp_path / "1", [f"{composed}/1.png", "x/1.png"]), fill(tmp_path / "2", [f"{decomposed}/2.png"])
    images = open_image_set([one, zipped(two, tmp_path / "2.zip")])
    assert [entry.name for entry in images.classes.entries] == [composed, "x"]
    assert images.rows == [0, 0, 1]


def test_natural_order():
    assert sorted(["n1_10", "n1_2", "n10_1", "n2_1"], key=natural_key) == ["n1_2", "n1_10", "n2_1", "n10_1"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: [root / "absent"], "No such file"),
        (lambda root: [root], "no class folders"),
        (lambda root: [fill(root, ["1.png", "2.png"])], "2 images and no class folders"),
        (lambda root: [fill(root, ["a/1.png"]), root], "each path once"),
        (lambda root: [fill(root, ["a/1.png"]) / "a" / "1.png"], "a folder of class folders, or a zip of one"),
        (lambda root: [zipped(fill(root / "x", ["1.png"]), root / "x.zip")], "x.zip has 1 images"),
    ],
    ids=["absent", "empty", "flat", "twice", "an image", "flat zip"],
)
def test_unusable_data(tmp_path, make, words):
    with pytest.raises(InputError, match=r"^data: ") as caught:
        open_image_set(make(tmp_path))
    assert words in str(caught.value)


def test_truncated_zip_is_refused(folder, tmp_path):
    path = zipped(folder, tmp_path / "x.zip")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"x\.zip"):
        open_image_set([path])


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may list every folder")
def test_unlistable_class_folder_is_not_passed_over(folder):
    (folder / "cats").chmod(0)
    try:
        with pytest.raises(InputError, match="cannot be listed"):
            open_image_set([folder])
    finally:
        (folder / "cats").chmod(0o700)


# --- parts of a set --------------------------------------------------------------------------------


def test_holdout_is_the_last_of_each_class_in_natural_order(tmp_path):
    names = [f"{name}/{name}_{i}.png" for name in ("a", "b") for i in range(12)]
    sources = [zipped(fill(tmp_path / str(k), names[k::3]), tmp_path / f"{k}.zip") for k in range(3)]
    training, held_out = open_image_set(sources).split(4)
    assert order(held_out) == [f"{name}/{name}_{i}.png" for name in ("a", "b") for i in (8, 9, 10, 11)]
    assert order(training) == [f"{name}/{name}_{i}.png" for name in ("a", "b") for i in range(8)]
    assert held_out.rows == [0] * 4 + [1] * 4
    assert held_out.classes == training.classes


def test_no_holdout_leaves_the_set_whole(folder):
    training, held_out = open_image_set([folder]).split(0)
    assert len(training) == 5
    assert len(held_out) == 0
    assert len(held_out.split(0)[0]) == 0


@pytest.mark.parametrize("holdout", [-1, 2, 3])
def test_holdout_must_leave_something_to_train_on(folder, holdout):
    with pytest.raises(UsageError, match=f"holdout: {holdout}; .*dogs has 2"):
        open_image_set([folder]).split(holdout)


def test_fingerprint_tells_sets_apart_and_does_not_mind_moving(folder, tmp_path):
    whole = open_image_set([folder])
    assert whole.subset([0, 1]).fingerprint() != whole.subset([0, 2]).fingerprint()
    shutil.copytree(folder, tmp_path / "elsewhere")
    moved = open_image_set([tmp_path / "elsewhere"])
    assert moved.fingerprint() == whole.fingerprint()
    (tmp_path / "elsewhere" / "cats" / "cat_1.png").write_bytes(plain(9, side=200))
    assert open_image_set([tmp_path / "elsewhere"]).fingerprint() != whole.fingerprint()


def test_set_travels_to_other_processes(folder, tmp_path):
    images = open_image_set([zipped(folder, tmp_path / "x.zip")])
    here = [images.read(i).tobytes() for i in range(5)]
    again = pickle.loads(pickle.dumps(images))
    assert [again.read(i).tobytes() for i in range(5)] == here
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert [image.tobytes() for image in pool.map(images.read, range(5))] == here


def test_zip_is_opened_anew_in_a_forked_process(folder, tmp_path, monkeypatch):
    images = open_image_set([zipped(folder, tmp_path / "x.zip")])
    source = images._sources[0]
    before = source._archive()
    assert source._archive() is before
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert source._archive() is not before
    before.close()


# --- images of every kind ------------------------------------------------------------------------


def corners(image):
    return image.getpixel((0, 0)), image.getpixel((image.width - 1, 0))


def two_tone(mode, left, right):
    image = Image.new(mode, (8, 4), left)
    image.paste(right, (4, 0, 8, 4))
    return image


def palette(kind, **options):
    image = two_tone("P", 0, 1)
    image.putpalette([200, 10, 20, 30, 40, 50])
    return encoded(image, kind, **options)


def sixteen_bits():
    values = np.zeros((4, 8), np.uint16)
    values[:, 4:] = 65535
    values[:, :4] = 257 * 100
    return encoded(Image.fromarray(values))


WHITE, BLACK = (255, 255, 255), (0, 0, 0)


@pytest.mark.parametrize(
    ("content", "left", "right"),
    [
        (encoded(two_tone("RGB", (1, 2, 3), (4, 5, 6))), (1, 2, 3), (4, 5, 6)),
        (encoded(two_tone("L", 7, 8)), (7, 7, 7), (8, 8, 8)),
        (encoded(two_tone("1", 0, 1)), BLACK, WHITE),
        (sixteen_bits(), (100, 100, 100), WHITE),
        (encoded(two_tone("RGBA", (9, 9, 9, 0), (4, 5, 6, 255))), WHITE, (4, 5, 6)),
        (encoded(two_tone("LA", (9, 0), (4, 255))), WHITE, (4, 4, 4)),
        (palette("PNG", transparency=0), WHITE, (30, 40, 50)),
        (palette("GIF"), (200, 10, 20), (30, 40, 50)),
        (encoded(two_tone("CMYK", (0, 0, 0, 0), (0, 0, 0, 255)), "TIFF"), WHITE, BLACK),
        (encoded(two_tone("CMYK", (0, 0, 0, 0), (0, 0, 0, 255)), "JPEG", quality=100), WHITE, BLACK),
        (encoded(two_tone("F", 12.0, 20.0), "TIFF"), (12, 12, 12), (20, 20, 20)),
        (palette("GIF", save_all=True, append_images=[Image.new("L", (8, 4), 99)]), (200, 10, 20), (30, 40, 50)),
    ],
    ids=["rgb", "grey", "bits", "16 bits", "rgba", "grey alpha", "hole", "gif", "cmyk", "cmyk jpeg", "float", "frames"],
)
def test_every_kind_becomes_rgb(content, left, right):
    image = decode_image(content, "x")
    assert image.mode == "RGB"
    assert image.size == (8, 4)
    assert np.abs(np.subtract(corners(image), (left, right))).max() <= 1


def test_camera_images_stand_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter: the first row is the right edge
    content = encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)
    assert decode_image(content, "x").size == (4, 8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_spoil_a_image():
    content = encoded(Image.new("RGB", (8, 4)), "JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff\x01")
    assert decode_image(content, "x").size == (8, 4)


def bomb():
    content = bytearray(encoded(Image.new("L", (8, 8))))
    content[16:24] = struct.pack(">II", 60000, 60000)
    return bytes(content)


JPEG = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), "JPEG")


@pytest.mark.parametrize(
    "content",
    [b"", b"text", JPEG[:300], JPEG[: len(JPEG) // 2], plain(3, 64)[:-40], bomb(), b"\x89PNG\r\n\x1a\n" + bytes(50)],
    ids=["empty", "text", "header", "half a jpeg", "cut png", "bomb", "zeros"],
)
def test_unreadable_image_is_named(content, tmp_path):
    fill(tmp_path, ["a/1.png", "a/2.png"])
    (tmp_path / "a" / "2.png").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as stored:
        stored.write(tmp_path / "a" / "2.png", "a/2.png")
    for images, i in ((open_image_set([tmp_path]), 1), (open_image_set([tmp_path / "x.zip"]), 0)):
        with pytest.raises(UnreadableImage, match=r"^image: .*/a/2\.png cannot be read; \S") as caught:
            images.read(i)
        again = pickle.loads(pickle.dumps(caught.value))
        assert (str(again), again.name) == (str(caught.value), images.name(i))


def test_image_gone_or_spoilt_since_opening_is_named(folder, tmp_path):
    path = zipped(folder, tmp_path / "x.zip")
    stored, unpacked = open_image_set([path]), open_image_set([folder])
    data = bytearray(path.read_bytes())
    data[60:80] = bytes(20)
    path.write_bytes(data)
    (folder / "cats" / "cat_1.png").unlink()
    for images in (stored, unpacked):
        with pytest.raises(UnreadableImage, match=r"cats/cat_1\.png cannot be read"):
            images.read(0)


# --- squares ---------------------------------------------------------------------------------------


def gradient(width, height):
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([across, down, 0 * down], -1).astype(np.uint8))


def test_image_of_the_right_size_is_left_as_it_is():
    image = gradient(16, 16)
    assert np.array_equal(square_crop(image, 16), np.asarray(image))


@pytest.mark.parametrize(("corner", "left", "top"), [((0, 0), 0, 0), ((1, 1), 10, 4), ((0.5, 0), 5, 0), (None, 5, 2)])
def test_corner_is_a_share_of_the_room(corner, left, top):
    cut = square_crop(gradient(26, 20), 16, enlarge=20 / 16, corner=corner)
    assert cut.shape == (16, 16, 3)
    assert cut.dtype == np.uint8
    assert tuple(cut[0, 0]) == (left, top, 0)


@pytest.mark.parametrize("size", [(64, 64), (65, 40), (3, 500), (500, 3), (1, 1), (72, 71)])
def test_square_of_any_image(size):
    for enlarge in (1.0, 1.125):
        for corner in (None, (0.0, 0.0), (1.0, 1.0), (0.3, 0.999)):
            assert square_crop(Image.new("RGB", size, "white"), 64, enlarge, corner).min() == 255


def test_shorter_side_decides_the_scale():
    cut = square_crop(gradient(200, 100), 50)
    assert np.allclose(cut[25, 25, :2], (100, 50), atol=2)
    assert np.allclose(np.diff(cut[25, :, 0].astype(int)), 2, atol=1)


def test_empty_class_table_of_a_set_is_json():
    assert ClassTable.from_json(ClassTable(()).to_json()) == ClassTable(())


def test_paths_may_be_relative(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert open_image_set([Path()]).name(0) == "pets/cats/cat_1.png"
