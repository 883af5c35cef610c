import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from support import extractors as random_inception
from varcli.errors import CheckpointError
from varcli.evaluation.extractors import Inception, resized

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return random_inception.save(tmp_path_factory.mktemp("inception") / "weights.pth")


@pytest.fixture(scope="module")
def network(weights):
    return Inception(weights, CPU)


def relative_error(found, expected):
    return (torch.linalg.norm(found - expected) / torch.linalg.norm(expected)).item()


@pytest.fixture(scope="module")
def theirs(weights):
    asked = ["2048", "logits_unbiased"]
    return FeatureExtractorInceptionV3("inception-v3-compat", asked, feature_extractor_weights_path=str(weights))


def test_features_are_torch_fidelitys_to_rounding(network, theirs):
    pixels = random_inception.images(3)
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    found = network.features(pixels)
    assert relative_error(found.pool_BN, expected[0]) < 2e-6
    assert relative_error(found.logits_BV, expected[1]) < 2e-5  # differences of much larger terms


def test_without_onednn_features_are_the_same_to_rounding(weights, network, monkeypatch):
    pixels = random_inception.images(2)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert relative_error(Inception(weights, CPU).features(pixels).pool_BN, network.features(pixels).pool_BN) < 2e-6


@pytest.mark.parametrize("size", [(24, 24), (256, 256), (299, 299), (512, 512), (30, 301)])
def test_resizing_is_torch_fidelitys_to_the_last_bit(size):
    pixels = torch.randint(0, 256, (2, *size, 3), generator=torch.Generator().manual_seed(0)).float()
    expected = interpolate_bilinear_2d_like_tensorflow1x(
        pixels.permute(0, 3, 1, 2), size=(299, 299), align_corners=False
    )
    assert torch.equal(resized(pixels).permute(0, 3, 1, 2), expected)


def test_features_do_not_depend_on_the_batch(network):
    pixels = random_inception.images(10)
    together = network.features(pixels).pool_BN
    assert torch.equal(network.features(pixels[9:]).pool_BN[0], together[9])
    assert not torch.equal(together[8], together[9])


def test_a_view_of_images_will_do(network):
    pixels = random_inception.images(2)
    flipped = network.features(pixels[:, :, ::-1]).pool_BN
    assert torch.equal(flipped, network.features(np.ascontiguousarray(pixels[:, :, ::-1])).pool_BN)


def test_weights_are_known_by_their_hash(weights, network):
    assert network.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()


# --- files that are not its weights ----------------------------------------------------------------


class Code:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return Path.touch, (self.place,)


def test_no_code_in_the_file_is_run(tmp_path):
    torch.save({"fc.weight": Code(tmp_path / "ran")}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"weights\.pth; not the state dict of torch-fidelity's inception"):
        Inception(tmp_path / "weights.pth", CPU)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [b"", b"no weights", {}, [1, 2], {"fc.weight": torch.zeros(2)}, {"fc.weight": "text"}]
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match="not the state dict"):
        Inception(path, CPU)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.pth; cannot be read: No such file"):
        Inception(tmp_path / "absent.pth", CPU)


def test_counters_of_batches_may_be_missing(weights, network, tmp_path):
    tensors = torch.load(weights, weights_only=True)
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    torch.save(plain, tmp_path / "plain.pth")
    pixels = random_inception.images(1)
    assert torch.equal(
        Inception(tmp_path / "plain.pth", CPU).features(pixels).pool_BN, network.features(pixels).pool_BN
    )
