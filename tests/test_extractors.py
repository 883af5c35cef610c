import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from support import extractors as random_inception
from varcli.errors import CheckpointError
from varcli.evaluation.extractors import DinoV2, Inception, resized

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


@pytest.mark.slow
def test_features_are_torch_fidelitys_to_rounding(network, theirs):
    pixels = random_inception.images(3)
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    found = network.features(pixels)
    assert relative_error(found.pool_BN, expected[0]) < 2e-6
    assert relative_error(found.logits_BV, expected[1]) < 2e-5  # differences of much larger terms


@pytest.mark.slow
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


@pytest.mark.slow
def test_features_do_not_depend_on_the_batch(network):
    pixels = random_inception.images(10)
    together = network.features(pixels).pool_BN
    assert torch.equal(network.features(pixels[9:]).pool_BN[0], together[9])
    assert not torch.equal(together[8], together[9])


@pytest.mark.slow
def test_a_view_of_images_will_do(network):
    pixels = random_inception.images(2)
    flipped = network.features(pixels[:, :, ::-1]).pool_BN
    assert torch.equal(flipped, network.features(np.ascontiguousarray(pixels[:, :, ::-1])).pool_BN)


@pytest.mark.slow
def test_weights_are_known_by_their_hash(weights, network):
    assert network.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()


# --- files that are not its weights ----------------------------------------------------------------


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_code_in_the_file_is_run(tmp_path):
    torch.save({"fc.weight": Code(tmp_path / "ran")}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"weights\.pth are not the state dict of torch-fidelity's inception"):
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
    with pytest.raises(CheckpointError, match="are not the state dict"):
        Inception(path, CPU)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.pth cannot be read: No such file"):
        Inception(tmp_path / "absent.pth", CPU)


@pytest.mark.slow
def test_counters_of_batches_may_be_missing(weights, network, tmp_path):
    tensors = torch.load(weights, weights_only=True)
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    torch.save(plain, tmp_path / "plain.pth")
    pixels = random_inception.images(1)
    assert torch.equal(
        Inception(tmp_path / "plain.pth", CPU).features(pixels).pool_BN, network.features(pixels).pool_BN
    )


# --- DINOv2 ----------------------------------------------------------------------------------------

WIDTH, DEPTH = 128, 2


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A state dict of DINOv2's layout, much smaller: position embeddings of 37 × 37 patches, as the real one's."""
    noise = torch.Generator().manual_seed(0)

    def weight(*shape, scale=0.05):
        return torch.randn(*shape, generator=noise) * scale

    tensors = {"cls_token": weight(1, 1, WIDTH), "mask_token": weight(1, WIDTH), "pos_embed": weight(1, 1370, WIDTH)}
    tensors |= {"patch_embed.proj.weight": weight(WIDTH, 3, 14, 14), "patch_embed.proj.bias": weight(WIDTH)}
    for i in range(DEPTH):
        for name, shape in {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}.items():
            tensors |= {f"blocks.{i}.{name}.weight": weight(*shape), f"blocks.{i}.{name}.bias": weight(shape[0])}
        for name, shape in {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}.items():
            tensors |= {f"blocks.{i}.{name}.weight": weight(*shape), f"blocks.{i}.{name}.bias": weight(shape[0])}
        for name in ("norm1", "norm2"):
            tensors |= {f"blocks.{i}.{name}.weight": 1 + weight(WIDTH), f"blocks.{i}.{name}.bias": weight(WIDTH)}
        tensors |= {f"blocks.{i}.ls1.gamma": weight(WIDTH, scale=1), f"blocks.{i}.ls2.gamma": weight(WIDTH, scale=1)}
    tensors |= {"norm.weight": 1 + weight(WIDTH), "norm.bias": weight(WIDTH)}
    path = tmp_path_factory.mktemp("dinov2") / "dinov2_pretrain.pth"
    torch.save(tensors, path)
    return path, tensors


def class_token(pixels_HW3, tensors):
    """DINOv2's class token of one image, written out: an independent reading of the paper's network."""
    image = Image.fromarray(pixels_HW3).resize((224, 224), Image.Resampling.BICUBIC)
    x_3PP = torch.from_numpy(np.asarray(image) / 255.0).float().permute(2, 0, 1)
    x_3PP = (x_3PP - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    patches = x_3PP.unfold(1, 14, 14).unfold(2, 14, 14).permute(1, 2, 0, 3, 4).reshape(256, -1)
    x = patches @ tensors["patch_embed.proj.weight"].flatten(1).T + tensors["patch_embed.proj.bias"]
    grid = tensors["pos_embed"][0, 1:].T.reshape(1, WIDTH, 37, 37)
    position = torch.nn.functional.interpolate(grid, scale_factor=16.1 / 37, mode="bicubic")
    assert position.shape[2:] == (16, 16)
    x = torch.cat([tensors["cls_token"][0] + tensors["pos_embed"][0, :1], x + position[0].flatten(1).T])
    for i in range(DEPTH):
        block = {name.removeprefix(f"blocks.{i}."): t for name, t in tensors.items() if name.startswith(f"blocks.{i}.")}
        h = layer_norm(x, block["norm1.weight"], block["norm1.bias"])
        q, k, v = (h @ block["attn.qkv.weight"].T + block["attn.qkv.bias"]).chunk(3, dim=1)
        heads = [
            (a @ b.T / 8).softmax(1) @ c for a, b, c in zip(q.split(64, 1), k.split(64, 1), v.split(64, 1), strict=True)
        ]
        x = x + block["ls1.gamma"] * (torch.cat(heads, 1) @ block["attn.proj.weight"].T + block["attn.proj.bias"])
        h = layer_norm(x, block["norm2.weight"], block["norm2.bias"]) @ block["mlp.fc1.weight"].T
        h = torch.nn.functional.gelu(h + block["mlp.fc1.bias"])
        x = x + block["ls2.gamma"] * (h @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"])
    return layer_norm(x, tensors["norm.weight"], tensors["norm.bias"])[0]


def layer_norm(x, weight, bias):
    return (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-6).sqrt() * weight + bias


def test_dinov2_sees_what_its_network_says(dinov2):
    pytest.importorskip("timm")
    path, tensors = dinov2
    extractor = DinoV2(path, CPU)
    pixels = random_inception.images(5, side=40)
    found = extractor.features(pixels)
    expected = torch.stack([class_token(image, tensors) for image in pixels])
    assert extractor.shape.pool == WIDTH and found.logits_BV is None
    assert relative_error(found.pool_BN, expected) < 1e-5


@pytest.mark.slow
def test_dinov2_refuses_other_weights(weights, tmp_path):
    pytest.importorskip("timm")
    with pytest.raises(CheckpointError, match="are not the state dict of DINOv2"):
        DinoV2(weights, CPU)
