"""Contact sheets of many images, and images that grow scale by scale.

Small images are enlarged, each pixel to a block, so that nothing is smoothed away.
"""

from collections.abc import Sequence
from io import BytesIO
from math import ceil, isqrt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from varcli.files import write_atomically
from varcli.images.provenance import Provenance, png_bytes

if TYPE_CHECKING:
    from varcli.images.provenance import Pixels

    _Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


MAX_IMAGES = 1024
"""Most images of a contact sheet; more would be too small to look at."""

_SMALLEST, _LARGEST = 192, 256
_PAPER, _INK = (255, 255, 255), (60, 60, 60)


def contact_sheet(images: Sequence["Pixels"], labels: Sequence[str], columns: int | None = None) -> "Pixels":
    """Return the images in rows on white paper, each with its label below.

    Args:
        images: of one size or several; smaller ones are centred in their places.
        labels: one per image; long ones take two lines, longer ones are cut.
        columns: how many in a row; None fills the rows well and makes the sheet at most twice as wide as high.
    """
    shown = [_shown(pixels) for pixels in images]
    columns = columns or _columns(len(shown))
    width, height = max(image.width for image in shown), max(image.height for image in shown)
    size = max(14, width // 15)
    font = ImageFont.load_default(size)
    captions = [_wrapped(label, width, font) for label in labels]
    line = ceil(size * 1.25)
    gap = max(8, width // 16)
    caption_height = max(len(lines) for lines in captions) * line + (gap // 2 if any(captions) else 0)
    across, down = width + gap, height + caption_height + gap
    sheet = Image.new("RGB", (columns * across + gap, ceil(len(shown) / columns) * down + gap), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(shown, captions, strict=True)):
        left, top = gap + i % columns * across, gap + i // columns * down
        sheet.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
        for number, text in enumerate(lines):
            middle = (left + width / 2, top + height + gap // 3 + number * line)
            draw.text(middle, text, fill=_INK, font=font, anchor="ma")
    return np.asarray(sheet)


def _shown(pixels: "Pixels") -> Image.Image:
    """Return an image in the size it has on a sheet."""
    image = Image.fromarray(pixels)
    times = ceil(_SMALLEST / max(image.size))
    if times > 1:
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    if max(image.size) > _LARGEST:
        image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    return image


def _columns(count: int) -> int:
    """Return the number of columns that leaves the fewest cells empty, for a shape between 1:1 and 2:1."""
    candidates = range(isqrt(count - 1) + 1, isqrt(2 * count - 1) + 2)
    return min(candidates, key=lambda columns: (-count % columns, columns))


def _wrapped(label: str, width: int, font: "_Font") -> list[str]:
    """Return a label in at most two lines that are no wider than `width` pixels."""
    first, rest = "", label.replace("×", "x").split()  # the font Pillow brings has no ×
    while rest and (not first or font.getlength(f"{first} {rest[0]}") <= width):
        first = f"{first} {rest.pop(0)}".strip()
    lines = [first, " ".join(rest)] if rest else [first] if first else []
    return [_cut(text, width, font) for text in lines]


def _cut(text: str, width: int, font: "_Font") -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def save_growth(
    path: Path, frames: Sequence["Pixels"], labels: Sequence[str], provenance: Provenance | None = None
) -> None:
    """Write an image growing scale by scale: side by side as PNG, or one after another as GIF.

    Args:
        path: its ending decides, .gif or another.
        frames: the image after each scale, the finished one last.
        labels: what stands below each frame of a strip, such as "4 × 4".
        provenance: of the finished image, which a strip carries too.

    Raises:
        RunError: it cannot be written.
    """
    if path.suffix.lower() == ".gif":
        content = _animation(frames)
    else:
        content = png_bytes(contact_sheet(frames, labels, columns=len(frames)), provenance)
    write_atomically(path, content)


def _animation(frames: Sequence["Pixels"]) -> bytes:
    """Return the frames as a GIF that runs for ever, resting on the last."""
    first, *others = [_shown(pixels).quantize(256) for pixels in frames]
    content = BytesIO()
    pauses = [_PAUSE] * len(others) + [_REST]
    first.save(content, "GIF", save_all=True, append_images=others, duration=pauses, loop=0)
    return content.getvalue()


_PAUSE, _REST = 300, 2500
"""Milliseconds between scales, and at the end."""
