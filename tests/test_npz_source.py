"""Images inside an .npz: read in place, ordered whatever way they were shuffled, with their classes."""

import io
import zipfile

import numpy as np
import pytest

from support.provenances import image, made
from varcli.classes import imagenet
from varcli.errors import InputError
from varcli.images.arrays import NpzSource
from varcli.images.decode import decode_image
from varcli.images.provenance import image_filename

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
    arrays = NpzSource(path)
    return {name: np.asarray(decode_image(arrays.read(name), name)) for name, _ in arrays.members()}


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
    arrays = NpzSource(save(tmp_path / "x.npz"))
    assert isinstance(arrays._pixels_NHW3, np.memmap)
    assert not arrays._pixels_NHW3.flags.writeable
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


@pytest.mark.parametrize("most", [0, 5, 11, 12, 40, 10_000])
def test_beginning_of_a_image(tmp_path, most):
    arrays = NpzSource(save(tmp_path / "x.npz"))
    name, size = next(arrays.members())
    assert arrays.read(name, most) == arrays.read(name)[:most]
    assert size == 4 * 6 * 3


def test_images_of_ours_are_called_as_in_a_folder(tmp_path):
    lines = [
        made(seed, class_id=1 + seed % 2, class_name=("goldfish", "great white shark")[seed % 2]) for seed in range(5)
    ]
    path = add_provenance(save(tmp_path / "x.npz"), lines)
    found = by_name(path)
    assert list(found) == [image_filename(each) for each in lines]
    assert all(np.array_equal(pixels, expected) for pixels, expected in zip(found.values(), PIXELS, strict=True))
    assert NpzSource(path).entry("1-goldfish-0.png") == imagenet().by_id(1)


def test_labels_of_others(tmp_path):
    path = save(tmp_path / "x.npz", arr_1=np.array([3, 3, 9, -1, 0]))
    arrays = NpzSource(path)
    ids = {}
    for name, _ in arrays.members():
        entry = arrays.entry(name)
        ids[decode_image(arrays.read(name), name).tobytes()] = entry and entry.id
    assert [ids[pixels.tobytes()] for pixels in PIXELS] == [3, 3, 9, None, 0]


@pytest.mark.parametrize("labels", [np.zeros(4, int), np.zeros((5, 10), int), np.zeros(5), np.array(list("abcde"))])
def test_what_are_no_labels_is_passed_over(tmp_path, labels):
    arrays = NpzSource(save(tmp_path / "x.npz", arr_1=labels))
    assert [arrays.entry(name) for name, _ in arrays.members()] == [None] * 5


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
    with pytest.raises(InputError, match=f"^images: .*x.npz; .*{words}; an .npz with arr_0, uint8"):
        NpzSource(save(tmp_path / "x.npz", pixels))


def test_no_such_array_and_no_such_file(tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.zeros(3))
    (tmp_path / "y.npz").write_bytes(b"no zip")
    for name in ("x.npz", "y.npz", "absent.npz"):
        with pytest.raises(InputError, match=f"^images: .*{name}; .*an .npz with arr_0") as caught:
            NpzSource(tmp_path / name)
        assert "\n" not in str(caught.value)
