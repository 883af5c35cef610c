"""InceptionV3 with random weights, in a file as torch-fidelity's are, and images whose features differ."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch_fidelity import FeatureExtractorInceptionV3


class Unloaded(FeatureExtractorInceptionV3):
    """The network as it is before it loads weights."""

    def load_state_dict(self, state_dict):
        """Load nothing."""


def save(path):
    """Write random weights with which images differ in features and classes; return the path.

    They keep the size of what passes through them. Normalized to some images' figures, as a trained network
    is, a random one would amplify rounding a hundredfold.
    """
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    network = Unloaded("inception-v3-compat", ["2048"], feature_extractor_weights_path=empty)
    noise = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=noise)
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.7, 1.3, generator=noise)
            module.bias.normal_(0, 0.1, generator=noise)
            module.running_mean.normal_(0, 0.1, generator=noise)
            module.running_var.uniform_(0.7, 1.3, generator=noise)
    network.fc.weight.normal_(0, 0.5, generator=noise)
    network.fc.bias.normal_(0, 1, generator=noise)
    (pool_BN,) = network(torch.from_numpy(images(4, seed=7)).permute(0, 3, 1, 2))
    usual_N = pool_BN.mean(0)  # classes are to depend on what is not common to all images
    network.fc.weight -= torch.outer(network.fc.weight @ usual_N, usual_N) / usual_N.square().sum()
    torch.save(network.state_dict(), path)
    return path


def images(count, seed=0, side=24):
    """Return images of blotches of all sizes, uint8 (count, side, side, 3)."""
    noise = np.random.RandomState(seed)
    made = np.zeros((count, side, side, 3))
    for cells in (1, 2, 3, 6, 12, side):
        cell = -(-side // cells)
        blotches = noise.randint(-70, 70, (count, cells, cells, 3)) * noise.uniform(0, 1, (count, 1, 1, 1))
        made += blotches.repeat(cell, 1).repeat(cell, 2)[:, :side, :side]
    return (made + 128).clip(0, 255).astype(np.uint8)


def write(folder, pixels):
    """Write images as PNGs whose names sort in their order; return the folder."""
    Path(folder).mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(Path(folder) / f"{i:04}.png")
    return folder
