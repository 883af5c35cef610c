"""Real images: some of the reference set of tiny64."""

import io
import zipfile

import numpy as np
import torch
from PIL import Image

from varcli.classes import ClassEntry, imagenet
from varcli.evaluation.references import references


def reference_images(count: int) -> tuple[torch.Tensor, list[ClassEntry]]:
    """Images in [-1, 1], (count, 3, 64, 64), spread over the classes, and their classes."""
    with zipfile.ZipFile(references()["tiny64"].path) as stored:
        names = sorted(stored.namelist())
        names = names[:: len(names) // count][:count]
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(stored.read(name))).convert("RGB")) for name in names])
    by_wnid = {entry.wnid: entry for entry in imagenet().entries}
    labels = [by_wnid[name.split("/")[0]] for name in names]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, labels
