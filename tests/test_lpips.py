"""Our LPIPS is torch-fidelity's, and lets the gradient through."""

import hashlib

import pytest
import torch
from torch import nn

from varcli.errors import CheckpointError
from varcli.models import perceptual
from varcli.models.perceptual import LINEAR_FILE, VGG_FILE, load_lpips

WIDTHS = (64, 128, 256, 512, 512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both files, with random weights under the published names."""
    from torchvision.models import vgg16

    torch.manual_seed(0)
    weights = tmp_path_factory.mktemp("weights")
    with torch.device("meta"):
        names = vgg16(weights=None, init_weights=False).features.state_dict()
    vgg = {f"features.{name}": 0.05 * torch.randn(tensor.shape) for name, tensor in names.items()}
    torch.save(vgg, weights / VGG_FILE)
    linear = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(WIDTHS)}
    torch.save(linear, weights / LINEAR_FILE)
    return weights


@pytest.fixture
def distance(folder, monkeypatch):
    digits = hashlib.sha256((folder / VGG_FILE).read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(perceptual, "VGG_SHA256", digits)
    return load_lpips(folder)


def reference(folder):
    """torch-fidelity's own class, given the same weights instead of downloading them."""
    from torch_fidelity.sample_similarity_lpips import SampleSimilarityLPIPS, VGG16features
    from torchvision.models import vgg16

    theirs = SampleSimilarityLPIPS.__new__(SampleSimilarityLPIPS)
    nn.Module.__init__(theirs)
    features = VGG16features.__new__(VGG16features)
    nn.Module.__init__(features)
    with torch.device("meta"):
        layers = vgg16(weights=None, init_weights=False).features
    vgg = torch.load(folder / VGG_FILE, weights_only=True)
    layers.load_state_dict({name.removeprefix("features."): t for name, t in vgg.items()}, assign=True)
    for i, (first, last) in enumerate(perceptual.STAGES):
        setattr(features, f"slice{i + 1}", layers[first:last])
    return theirs, features


def test_distance_is_torch_fidelitys(folder, distance):
    theirs, features = reference(folder)
    linear = torch.load(folder / LINEAR_FILE, weights_only=True)
    torch.manual_seed(1)
    images = torch.randint(256, (2, 3, 3, 32, 32), dtype=torch.uint8)
    expected = torch.zeros(3)
    with torch.no_grad():
        compared = [features(theirs.normalize(image)) for image in images]
        for i, (ours, other) in enumerate(zip(*compared, strict=True)):
            unit = [x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (ours, other)]
            expected += (linear[f"lin{i}.model.1.weight"] * (unit[0] - unit[1]).square()).sum(1).mean((1, 2))
        found = distance(*(image / 127.5 - 1 for image in images))
    assert float(found) == pytest.approx(float(expected.mean()), rel=1e-4)


def test_equal_images_have_no_distance_and_others_a_gradient(distance):
    torch.manual_seed(2)
    image, made = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    assert float(distance(image, image)) == 0
    made.requires_grad_(True)
    distance(made, image).backward()
    assert float(made.grad.abs().sum()) > 0


def test_damaged_and_missing_weights_are_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="are damaged"):
        load_lpips(folder)
    with pytest.raises(CheckpointError, match=r"are missing: put https://"):
        load_lpips(tmp_path)
    monkeypatch.setattr(perceptual, "VGG_SHA256", hashlib.sha256(b"not a file of torch").hexdigest()[:8])
    (tmp_path / VGG_FILE).write_bytes(b"not a file of torch")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_lpips(tmp_path)
