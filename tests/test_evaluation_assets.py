"""What measuring takes is known by name, leads to files, and the shipped reference is what it says."""

import re
import time

import pytest

from support import loopback_hub as fake_hub
from varcli.checkpoints.registry import registry
from varcli.errors import CheckpointError, InputError
from varcli.evaluation import references as module
from varcli.evaluation.references import Asset, find_reference, find_weights, references, weights
from varcli.files import file_sha256


def test_references_are_whole():
    assert list(references()) == ["tiny64", "imagenet-256", "imagenet-512"]
    assert [reference.pixels for reference in references().values()] == [64, 256, 512]
    for material in (*references().values(), weights("inception-v3-compat"), weights("dinov2")):
        assert bool(material.bundled) != bool(material.address)
        assert material.sha256 is None or re.fullmatch("[0-9a-f]{64}", material.sha256)
    assert all(reference.note for reference in references().values())


def test_every_checkpoint_has_a_reference_of_its_size():
    for entry in registry().values():
        assert references()[entry.reference].pixels == entry.pixels


def test_weights_are_named_after_their_hash():
    asset = weights("inception-v3-compat")
    (digits,) = re.findall(r"-([0-9a-f]{8})\.pth$", asset.address)
    assert asset.sha256.startswith(digits)
    assert asset.path.name == "weights-inception-2015-12-05-6726825d.pth"


def test_shipped_reference_is_as_registered():
    from varcli.images.dataset import open_images

    path = find_reference("tiny64")
    assert file_sha256(path) == references()["tiny64"].sha256
    images = open_images([path])
    assert (len(images), images.side, images.jpegs) == (2000, 64, 2000)
    assert images.class_counts() == [10] * 200
    assert all(entry.id < 1000 and entry.wnid.startswith("n") for entry in images.classes.entries)
    ((_, pixels, _),) = images.batches([0, 1999], 2)
    assert pixels.shape == (2, 64, 64, 3)


def test_shipped_reference_is_what_training_held_out():
    from varcli.images.dataset import open_images

    images = open_images([find_reference("tiny64")])
    names = [images.name(i) for i in range(len(images))]
    found = [re.fullmatch(r"tiny64_reference\.zip/(n\d{8})/\1_(\d+)\.JPEG", name).groups() for name in names]
    wnids = {wnid for wnid, _ in found}
    assert len(wnids) == 200
    assert set(found) == {(wnid, str(number)) for wnid in wnids for number in range(365, 375)}


def test_a_path_is_a_reference_too(tmp_path):
    assert find_reference(str(tmp_path)) == tmp_path


def test_neither_name_nor_path():
    with pytest.raises(InputError, match=r"neither a file nor one of the names tiny64, imagenet-256"):
        find_reference("imagenet")


def test_given_weights_are_taken(tmp_path):
    (tmp_path / "weights.pth").touch()
    assert find_weights("inception-v3-compat", tmp_path / "weights.pth") == tmp_path / "weights.pth"
    with pytest.raises(
        CheckpointError, match=r"no weights file .*absent\.pth; https://github\.com/toshas/torch-fidelity"
    ):
        find_weights("inception-v3-compat", tmp_path / "absent.pth")


def test_first_use_downloads(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path)
    with fake_hub.running() as server:
        server.files = {"a.npz": b"statistics", "w.pth": b"weights"}
        known = {"a": Asset(name="a", address=f"{server.url}/FoundationVision/var/resolve/main/a.npz")}
        monkeypatch.setattr(module, "references", lambda: known)
        asset = Asset(name="inception", address=f"{server.url}/FoundationVision/var/resolve/main/w.pth")
        monkeypatch.setattr(module, "weights", lambda extractor: asset)
        assert find_reference("a").read_bytes() == b"statistics"
        assert find_weights("dinov2").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("find", "option"), [(find_weights, "--inception FILE or VAR_INCEPTION"), (find_reference, "--reference FILE")]
)
def test_offline_says_what_to_do(tmp_path, monkeypatch, find, option):
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path)
    nowhere = Asset(name="x", address="http://127.0.0.1:9/x.pth", bytes=5, option=option)
    monkeypatch.setattr(module, "weights", lambda extractor: nowhere)
    monkeypatch.setattr(module, "references", lambda: {"x": nowhere})
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(CheckpointError, match=r"cannot download x\.pth from http://127\.0\.0\.1:9/x\.pth") as caught:
        find("x")
    assert option in str(caught.value)
    assert f"put it at {tmp_path / 'x.pth'}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_installation_without_the_shipped_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "checkpoints" / "materials.py"))
    with pytest.raises(CheckpointError, match=r"tiny64_reference\.zip is missing from this installation"):
        find_reference("tiny64")
