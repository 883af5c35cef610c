"""References: what is saved is read again, other toolkits' files too, and what is none is refused in one line."""

import dataclasses
import os
import zipfile

import numpy as np
import pytest

from support.provenances import image
from test_sources import damaged
from varcli.errors import InputError, RunError
from varcli.evaluation import references
from varcli.evaluation.references import holds_images, read_reference, save_reference
from varcli.evaluation.statistics import FeatureShape, Moments
from varcli.files import file_sha256
from varcli.images.dataset import open_images

POOL = 2048
SHAPE = FeatureShape(pool=POOL)
RANDOM = np.random.RandomState(0)
MEAN, COVARIANCE = RANDOM.rand(POOL), np.diag(RANDOM.rand(POOL))
MOMENTS = Moments(50, MEAN, COVARIANCE)
FEATURES = RANDOM.rand(50, POOL).astype(np.float32)


@pytest.fixture
def saved(tmp_path):
    save_reference(tmp_path / "ours.npz", MOMENTS, pixels=64, extractor="a" * 64, pool=FEATURES)
    return tmp_path / "ours.npz"


def test_what_is_saved_is_read_again(saved):
    reference = read_reference(saved)
    assert np.array_equal(reference.mean, MEAN)
    assert np.array_equal(reference.covariance, COVARIANCE)
    assert np.array_equal(reference.pool, FEATURES)
    assert reference.mean.dtype == reference.covariance.dtype == np.float64
    assert (reference.count, reference.pixels, reference.extractor) == (50, 64, "a" * 64)
    assert (reference.name, reference.sha256) == ("ours.npz", file_sha256(saved))
    assert read_reference(saved, "imagenet-256").name == "imagenet-256"
    assert reference.path is None


def test_equal_statistics_make_equal_files(saved, tmp_path):
    save_reference(tmp_path / "again.npz", MOMENTS, pixels=64, extractor="a" * 64, pool=FEATURES)
    assert file_sha256(tmp_path / "again.npz") == file_sha256(saved)


def test_other_toolkits_read_ours(saved):
    with np.load(saved, allow_pickle=False) as stored:
        assert stored["mu"].shape == (POOL,)
        assert stored["sigma"].shape == (POOL, POOL)


def test_without_features(tmp_path):
    save_reference(tmp_path / "x.npz", MOMENTS, pixels=64, extractor="a" * 64)
    assert read_reference(tmp_path / "x.npz").pool is None
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_batches_as_adm_has_them(tmp_path):
    pixels = np.stack([image(seed) for seed in range(5)])
    arrays = {"mu": MEAN.astype(np.float32), "sigma": COVARIANCE, "mu_s": np.zeros(7), "sigma_s": np.eye(7)}
    np.savez(tmp_path / "adm.npz", pixels, **arrays)
    reference = read_reference(tmp_path / "adm.npz")
    assert reference.mean.dtype == np.float64
    assert (reference.count, reference.extractor, reference.pool) == (None, None, None)
    images = open_images([reference.path])
    assert (len(images), images.side) == (5, 8)
    assert reference.pixels == 8
    reference.check_extractor("inception", "b" * 64, SHAPE)  # nothing is known against it
    np.savez(tmp_path / "wide.npz", np.zeros((5, 8, 6, 3), np.uint8), **arrays)
    assert read_reference(tmp_path / "wide.npz").pixels is None


def test_other_weights_are_refused(saved):
    reference = read_reference(saved)
    reference.check_extractor("inception", "a" * 64, SHAPE)
    with pytest.raises(InputError, match=r"was made with weights a{12}, and those of inception are b{12}; make stat"):
        reference.check_extractor("inception", "b" * 64, SHAPE)
    dataclasses.replace(reference, extractor=None).check_extractor("inception", "b" * 64, SHAPE)


def write(path, **arrays):
    np.savez(path, **arrays)
    return path


def holed(array):
    array = array.copy()
    array.flat[-1] = np.nan
    return array


GOOD = {"mu": MEAN, "sigma": COVARIANCE}


def with_header(path, name, shape):
    """Good statistics but for the header of one array."""
    write(path, **{key: value for key, value in GOOD.items() if key != name})
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{name}.npy", b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header + bytes(80))
    return path


def test_more_statistics_than_memory_takes_are_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(references, "MOST_BYTES", 1 << 20)
    with pytest.raises(InputError, match=r"has 0\.0 GiB of statistics, and at most 0 are read"):
        read_reference(write(tmp_path / "x.npz", **GOOD))


@pytest.mark.skipif(os.name == "nt", reason="no pipes")
def test_a_pipe_is_no_reference(tmp_path):
    os.mkfifo(tmp_path / "x.npz")
    for look in (holds_images, read_reference):
        with pytest.raises(InputError, match="is a pipe or device"):
            look(tmp_path / "x.npz")


def test_rounding_makes_no_covariance_wrong(tmp_path):
    features = np.random.RandomState(0).rand(50, 300)
    sigma = np.cov(features.T).astype(np.float32)  # of rank 49: the other variances are zero but for rounding
    assert np.linalg.eigvalsh(sigma).min() < 0
    assert read_reference(write(tmp_path / "x.npz", mu=features.mean(0), sigma=sigma)).covariance.shape == (300, 300)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path, "cannot be read: No such file"),
        (lambda path: path.write_bytes(b"no zip") and path, "is not an .npz of statistics"),
        (lambda path: path.touch() or path, "is not an .npz of statistics"),
        (lambda path: write(path, sigma=COVARIANCE), "has no mu;"),
        (lambda path: write(path, arr_0=MEAN), "has no mu and no sigma;"),
        (lambda path: write(path, mu=MEAN[:64], sigma=COVARIANCE), "not floats (64, 64)"),
        (lambda path: write(path, mu=MEAN, sigma=MEAN), "has a sigma of float64 (2048,)"),
        (lambda path: write(path, mu=MEAN.astype(int), sigma=COVARIANCE), "has a mu of int64"),
        (lambda path: write(path, mu=MEAN.astype("U5"), sigma=COVARIANCE), "has a mu of <U5"),
        (lambda path: write(path, mu=MEAN.astype(object), sigma=COVARIANCE), "is not an .npz of statistics"),
        (lambda path: write(path, mu=holed(MEAN), sigma=COVARIANCE), "has a mu with values that are not finite"),
        (lambda path: write(path, mu=MEAN, sigma=holed(COVARIANCE)), "has a sigma with values that are not finite"),
        (lambda path: write(path, **GOOD, pool=FEATURES[:, 1:]), "has a pool of float32 (50, 2047)"),
        (lambda path: write(path, **GOOD, pool=holed(FEATURES)), "has a pool with values that are not finite"),
        (lambda path: write(path, **GOOD, pool=np.float32(1)), "is not an .npz of statistics"),
        (lambda path: write(path, **GOOD, n="many"), "is not an .npz of statistics"),
        (lambda path: write(path, **GOOD, n=-1), "is of -1 images"),
        (lambda path: write(path, **GOOD, mu_s=MEAN[:9], sigma_s=-np.eye(9)), "has a sigma_s that is not a covariance"),
        (lambda path: write(path, mu=MEAN, sigma=-COVARIANCE), "has negative variances"),
        (lambda path: write(path, mu=MEAN, sigma=COVARIANCE + np.eye(POOL)[::-1] * 2), "has negative variances"),
        (lambda path: write(path, mu=MEAN, sigma=np.triu(np.ones((POOL, POOL)))), "sigma that is not symmetric"),
        (lambda path: damaged(write(path, **GOOD), flag=1), "is not an .npz of statistics"),
        (lambda path: damaged(write(path, **GOOD), method=77), "is not an .npz of statistics"),
        (lambda path: damaged(write(path, **GOOD), spoil=True), "is not an .npz of statistics"),
        (lambda path: with_header(path, "mu", "(1000000000000,)"), "is not an .npz of statistics"),
        (lambda path: with_header(path, "sigma", "(2048, -1)"), "is not an .npz of statistics"),
    ],
)
def test_what_is_no_reference(tmp_path, make, words):
    path = make(tmp_path / "x.npz")
    with pytest.raises(InputError, match=r"^the reference .*x\.npz ") as caught:
        read_reference(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "No such file" in words or str(caught.value).endswith("make statistics with: var eval stats DATA -o FILE")


def test_it_is_written_whole_or_not_at_all(saved, monkeypatch):
    before = saved.read_bytes()

    def full(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(RunError, match=r"ours\.npz cannot be written: No space left"):
        save_reference(saved, MOMENTS, pixels=64, extractor="a" * 64)
    assert saved.read_bytes() == before
    with pytest.raises(RunError, match="there is no folder"):
        save_reference(saved.parent / "absent" / "x.npz", MOMENTS, pixels=64, extractor="a" * 64)


def test_images_and_statistics_are_told_apart(saved, tmp_path):
    pixels = np.stack([image(seed) for seed in range(3)])
    np.savez(tmp_path / "images.npz", pixels)
    np.savez(tmp_path / "adm.npz", pixels, **GOOD)
    np.savez(tmp_path / "half.npz", pixels, mu=MEAN)
    (tmp_path / "bad.npz").write_bytes(b"no zip")
    with zipfile.ZipFile(tmp_path / "x.zip", "w"):
        pass
    held = {name: holds_images(tmp_path / name) for name in ("ours.npz", "images.npz", "adm.npz", "half.npz")}
    assert held == {"ours.npz": False, "images.npz": True, "adm.npz": False, "half.npz": False}
    assert holds_images(tmp_path)
    assert holds_images(tmp_path / "x.zip")
    for name, words in (("bad.npz", "is not an .npz of statistics"), ("absent.npz", "cannot be read: No such file")):
        with pytest.raises(InputError, match=f"{name} {words}"):
            holds_images(tmp_path / name)
    assert len(open_images([tmp_path / "images.npz"])) == 3
