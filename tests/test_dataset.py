"""Sets of images with their labels: the same reader for training and evaluation, whatever the images are stored in."""

import json
import multiprocessing
import os
import pickle
import re
import shutil
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.provenances import image, made
from varcli.errors import InputError, UsageError
from varcli.images.dataset import open_images
from varcli.images.decode import UnreadableImage, adm_crop
from varcli.images.provenance import image_filename, png_bytes
from varcli.images.sources import FolderSource
from varcli.outputs.open import open_sink

SIDE = 8


def encoded(pixels, kind="PNG", **options):
    content = BytesIO()
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


def ppm(seed):
    """An image file whose bytes no library decides."""
    return b"P6 %d %d 255\n" % (SIDE, SIDE) + image(seed, SIDE, SIDE).tobytes()


def fill(folder, names, content=lambda seed: encoded(image(seed, SIDE, SIDE))):
    """Write a different image for each name."""
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(seed))
    return folder


def zipped(folder, path, top=""):
    with zipfile.ZipFile(path, "w") as stored:
        for file in sorted(folder.rglob("*"), reverse=True):
            if file.is_file():
                stored.writestr(top + file.relative_to(folder).as_posix(), file.read_bytes())
    return path


def tarred(files, path):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return path


def open_training(paths):
    """Images as training opens them."""
    return open_images(paths, require_labels=True, read_headers=False)


def names(images):
    return [images.name(i) for i in range(len(images))]


def order(images):
    return [name.split("/", 1)[1] for name in names(images)]


def everything(images):
    return [images.pixels(i).tobytes() for i in range(len(images))]


SAMPLES = [
    made(seed, class_id=class_id, class_name=name)
    for class_id, name in ((1, "goldfish"), (207, "golden retriever"), (None, "none"))
    for seed in (2, 10)
]


@pytest.fixture
def samples(tmp_path):
    """What `var sample --out` leaves, two images each of two classes and of none."""
    folder = tmp_path / "samples"
    folder.mkdir()
    for seed, each in enumerate(SAMPLES):
        (folder / image_filename(each)).write_bytes(png_bytes(image(seed), each))
    return folder


def last_names(images):
    return [name.rpartition("/")[2] for name in names(images)]


# --- what earlier versions gave --------------------------------------------------------------------


@pytest.fixture
def stores(tmp_path):
    """Images in every kind of store, the same byte for byte wherever the test runs."""
    pixels = np.stack([image(seed, SIDE, SIDE) for seed in range(70, 74)])
    np.savez(tmp_path / "x.npz", pixels, np.array([3, 0, -1, 3]))
    more = fill(tmp_path / "unzipped", ["dogs/11.ppm", "birds/1.ppm"], ppm)
    return {
        "pets": fill(
            tmp_path / "pets", ["dogs/10.ppm", "dogs/9.ppm", "cats/a 1.ppm", "cats/more/2.ppm", "red_panda/1.ppm"], ppm
        ),
        "wrapped": fill(
            tmp_path / "wrapped", [f"all/{name}.ppm" for name in ("n02099601/2", "n02099601/10", "n01443537/1")], ppm
        ),
        "more.zip": zipped(more, tmp_path / "more.zip"),
        "x.npz": tmp_path / "x.npz",
        "x.tar": tarred(
            {"0.ppm": ppm(60), "0.cls": b"7", "1.ppm": ppm(61), "1.cls": b"3", "2.ppm": ppm(62)}, tmp_path / "x.tar"
        ),
    }


@pytest.mark.parametrize(
    ("chosen", "fingerprint"),
    [
        ("pets", "11d5232ae6b89ed9b2f671b47f8991711f4f3abc1d417d1c57848e5c5246cb24"),
        ("wrapped", "fdd60fda38a4f64ea7488624bd1c9c3677dc121643ea38484d80c2dc832650c6"),
        ("pets more.zip", "1a83457c428bb667f74faf2dc073dffb4bd815dd9a1f181c1817c213195f546f"),
        ("more.zip pets", "1a83457c428bb667f74faf2dc073dffb4bd815dd9a1f181c1817c213195f546f"),
        ("pets wrapped", "98d620692ab6a4a6fb2963cb150878d5569b284225dae17e329db218bde8ec85"),
    ],
)
def test_training_knows_the_data_of_earlier_runs(stores, chosen, fingerprint):
    assert open_training([stores[name] for name in chosen.split()]).fingerprint() == fingerprint


@pytest.mark.parametrize(
    ("chosen", "resize", "fingerprint"),
    [
        ("pets", None, "20d8cc49991ffab34c19b3fa04c537b47dcaf86ca1384b699e2eb5f409a04b43"),
        ("pets", 4, "2786ba7419253ea63fc5e851732bd3f795d2df360f42be50e79fac2e1b946198"),
        ("wrapped", None, "3aaa4026903b7c3c00144efa80b1c44db73761f7ae0e97e306c8e907fb69f852"),
        ("more.zip", None, "8b0e8a2fad32b119d60c5186701cbb737a6a7376af703f8c37378dcac87305bb"),
        ("x.npz", None, "78b6c7af3f273997c40b4aae9b8314e86445f5a97886bbdf198a813ea59fd9d4"),
        ("x.tar", None, "b62f50a0578594cc53cac8aba7421d8dc19cc73a131bea5b5309c9d8411962e5"),
        ("x.tar x.npz more.zip wrapped pets", None, "a9eb8640e9831f476e15be539fd1e4e406869b0755312c6325fb4105d91e71f9"),
    ],
)
def test_evaluation_knows_the_images_of_earlier_runs(stores, chosen, resize, fingerprint):
    assert open_images([stores[name] for name in chosen.split()], resize=resize).fingerprint() == fingerprint


# --- training: layouts ---------------------------------------------------------------------------


NAMES = ["cats/cat_1.png", "cats/cat_2.png", "cats/cat_10.png", "dogs/b.png", "dogs/a.png"]


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "pets", NAMES)


def test_folder_lists_in_order_of_class_and_number(folder):
    images = open_training([folder])
    assert order(images) == ["cats/cat_1.png", "cats/cat_2.png", "cats/cat_10.png", "dogs/a.png", "dogs/b.png"]
    assert images.labels == [0, 0, 0, 1, 1]
    assert [(e.id, e.wnid, e.name) for e in images.classes.entries] == [(0, "cats", "cats"), (1, "dogs", "dogs")]
    assert images.name(0) == "pets/cats/cat_1.png"
    assert np.array_equal(images.pixels(1), image(1))


@pytest.mark.parametrize("top", ["", "pets/", "data/pets/", "./"])
def test_zip_is_as_good_as_its_folder(folder, tmp_path, top):
    stored = open_training([zipped(folder, tmp_path / "pets.zip", top)])
    unpacked = open_training([folder])
    assert stored.labels == unpacked.labels
    assert [stored.read(i).tobytes() for i in range(5)] == [unpacked.read(i).tobytes() for i in range(5)]
    assert stored.name(0) == f"pets.zip/{top}cats/cat_1.png"
    if not top:
        assert stored.fingerprint() == unpacked.fingerprint()


def test_sources_together_make_one_set_in_one_order(tmp_path):
    one = fill(tmp_path / "one", ["cats/1.png", "cats/10.png", "dogs/3.png"])
    two = zipped(fill(tmp_path / "two", ["cats/2.png", "birds/4.png"]), tmp_path / "two.zip")
    both = [open_training([one, two]), open_training([two, one])]
    for images in both:
        assert order(images) == ["birds/4.png", "cats/1.png", "cats/2.png", "cats/10.png", "dogs/3.png"]
        assert images.labels == [0, 1, 1, 1, 2]
    assert both[0].fingerprint() == both[1].fingerprint()


def test_wordnet_folders_get_imagenet_ids(tmp_path):
    images = open_training([fill(tmp_path, ["n02099601/a.png", "n01443537/a.png"])])
    assert [(e.id, e.name) for e in images.classes.entries] == [(1, "goldfish"), (207, "golden retriever")]
    assert images.labels == [0, 1]


def test_one_wordnet_folder_is_a_class_not_a_wrapping(tmp_path):
    images = open_training([fill(tmp_path, ["n02099601/images/a.png"])])
    assert [entry.id for entry in images.classes.entries] == [207]


def test_numbered_folders_get_their_numbers(tmp_path):
    images = open_training([fill(tmp_path, [f"{i}/a.png" for i in range(12)])])
    assert [entry.name for entry in images.classes.entries] == [str(i) for i in range(12)]


def test_files_that_are_no_images_are_ignored(folder, tmp_path):
    fill(folder, [".git/x.png", "__MACOSX/cats/._cat_1.png", "cats/._cat_1.png", "loose.png"])
    (folder / "cats" / "labels.txt").write_text("no image")
    (folder / "cats" / "Thumbs.db").write_bytes(b"no image")
    assert len(open_training([folder])) == 5
    assert len(open_training([zipped(folder, tmp_path / "x.zip", "pets/")])) == 5


def test_the_first_folder_is_the_class(tmp_path):
    images = open_training([fill(tmp_path, ["cats/images/1.png", "cats/more/2.PNG", "dogs/3.png"])])
    assert images.labels == [0, 0, 1]


def test_windows_made_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as stored:
        for value, name in enumerate(["cats\\1.png", "dogs\\2.png"]):
            info = zipfile.ZipInfo()
            info.filename = name  # past the constructor, which would fix it on Windows
            stored.writestr(info, encoded(image(value)))
    images = open_training([tmp_path / "x.zip"])
    assert images.labels == [0, 1]
    assert np.array_equal(images.pixels(1), image(1))


def test_class_names_taken_apart_by_a_mac_are_the_same_class(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    one, two = fill(tmp_path / "1", [f"{composed}/1.png", "x/1.png"]), fill(tmp_path / "2", [f"{decomposed}/2.png"])
    images = open_training([one, zipped(two, tmp_path / "2.zip")])
    assert [entry.name for entry in images.classes.entries] == [composed, "x"]
    assert images.labels == [0, 0, 1]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: [root / "absent"], "No such file"),
        (lambda root: [root], "has no images"),
        (lambda root: [fill(root, ["1.png", "2.png"])], "2 images without labels; expected one folder per class"),
        (lambda root: [fill(root, ["a/1.png"]), root], "only once"),
        (lambda root: [fill(root, ["a/1.png"]) / "a" / "1.png"], "is not a folder, .zip, .tar or .npz of images"),
        (lambda root: [zipped(fill(root / "x", ["1.png"]), root / "x.zip")], "x.zip has 1 image without labels"),
    ],
    ids=["absent", "empty", "flat", "twice", "an image", "flat zip"],
)
def test_unusable_training_data(tmp_path, make, words):
    with pytest.raises(InputError) as caught:
        open_training(make(tmp_path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_zip_is_refused(folder, tmp_path):
    path = zipped(folder, tmp_path / "x.zip")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"x\.zip"):
        open_training([path])


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may list every folder")
def test_unlistable_class_folder_is_not_passed_over(folder):
    (folder / "cats").chmod(0)
    try:
        with pytest.raises(InputError, match="cannot list pets"):
            open_training([folder])
    finally:
        (folder / "cats").chmod(0o700)


# --- what is found and what is left out ------------------------------------------------------------


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def folder_of(*names, content=b""):
    """A function that fills a folder with images, or with files of some content, of these names."""

    def make(root):
        (root / "d").mkdir(exist_ok=True)
        fill(root / "d", names, (lambda _: content) if content else lambda seed: encoded(image(seed, SIDE, SIDE)))

    return make


def all_of(*makers):
    return lambda root: [make(root) for make in makers]


PETS = folder_of("cat/1.png", "dog/1.png", "dog/2.png")

LEFT_OUT = {
    "no ending": (folder_of("cat/1.png", "dog/000001", "dog/2"), 3, []),
    "no ending and no image": (
        all_of(PETS, folder_of("dog/7", "dog/README", content=b"text")),
        3,
        ["left out: files without an ending that are no images (2): d/dog/7, d/dog/README"],
    ),
    "unknown ending": (
        all_of(PETS, folder_of("cat/2.HEIC", "dog/3.heic", "dog/4.png_original", content=b"x")),
        3,
        [
            "left out: files named .heic (2): d/cat/2.HEIC, d/dog/3.heic",
            "left out: files named .png_original (1): d/dog/4.png_original",
        ],
    ),
    "a class of them": (
        all_of(PETS, folder_of("bird/2.heic", content=b"x")),
        3,
        ["left out: files named .heic (1): d/bird/2.heic", "d: class folders without images: bird"],
    ),
    "a folder of other things beside the folder of classes": (
        all_of(folder_of("images/cat/1.png", "images/dog/1.png"), folder_of("notes/cat/bird/1.xml", content=b"x")),
        2,
        [],
    ),
    "a class that is only in another split": (
        folder_of("train/cat/1.png", "train/dog/1.png", "val/bird/1.png"),
        2,
        [
            "left out: images outside of train, the split that is trained on (1): d/val/bird/1.png",
            "d: class folders without images: bird",
        ],
    ),
    "names taken apart by a Mac": (folder_of("cafe\u0301/1.png", "dog/1.png"), 2, []),
    "empty class": (
        all_of(PETS, lambda root: (root / "d" / "ant").mkdir()),
        3,
        ["d: class folders without images: ant"],
    ),
    "no class": (
        all_of(PETS, folder_of("loose.png")),
        3,
        ["left out: images without a label (1): d/loose.png"],
    ),
    "what lies there as a matter of course": (
        all_of(PETS, folder_of("cat/Thumbs.db", "cat/a.txt", ".git/x", "@eaDir/1.jpg", "cat/._1.png", content=b"x")),
        3,
        [],
    ),
    "training run": (
        all_of(PETS, folder_of("run/samples/0.png"), folder_of("run/metrics.jsonl", content=b"{}")),
        3,
        ["left out: folders of training runs (1): d/run"],
    ),
    "training run that has just begun": (
        all_of(PETS, folder_of("run/tokens-0123456789abcdef/tokens.npy", content=b"x")),
        3,
        ["left out: folders of training runs (1): d/run"],
    ),
    "link to the folder above": (
        all_of(PETS, lambda root: link(root / "d/cat/up", "..")),
        3,
        ["left out: links to folders that are read already (1): d/cat/up"],
    ),
    "links to itself": (
        all_of(PETS, lambda root: [link(root / f"d/{i}", ".") for i in "ab"]),
        3,
        ["left out: links to folders that are read already (2): d/a, d/b"],
    ),
    "links through another folder": (
        all_of(
            PETS,
            lambda root: [link(root / "x" / f"{i}", root / "d") for i in range(3)],
            lambda root: [link(root / f"d/{i}", root / "x") for i in "ab"],
        ),
        3,
        [
            "left out: links to folders that are read already (4): d/b, d/a/0, d/a/1, d/a/2",
            "d: class folders without images: a",
        ],
    ),
    "a class behind a link": (
        all_of(folder_of("cat/1.png"), lambda root: link(root / "d/dog", fill(root / "x", ["1.png"]))),
        2,
        [],
    ),
    "links without an end": (all_of(PETS, lambda root: link(root / "d/cat/loop.txt", "loop.txt")), 3, []),
    "a pipe": (
        all_of(PETS, lambda root: os.mkfifo(root / "d/cat/2.png")),
        3,
        ["left out: pipes and devices (1): d/cat/2.png"],
    ),
    "a device": (
        all_of(PETS, lambda root: link(root / "d/cat/2.png", "/dev/zero")),
        3,
        ["left out: pipes and devices (1): d/cat/2.png"],
    ),
    "splits": (
        folder_of("train/cat/1.png", "train/dog/1.png", "Val/cat/1.png"),
        2,
        ["left out: images outside of train, the split that is trained on (1): d/Val/cat/1.png"],
    ),
    "splits deep inside": (
        folder_of("a/b/Training/n02099601/1.png", "a/b/Training/n01443537/1.png", "a/b/test/1.png"),
        2,
        ["left out: images outside of Training, the split that is trained on (1): d/a/b/test/1.png"],
    ),
    "keywords": (
        folder_of("all/1.png", "None/1.png"),
        2,
        ["0 None, 1 all must be given by number: the name has another meaning"],
    ),
    "a number of another class": (
        folder_of("1/1.png", "-/1.png"),
        2,
        ["0 1, 1 - must be given by number: the name has another meaning"],
    ),
    "numbers of their own": (folder_of("00/1.png", "007/1.png"), 2, []),
}


@pytest.mark.skipif(os.name == "nt", reason="links and pipes")
@pytest.mark.parametrize(("make", "count", "lines"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_is_left_out_is_told(tmp_path, make, count, lines):
    make(tmp_path)
    images = open_training([tmp_path / "d"])
    assert len(images) == count
    assert len(images.classes) == 2
    assert images.account[0].startswith(f"{count} images of 2 classes: ")
    assert images.account[1:] == lines


def test_splits_are_no_classes(tmp_path):
    fill(tmp_path / "d", ["train/cat/1.png", "train/dog/1.png", "val/cat/2.png", "val/dog/2.png"])
    archive = zipped(tmp_path / "d", tmp_path / "d.zip", "d/")
    for path in (tmp_path / "d", archive):
        assert [entry.name for entry in open_training([path]).classes.entries] == ["cat", "dog"]
        evaluated = open_images([path])
        assert [entry.name for entry in evaluated.classes.entries] == ["cat", "dog"]
        assert evaluated.account[1:] == [f"{path.name}: its splits train, val are taken together"]
    shutil.rmtree(tmp_path / "d" / "train")
    fill(tmp_path / "d", ["dev/cat/1.png"])
    with pytest.raises(InputError, match="d has the splits dev, val; give the one to train on"):
        open_training([tmp_path / "d"])


def test_a_class_may_be_called_train(tmp_path):
    images = open_training([fill(tmp_path, ["train/1.png", "car/1.png"])])
    assert [entry.name for entry in images.classes.entries] == ["car", "train"]


@pytest.mark.parametrize(
    ("folders", "ids"),
    [
        (["1", "2", "4"], [1, 2, 4]),
        (["10", "9", "003"], [3, 9, 10]),
        (["1", "01"], [0, 1]),
        (["1", "two"], [0, 1]),
        (["9" * 200, "1"], [0, 1]),
    ],
)
def test_whole_numbers_are_the_ids(tmp_path, folders, ids):
    images = open_training([fill(tmp_path, [f"{name}/1.png" for name in folders])])
    assert [entry.id for entry in images.classes.entries] == ids
    if ids[-1] > 1:
        assert [int(entry.name) for entry in images.classes.entries] == ids


def edm(root, labels, names=("00000/img00000000.png", "00000/img00000001.png", "00001/img00001000.png")):
    """A data set as EDM's dataset_tool writes it."""
    fill(root, names)
    (root / "dataset.json").write_text(json.dumps({"labels": labels and list(zip(names, labels, strict=True))}))
    return root


@pytest.mark.parametrize("pack", [lambda path: path, lambda path: zipped(path, path.with_suffix(".zip"))])
def test_labels_of_dataset_json(tmp_path, pack):
    path = pack(edm(tmp_path / "x", [6, 0, 6]))
    for images in (open_training([path]), open_images([path])):
        labels = {images.name(i)[-12:]: images.classes.entries[label].id for i, label in enumerate(images.labels)}
        assert labels == {"00000000.png": 6, "00000001.png": 0, "00001000.png": 6}
    unlabelled = pack(edm(tmp_path / "y", None))
    assert open_images([unlabelled]).labels == [-1, -1, -1]
    with pytest.raises(InputError, match="3 images without labels"):
        open_training([unlabelled])


@pytest.mark.parametrize(
    "pack",
    [
        lambda path: path,
        lambda path: zipped(path, path.with_suffix(".zip")),
        lambda path: zipped(path, path.with_suffix(".zip"), "deep/er/"),
        lambda path: tarred(
            {f"./{file.relative_to(path).as_posix()}": file.read_bytes() for file in path.rglob("*.*")},
            path.with_suffix(".tar"),
        ),
    ],
)
def test_a_dataset_json_may_be_in_a_folder_around_all_images(tmp_path, pack):
    edm(tmp_path / "x" / "set", [6, 0, 6])
    (tmp_path / "x" / "dataset.json").write_text("[]")  # another one of that name
    images = open_training([pack(tmp_path / "x")])
    assert [images.classes.entries[label].id for label in images.labels] == [0, 6, 6]


@pytest.mark.parametrize("labels", [[[1, 0], [0, 1], [0, 1]], ["a", "b", "c"], [0.5, 1, 1]])
def test_other_labels_in_dataset_json_are_refused(tmp_path, labels):
    with pytest.raises(InputError, match=r"has a dataset\.json that cannot be used: "):
        open_training([edm(tmp_path, labels)])


@pytest.mark.parametrize("content", ["[" * 100_000, '{"labels": 5}', '{"labels": [[1]]}', "\udcff"])
def test_damaged_dataset_json(tmp_path, content):
    edm(tmp_path, None)
    (tmp_path / "dataset.json").write_text(content, errors="surrogateescape")
    with pytest.raises(InputError, match=r"dataset\.json that cannot be used"):
        open_images([tmp_path])


def test_folders_of_a_thousand_images_are_no_classes(tmp_path):
    fill(tmp_path, ["000000/000003.png", "001000/001003.png", "001000/001004.png"])
    assert open_images([tmp_path]).labels == [-1] * 3
    with pytest.raises(InputError, match="without labels"):
        open_training([tmp_path])


@pytest.mark.parametrize(
    "paths",
    [["dup", "dup/000.png"], ["dup/000.png", "dup"], ["dup", "dup/sub"], ["dup", "link"], ["dup", "link/000.png"]],
)
def test_no_image_counts_twice(tmp_path, monkeypatch, paths):
    fill(tmp_path / "dup", ["000.png", "sub/1.png"])
    link(tmp_path / "link", "dup")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="which is given too: its images would count twice"):
        open_images(paths)


def test_an_empty_path_is_not_the_folder_one_is_in(samples, monkeypatch):
    monkeypatch.chdir(samples)
    with pytest.raises(InputError, match="a path of images is empty"):
        open_images([""])


def test_paths_that_find_separates_by_nul(samples):
    line = "".join(f"{path}\0" for path in samples.iterdir())
    assert everything(open_images(["-"], lines=[line])) == everything(open_images([samples]))


# --- training: archives with labels ----------------------------------------------------------------


def test_shards_of_webdataset_are_labelled_by_their_numbers(tmp_path):
    shards = [
        tarred({f"{i}.png": encoded(image(i)), f"{i}.cls": b"%d" % label}, tmp_path / f"{i}.tar")
        for i, label in enumerate((7, 3, 7))
    ]
    images = open_training(shards)
    assert names(images) == ["1.tar/1.png", "0.tar/0.png", "2.tar/2.png"]
    assert images.labels == [0, 1, 1]
    assert [entry.id for entry in images.classes.entries] == [3, 7]


def test_a_folder_around_the_images_of_a_shard_is_no_class(tmp_path):
    files = {"train/0.png": encoded(image(0)), "train/0.cls": b"5", "train/1.png": encoded(image(1))}
    images = open_training([tarred(files, tmp_path / "x.tar")])
    assert [entry.id for entry in images.classes.entries] == [5]
    assert names(images) == ["x.tar/train/0.png"]  # without a class, it is not trained on


def test_arrays_are_labelled_by_arr_1(tmp_path):
    pixels = np.stack([image(seed) for seed in range(4)])
    np.savez(tmp_path / "x.npz", pixels, np.array([5, 2, 5, 5]))
    images = open_training([tmp_path / "x.npz"])
    assert images.labels == [0, 1, 1, 1]
    assert everything(images)[0] == pixels[1].tobytes()


@pytest.mark.parametrize("ending", ["", ".tar", ".npz", ".zip"])
def test_samples_can_be_trained_on(samples, tmp_path, ending):
    if ending == ".zip":
        path = zipped(samples, tmp_path / "x.zip")
    else:
        path = tmp_path / f"x{ending}"
        with open_sink(str(path), several=True) as sink:
            for seed, each in enumerate(SAMPLES):
                sink.add(image(seed), each)
    images = open_training([path])
    assert [entry.name for entry in images.classes.entries] == ["goldfish", "golden retriever"]
    assert images.labels == [0, 0, 1, 1]
    assert everything(images) == [image(seed).tobytes() for seed in range(4)]


def test_folders_and_shards_together(folder, tmp_path):
    shard = tarred({"0.png": encoded(image(0)), "0.cls": b"1"}, tmp_path / "x.tar")
    images = open_training([folder, shard])
    assert [(entry.id, entry.name) for entry in images.classes.entries] == [(1, "1"), (2, "cats"), (3, "dogs")]
    assert images.labels == [0, 1, 1, 1, 2, 2]


def test_opening_to_train_reads_no_file(folder, monkeypatch):
    def unexpected(self, member, limit=-1):
        raise AssertionError(f"{member} was read")

    monkeypatch.setattr(FolderSource, "read", unexpected)
    assert len(open_training([folder])) == 5


# --- parts of a set --------------------------------------------------------------------------------


def test_holdout_is_the_last_of_each_class_in_natural_order(tmp_path):
    names = [f"{name}/{name}_{i}.png" for name in ("a", "b") for i in range(12)]
    sources = [zipped(fill(tmp_path / str(k), names[k::3]), tmp_path / f"{k}.zip") for k in range(3)]
    training, held_out = open_training(sources).split(4)
    assert order(held_out) == [f"{name}/{name}_{i}.png" for name in ("a", "b") for i in (8, 9, 10, 11)]
    assert order(training) == [f"{name}/{name}_{i}.png" for name in ("a", "b") for i in range(8)]
    assert held_out.labels == [0] * 4 + [1] * 4
    assert held_out.classes == training.classes


def test_no_holdout_leaves_the_set_whole(folder):
    training, held_out = open_training([folder]).split(0)
    assert len(training) == 5
    assert len(held_out) == 0
    assert len(held_out.split(0)[0]) == 0


@pytest.mark.parametrize("holdout", [-1, 2, 3])
def test_holdout_must_leave_something_to_train_on(folder, holdout):
    with pytest.raises(UsageError, match=f"--holdout must be .*got {holdout}; dogs has 2"):
        open_training([folder]).split(holdout)


def test_fingerprint_tells_sets_apart_and_does_not_mind_moving(folder, tmp_path):
    whole = open_training([folder])
    assert whole.subset([0, 1]).fingerprint() != whole.subset([0, 2]).fingerprint()
    shutil.copytree(folder, tmp_path / "elsewhere")
    moved = open_training([tmp_path / "elsewhere"])
    assert moved.fingerprint() == whole.fingerprint()
    (tmp_path / "elsewhere" / "cats" / "cat_1.png").write_bytes(encoded(image(9, 200, 200)))
    assert open_training([tmp_path / "elsewhere"]).fingerprint() != whole.fingerprint()


@pytest.mark.parametrize("ending", ["", ".zip", ".tar", ".npz"])
def test_set_travels_to_other_processes(folder, tmp_path, ending):
    pixels = np.stack([image(seed) for seed in range(5)])
    np.savez(tmp_path / "x.npz", pixels, np.arange(5))
    np.savez_compressed(tmp_path / "y.npz", pixels, np.arange(5))
    zipped(folder, tmp_path / "x.zip")
    tarred({name: (folder / name).read_bytes() for name in NAMES}, tmp_path / "x.tar")
    paths = {"": [folder], ".npz": [tmp_path / "x.npz", tmp_path / "y.npz"]}.get(ending, [tmp_path / f"x{ending}"])
    images = open_training(paths)
    content = pickle.dumps(images)
    assert pixels[0].tobytes() not in content  # an array stays where it is
    assert everything(pickle.loads(content)) == everything(images)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.map(images.read, range(len(images)))
    assert [each.tobytes() for each in there] == everything(images)


def test_zip_is_opened_anew_in_a_forked_process(folder, tmp_path, monkeypatch):
    images = open_training([zipped(folder, tmp_path / "x.zip")])
    source = images._images[0].source
    before = source._archive()
    assert source._archive() is before
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert source._archive() is not before
    before.close()


def test_paths_may_be_relative(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert open_training([Path()]).name(0) == "pets/cats/cat_1.png"


# --- evaluation: order -----------------------------------------------------------------------------------------


def test_order_is_that_in_which_torch_fidelity_takes_files(tmp_path):
    from torch_fidelity.utils import glob_samples_paths

    fill(tmp_path, ["b.png", "a/10.png", "a/9.png", "a.png", "B/x.png", "a/b/c.png", "a-b.png", "Z.png"])
    theirs = glob_samples_paths(str(tmp_path), True, "png", verbose=False)
    assert [f"{tmp_path.parent}/{name}" for name in names(open_images([tmp_path]))] == theirs


def test_samples_are_the_same_list_in_every_kind_of_store(samples, tmp_path):
    with open_sink(str(tmp_path / "x.npz"), several=True) as npz:
        for seed in (3, 0, 5, 1, 4, 2):  # in another order
            npz.add(image(seed, SIDE, SIDE), SAMPLES[seed])
    tarred({path.name: path.read_bytes() for path in samples.iterdir()}, tmp_path / "x.tar")
    zipped(samples, tmp_path / "x.zip")
    files = [str(path) for path in samples.iterdir()]
    reference = open_images([samples])
    assert reference.labels == [0, 0, 1, 1, -1, -1]
    assert [entry.name for entry in reference.classes.entries] == ["goldfish", "golden retriever"]
    for paths in ([tmp_path / "x.npz"], [tmp_path / "x.tar"], [tmp_path / "x.zip"], files, files[::-1]):
        images = open_images(paths)
        assert last_names(images) == last_names(reference)
        assert everything(images) == everything(reference)
        assert (images.labels, images.classes) == (reference.labels, reference.classes)


def test_arrays_without_names_are_in_one_order_however_shuffled(tmp_path):
    pixels = np.stack([image(seed, SIDE, SIDE) for seed in range(6)])
    labels = np.arange(6)
    np.savez(tmp_path / "1.npz", pixels, labels)
    np.savez(tmp_path / "2.npz", pixels[::-1], labels[::-1])
    one, two = (open_images([tmp_path / name]) for name in ("1.npz", "2.npz"))
    assert everything(one) == everything(two)
    assert one.labels == two.labels
    assert sorted(one.labels) == list(range(6))


def test_several_paths_are_one_list_in_whatever_order(tmp_path):
    one = fill(tmp_path / "one" / "samples", ["1.png", "2.png"])
    two = fill(tmp_path / "two" / "samples", ["2.png", "3.png"])
    lists = [open_images(paths) for paths in ([one, two], [two, one])]
    assert last_names(lists[0]) == ["1.png", "2.png", "2.png", "3.png"]
    assert everything(lists[0]) == everything(lists[1])


def test_paths_on_standard_input(samples, tmp_path):
    lines = [f"{path}\n" for path in samples.iterdir()]
    assert everything(open_images(["-"], lines=lines)) == everything(open_images([samples]))
    more = zipped(samples, tmp_path / "x.zip")
    assert len(open_images(["-", more], lines=["\n", *lines])) == 12
    assert len(open_images(["-"], lines=[f"{more}\r\n"])) == 6


# --- evaluation: classes ---------------------------------------------------------------------------------------


def test_class_folders(tmp_path):
    fill(tmp_path, ["n02099601/a.png", "n01443537/b.png", "n02099601/c.png"])
    images = open_images([tmp_path])
    assert [entry.id for entry in images.classes.entries] == [1, 207]
    assert images.labels == [0, 1, 1]
    assert images.class_counts() == [1, 2]


def test_png_of_ours_under_another_name_says_its_class(samples):
    (samples / "1-goldfish-2.png").rename(samples / "my fish.png")
    images = open_images([samples])
    assert images.labels[names(images).index("samples/my fish.png")] == 0


def test_shard_of_ours_and_of_others(tmp_path):
    with open_sink(str(tmp_path / "ours.tar"), several=True) as shard:
        for seed, each in enumerate(SAMPLES):
            shard.add(image(seed, SIDE, SIDE), each)
    images = open_images([tmp_path / "ours.tar"])
    assert images.labels == [0, 0, 1, 1, -1, -1]
    assert images.classes.entries[1].name == "golden retriever"
    files = {"0.jpg": encoded(image(0), "JPEG"), "0.cls": b"7\n", "1.png": encoded(image(1))}
    tarred(files, tmp_path / "theirs.tar")
    images = open_images([tmp_path / "theirs.tar"])
    assert [entry.id for entry in images.classes.entries] == [7]
    assert images.labels == [0, -1]


def test_zips_of_class_folders_in_an_extra_folder_are_one_set(tmp_path):
    for name, members in {"a": ["cats/1.png", "dogs/2.png"], "b": ["cats/3.png", "emus/1.png"]}.items():
        zipped(fill(tmp_path / name, members), tmp_path / f"{name}.zip", top=f"part-{name}/")
    images = open_images([tmp_path / "a.zip", tmp_path / "b.zip"])
    assert [entry.name for entry in images.classes.entries] == ["cats", "dogs", "emus"]
    assert images.labels == [0, 1, 0, 2]


def test_no_classes(tmp_path):
    images = open_images([fill(tmp_path, ["1.png", "2.png"])])
    assert (images.labels, len(images.classes), images.class_counts()) == ([-1, -1], 0, [])


# --- facts -----------------------------------------------------------------------------------------


def test_jpegs_are_counted_by_content(tmp_path):
    fill(tmp_path, ["1.png", "2.png", "3.png"])
    (tmp_path / "2.png").write_bytes(encoded(image(2), "JPEG"))
    (tmp_path / "4.jpg").write_bytes(encoded(image(2), "JPEG"))
    assert open_images([tmp_path]).jpegs == 2


def test_fingerprint_knows_the_images_again(samples, tmp_path):
    known = open_images([samples]).fingerprint()
    shutil.copytree(samples, tmp_path / "elsewhere" / samples.name)
    assert open_images([tmp_path / "elsewhere" / samples.name]).fingerprint() == known
    assert open_images([samples], resize=4).fingerprint() != known
    (samples / "1-goldfish-2.png").rename(samples / "1-goldfish-3.png")
    assert open_images([samples]).fingerprint() != known


def test_opening_reads_beginnings_only(tmp_path, monkeypatch):
    fill(tmp_path, ["1.png", "2.png"], lambda seed: encoded(image(seed, 200, 200)))  # noise: 120 kB each
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
        found.add((images.fingerprint(), sum(file.bytes for file in images._images)))
    assert len({fingerprint for fingerprint, _ in found}) == 2
    assert len({size for _, size in found}) == 1


# --- size ------------------------------------------------------------------------------------------


def test_side_is_that_of_the_images_or_the_one_asked_for(samples):
    assert open_images([samples]).side == SIDE
    smaller = open_images([samples], resize=3)
    assert smaller.side == 3
    assert np.array_equal(smaller.pixels(0), adm_crop(Image.fromarray(open_images([samples]).pixels(0)), 3))


@pytest.mark.parametrize(
    ("height", "width", "words"), [(8, 9, "9 × 8 pixels, but most are 8 × 8"), (9, 9, "9 × 9 pixels")]
)
def test_another_size_is_refused_and_named(samples, height, width, words):
    (samples / "odd.png").write_bytes(encoded(image(0, height, width)))
    with pytest.raises(
        InputError, match=f"^samples/odd.png is {words}.*; images must be squares of one size, or --resize"
    ):
        open_images([samples])
    sized = open_images([samples], resize=6)
    ((_, pixels, _),) = sized.batches(range(len(sized)), 100)
    assert pixels.shape == (7, 6, 6, 3)


def test_rectangles_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", np.zeros((3, 8, 6, 3), np.uint8))
    with pytest.raises(InputError, match=r"is 6 × 8 pixels; images must be squares of one size"):
        open_images([tmp_path / "x.npz"])
    assert open_images([tmp_path / "x.npz"], resize=4).pixels(0).shape == (4, 4, 3)


# --- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_batches_hold_what_was_asked_for_in_its_order(samples, size):
    images = open_images([samples])
    ranks = [5, 0, 3, 1, 4]
    batches = list(images.batches(ranks, size))
    assert [len(found) for found, *_ in batches] == [min(size, 5 - start) for start in range(0, 5, size)]
    assert [rank for found, *_ in batches for rank in found] == ranks
    assert [label for *_, labels in batches for label in labels] == [images.labels[rank] for rank in ranks]
    pixels = np.concatenate([pixels for _, pixels, _ in batches])
    assert pixels.dtype == np.uint8
    assert all(np.array_equal(pixels[at], images.pixels(rank)) for at, rank in enumerate(ranks))


def test_no_more_is_read_ahead_than_a_few_batches(samples, monkeypatch):
    images, read = open_images([samples]), []
    monkeypatch.setattr(images, "pixels", lambda i: read.append(i) or np.zeros((SIDE, SIDE, 3), np.uint8))
    batches = images.batches(iter(list(range(6)) * 100), 6)
    next(batches)
    batches.close()
    assert len(read) <= 18


# --- bad images ----------------------------------------------------------------------------------


@pytest.fixture
def spoilt(samples):
    """The same samples with one image that is none, and one cut off behind its header."""
    (samples / "text.png").write_bytes(b"no image")
    cut = encoded(np.random.RandomState(0).randint(0, 256, (SIDE, SIDE, 3)).astype(np.uint8))
    (samples / "cut.png").write_bytes(cut[:60])
    return samples


def test_files_that_are_no_images_show_before_any_work(spoilt):
    (spoilt / "more.png").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"^2 of 9 images cannot be read: samples/\w+\.png \(not an image.*; .*--skip-bad"
    ) as e:
        open_images([spoilt])
    assert "samples/text.png" in str(e.value)
    assert "samples/more.png" in str(e.value)


def test_truncated_images_show_when_they_are_read(spoilt):
    (spoilt / "text.png").unlink()
    images = open_images([spoilt])
    with pytest.raises(UnreadableImage, match=r"cannot read image samples/cut\.png"):
        list(images.batches(range(len(images)), 3))


@pytest.mark.parametrize("size", [1, 3, 100])
def test_bad_ones_are_skipped_and_named(spoilt, size):
    images = open_images([spoilt], skip_bad=True)
    assert len(images) == 7
    assert images.skipped == ["samples/text.png (not an image, or of an unknown format)"]
    ranks = [rank for found, *_ in images.batches(range(7), size) for rank in found]
    assert [name.partition(" ")[0] for name in images.skipped] == ["samples/text.png", "samples/cut.png"]
    assert sorted({*range(7)} - {*ranks}) == [names(images).index("samples/cut.png")]


def test_many_bad_ones_are_counted(tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02}.png").write_bytes(b"no image")
    for skip_bad in (False, True):  # nothing would be left
        with pytest.raises(InputError, match=r"^20 of 20 images cannot be read: .*/00\.png .* and 15 more; ") as caught:
            open_images([tmp_path], skip_bad=skip_bad)
        assert "\n" not in str(caught.value)


def test_image_gone_since_opening(samples):
    images = open_images([samples], skip_bad=True)
    (samples / "1-goldfish-2.png").unlink()
    assert [len(found) for found, *_ in images.batches(range(6), 6)] == [5]
    (skipped,) = images.skipped
    assert re.fullmatch(r"samples/1-goldfish-2.png \(.*No such file.*\)", skipped)


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
        (lambda root: [], "no path of images was given"),
        (lambda root: ["-"], "no path of images was given"),
        (lambda root: [root / "absent"], "absent: No such file"),
        (lambda root: [root], "has no images; expected a folder, .zip, .tar or .npz of images"),
        (lambda root: [fill(root, ["1.png"]), root / "."], "only once"),
        (lambda root: [fill(root, ["1.png"]) / "1.png"] * 2, "1.png twice"),
        (lambda root: [(root / "x.zip").write_bytes(b"none") and root / "x.zip"], "cannot list x.zip"),
        (lambda root: [(root / "x.tar").write_bytes(b"none") and root / "x.tar"], "cannot list x.tar"),
        (lambda root: [(root / "x.npz").write_bytes(b"none") and root / "x.npz"], "expected arr_0, uint8"),
        (lambda root: [(root / "x.pt").write_bytes(b"none") and root / "x.pt"], "1 of 1 images cannot be read"),
    ],
    ids=["nothing", "no lines", "absent", "empty", "twice", "file twice", "zip", "tar", "npz", "other"],
)
def test_unusable_paths(tmp_path, make, words):
    with pytest.raises(InputError) as caught:
        open_images(make(tmp_path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_tar(samples, tmp_path):
    tarred({path.name: path.read_bytes() for path in samples.iterdir()}, tmp_path / "x.tar")
    content = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(content[:700])
    with pytest.raises(InputError, match=r"x\.tar"):
        open_images([tmp_path / "x.tar"])


def test_copies_are_counted_and_estimated_from_a_few(tmp_path):
    fill(tmp_path, [f"a/{i}.ppm" for i in range(30)], lambda seed: ppm(seed % 20))
    fill(tmp_path, [f"b/{i}.ppm" for i in range(10)], lambda seed: ppm(100 + seed) + bytes(seed))
    found = open_images([tmp_path], require_labels=True, read_headers=False)
    assert found.copies() == 10 / 40
    assert found.copies(most=25) == pytest.approx(5 / 25 * 31 / 40)
