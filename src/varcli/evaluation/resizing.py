"""Pictures of any size to squares of one, as those were that published figures are measured against."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def center_crop(image: Image.Image, pixels: int) -> NDArray[np.uint8]:
    """Return the middle of a picture as uint8 (pixels, pixels, 3), its shorter side brought to `pixels`.

    While the shorter side is twice that or more, the picture is halved by averaging; the rest of the way is
    Pillow's cubic filter, which has no aliasing.

    Source: the preparation of ImageNet in ADM (arXiv 2105.05233), whose reference batches are made so.
    """
    while min(image.size) >= 2 * pixels:
        width, height = image.size
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = pixels / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - pixels) // 2, (height - pixels) // 2
    return np.asarray(image.crop((left, top, left + pixels, top + pixels)))
