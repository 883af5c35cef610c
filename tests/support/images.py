"""Small made-up data sets for tests: images whose class shows in their colours."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_folder(folder: Path, classes: dict[str, int], side: int = 20) -> Path:
    """Write `classes[name]` images of noise around a colour for each class name."""
    for number, (name, count) in enumerate(sorted(classes.items())):
        class_folder = folder / name
        class_folder.mkdir(parents=True)
        noise = np.random.RandomState(number)
        for i in range(count):
            colour = 40 + 170 * np.array([number % 2, number // 2 % 2, i % 2])
            pixels = colour + noise.randint(-40, 40, (side, side + i % 3, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(class_folder / f"{name}_{i}.png")
    return folder
