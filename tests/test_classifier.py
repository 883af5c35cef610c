"""Rejection sampling: whose confidence counts, and which images it keeps."""

import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from support.reference_images import reference_images
from varcli.classes import ClassEntry, ClassTable, imagenet
from varcli.errors import CheckpointError, UsageError
from varcli.evaluation import classifier as classifier_module
from varcli.evaluation.classifier import Classifier

TABLE = ClassTable(tuple(imagenet().by_id(i) for i in (1, 207, 951)))
CPU = torch.device("cpu")


class Brightness(nn.Module):
    """Logit n is n times the mean red of an image: a classifier that can be calculated by hand."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("number_N", torch.arange(float(count)))

    def forward(self, image_B3PP: torch.Tensor) -> torch.Tensor:
        return image_B3PP[:, 0].mean((1, 2))[:, None] * self.number_N


def scripted(path, module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), str(path))
    return str(path)


def reds(*values):
    pixels = np.zeros((len(values), 8, 8, 3), np.uint8)
    pixels[..., 0] = np.array(values)[:, None, None]
    return pixels


def test_confidence_is_the_probability_of_the_asked_row(tmp_path):
    classifier = Classifier(scripted(tmp_path / "three.pt", Brightness(3)), TABLE, CPU)
    exponentials = np.exp([0, 0.2, 0.4])
    found = classifier.confidence(reds(51, 51, 0), [0, 2, 1])
    assert found == pytest.approx([1 / exponentials.sum(), exponentials[2] / exponentials.sum(), 1 / 3], rel=1e-6)


def test_a_classifier_of_all_imagenet_is_asked_by_index(tmp_path):
    classifier = Classifier(scripted(tmp_path / "all.pt", Brightness(1000)), TABLE, CPU)
    exponentials = np.exp(np.arange(1000) * 0.2)
    assert classifier.confidence(reds(51), [1]) == pytest.approx(exponentials[207] / exponentials.sum(), rel=1e-4)


def test_efficientnet_is_surer_of_what_an_image_shows():
    images, labels = reference_images(20)
    pixels = ((images.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
    classifier = Classifier("efficientnet-lite0", imagenet(), CPU)
    right = classifier.confidence(pixels, [entry.id for entry in labels])
    wrong = classifier.confidence(pixels, [(entry.id + 500) % 1000 for entry in labels])
    assert np.median(right) > 10 * np.median(wrong)


def test_a_class_imagenet_does_not_know_by_that_index(tmp_path):
    own = ClassTable((ClassEntry(207, "mine", "my cat"), ClassEntry(208, "yours", "your cat")))
    classifier = Classifier(scripted(tmp_path / "all.pt", Brightness(1000)), own, CPU)
    with pytest.raises(CheckpointError, match="knows 1000 classes, but the checkpoint has 2"):
        classifier.confidence(reds(51), [0])


def test_no_such_model():
    with pytest.raises(UsageError, match=r"^--classifier resnet9000 is neither a file nor a name: self, eff"):
        Classifier("resnet9000", TABLE, CPU)


@pytest.mark.parametrize("count", [3, 1000])
def test_weights_of_ones_own_in_safetensors(tmp_path, count):
    """Held to torchvision's own recipe: model, transforms, softmax; nothing in the file is run."""
    from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

    torch.manual_seed(0)
    plain = squeezenet1_1(weights=None, num_classes=count).eval()
    save_file(plain.state_dict(), tmp_path / "mine.safetensors")
    pixels = np.random.RandomState(0).randint(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    seen = SqueezeNet1_1_Weights.DEFAULT.transforms()(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    with torch.inference_mode():
        wanted = plain(seen).softmax(1)[[0, 1], [1, 2] if count == 3 else [207, 951]].numpy()
    notes = []
    classifier = Classifier(f"squeezenet1_1:{tmp_path / 'mine.safetensors'}", TABLE, CPU, notes.append)
    assert classifier.confidence(pixels, [1, 2]) == pytest.approx(wanted, rel=1e-3)
    assert notes == []


@pytest.mark.parametrize(
    ("given", "error", "line"),
    [
        (
            "{}/mine.safetensors",
            UsageError,
            r"must name the torchvision model too, such as resnet50:.*mine\.safetensors",
        ),
        ("resnet18:{}/mine.safetensors", CheckpointError, r"mine\.safetensors are not those of torchvision's resnet18"),
        ("resnet18:{}/absent.safetensors", CheckpointError, r"absent\.safetensors cannot be read: No such file"),
        ("resnet18:{}/text.pth", CheckpointError, r"text\.pth cannot be read: it is no safetensors file"),
        (
            "resnet9000:{}/mine.safetensors",
            UsageError,
            r"resnet9000 is neither .* resnet50:FILE\.safetensors",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path, given, error, line):
    save_file({"fc.bias": torch.zeros(3)}, tmp_path / "mine.safetensors")
    (tmp_path / "text.pth").write_text("hello, world")
    with pytest.raises(error, match=line):
        Classifier(given.format(tmp_path), TABLE, CPU)


@pytest.mark.parametrize("name", ["googlenet", "regnet_x_400mf"])
def test_models_that_ask_for_more(tmp_path, name):
    """One has a normalization of its own, the other cannot be built without memory."""
    from torchvision import models

    weights = models.get_model_weights(name).DEFAULT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that initial weights will be others
        plain = models.get_model(name, weights=None).eval()
    plain.transform_input = name == "googlenet"  # as torchvision sets it for its own weights
    save_file(plain.state_dict(), tmp_path / "mine.safetensors")
    found = Classifier(f"{name}:{tmp_path / 'mine.safetensors'}", TABLE, CPU).confidence(reds(51), [1])
    with torch.inference_mode():
        seen = weights.transforms()(torch.from_numpy(reds(51)).permute(0, 3, 1, 2))
        assert found == pytest.approx(plain(seen).softmax(1)[0, 207].item(), rel=1e-4)


def test_no_torchscript(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointError, match="is not a TorchScript file"):
        Classifier(str(tmp_path / "text.pt"), TABLE, CPU)


class Raising(nn.Module):
    def forward(self, image_B3PP: torch.Tensor) -> torch.Tensor:
        if image_B3PP.size(2) < 100:
            raise ValueError("too small")
        return image_B3PP


class OfTwo(nn.Module):
    def forward(self, image_B3PP: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return image_B3PP + other


class NoNumbers(nn.Module):
    def forward(self, image_B3PP: torch.Tensor) -> torch.Tensor:
        return image_B3PP[:, :, 0, 0] / 0


@pytest.mark.parametrize(
    ("module", "line"),
    [
        (Raising(), "failed on an image: .*too small"),
        (OfTwo(), r"failed on an image: .*forward\(\)"),
        (NoNumbers(), "returns logits that are not finite"),
    ],
)
def test_programs_that_are_no_classifiers(tmp_path, module, line):
    classifier = Classifier(scripted(tmp_path / "x.pt", module), TABLE, CPU)
    with pytest.raises(CheckpointError, match=line) as caught:
        classifier.confidence(reds(1), [0])
    assert "\n" not in str(caught.value)


def test_who_uses_a_program_is_told_that_it_is_one(tmp_path):
    notes = []
    Classifier(scripted(tmp_path / "three.pt", Brightness(3)), TABLE, CPU, notes.append)
    (note,) = notes
    assert "three.pt is a program, which can read and write files here: use one that you trust" in note


def test_no_logits(tmp_path):
    with pytest.raises(CheckpointError, match="must turn images"):
        Classifier(scripted(tmp_path / "same.pt", nn.Identity()), TABLE, CPU).confidence(reds(1), [0])


def test_weights_that_cannot_be_had_say_where_they_go(tmp_path, monkeypatch, capsys):
    from torchvision.models import WeightsEnum

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*_, **__):
        sys.stdout.write("Downloading\n")  # as torch does
        raise OSError("no network")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", offline)
    where = f"{tmp_path}/checkpoints/resnet101-"
    with pytest.raises(CheckpointError, match=f"put https://.*resnet101-.*pth at {where}.*--classifier self"):
        Classifier("resnet101", TABLE, CPU)
    assert capsys.readouterr() == ("", "Downloading\n")


def test_weights_with_another_hash_are_not_used(tmp_path, monkeypatch):
    from torchvision.models import squeezenet1_1

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    state = squeezenet1_1(weights=None).state_dict()
    torch.save(state, tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    with pytest.raises(CheckpointError, match="are damaged; delete the file"):
        Classifier("squeezenet1_1", TABLE, CPU)


def test_torchvisions_models_see_what_they_were_trained_on(tmp_path, monkeypatch):
    """Held to torchvision's own recipe: weights, transforms, softmax."""
    from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

    torch.manual_seed(0)
    plain = squeezenet1_1(weights=None).eval()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(classifier_module, "checkpoint_sha256", lambda path: "b8a52dc0")
    (tmp_path / "checkpoints").mkdir()
    torch.save(plain.state_dict(), tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    pixels = np.random.RandomState(0).randint(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    seen = SqueezeNet1_1_Weights.DEFAULT.transforms()(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    with torch.inference_mode():
        wanted = plain(seen).softmax(1)[[0, 1], [207, 951]].numpy()
    found = Classifier("squeezenet1_1", TABLE, CPU).confidence(pixels, [1, 2])
    assert found == pytest.approx(wanted, rel=1e-3)
