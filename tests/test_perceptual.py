"""Perceptual losses: what they are, that they are 0 for equal images, and that the gradient reaches the image."""

import hashlib

import pytest
import torch
from torch import nn

from support.reference_images import reference_images
from varcli.classes import imagenet
from varcli.errors import CheckpointError
from varcli.models import perceptual
from varcli.models.efficientnet import EfficientNetLite0
from varcli.models.perceptual import RESNET50_FILE, ClassifierDistance, ResNet50, moved, perceptual_distance


class Tiny(nn.Module):
    """A network of two maps and five logits that depend on every pixel."""

    def activations(self, image):
        maps = [image * 2 + 1, image[:, :, ::2, ::2] ** 2]
        return maps, torch.stack([image.mean((1, 2, 3)) * i + i for i in range(5)], dim=1)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return torch.rand(2, 2, 3, 16, 16) * 2 - 1


def test_distance_is_the_mean_over_depths_and_logits(pair, monkeypatch):
    monkeypatch.setattr(perceptual, "SHIFT", 0)
    made, image = pair
    (a0, a1), a = Tiny().activations(made)
    (b0, b1), b = Tiny().activations(image)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    terms = [2 - 2 * torch.cosine_similarity(one, other, dim=1).mean() for one, other in ((a0, b0), (a1, b1), (a, b))]
    assert ClassifierDistance(Tiny())(made, image).item() == pytest.approx(sum(terms).item() / 3, rel=1e-5)


def test_equal_images_have_no_distance_and_others_a_gradient(pair):
    distance = ClassifierDistance(Tiny())
    made, image = pair[0].requires_grad_(), pair[1]
    assert distance(made.detach(), made.detach()).item() == 0
    distance(made, image).backward()
    assert made.grad.abs().amax((1, 2, 3)).min() > 0


def test_both_images_move_alike(pair):
    made, image = moved(*pair)
    assert made.shape == pair[0].shape
    offset = moved(*torch.stack([pair[0], pair[0]]))
    assert torch.equal(*offset)
    assert not torch.equal(made, image)


def test_efficientnet_knows_real_images():
    images, labels = reference_images(60)
    logits = EfficientNetLite0()(images)
    known = torch.tensor(sorted({entry.id for entry in labels}))
    right = known[logits[:, known].argmax(1)] == torch.tensor([entry.id for entry in labels])
    assert right.float().mean() > 0.4
    assert logits.shape[1] == len(imagenet())


def test_efficientnet_brings_images_closer_to_what_they_show(pair):
    """Gradient descent on the pixels lowers the distance."""
    images, _ = reference_images(2)
    distance = perceptual_distance("efficientnet-lite0", None)
    made = images.flip(0).clone().requires_grad_()
    torch.manual_seed(0)
    before = distance(made, images)
    (gradient,) = torch.autograd.grad(before, made)
    torch.manual_seed(0)
    assert distance(made - 0.5 * gradient / gradient.norm(), images) < before


def test_resnet50_is_torchvisions(tmp_path, monkeypatch):
    from torchvision.models import resnet50
    from torchvision.transforms.functional import normalize

    torch.manual_seed(0)
    theirs = resnet50(weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights")
    digits = hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()[:8]
    name = f"resnet50-{digits}.pth"
    (tmp_path / "weights").rename(tmp_path / name)
    monkeypatch.setattr(perceptual, "RESNET50_FILE", name)
    images = torch.rand(2, 3, 32, 32)
    maps, logits = ResNet50(tmp_path).activations(2 * images - 1)
    wanted = theirs(normalize(images, perceptual.MEAN, perceptual.DEVIATION))
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    assert [m.shape[1] for m in maps] == [256, 512, 1024, 2048]
    (tmp_path / name).write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="are damaged: download them again"):
        ResNet50(tmp_path)


@pytest.mark.parametrize("name", ["lpips", "resnet50"])
def test_missing_weights_say_where_they_are_published(name, tmp_path):
    with pytest.raises(CheckpointError, match=r"are missing: put https://download\.pytorch\.org/"):
        perceptual_distance(name, tmp_path)
    assert RESNET50_FILE.endswith(".pth")
