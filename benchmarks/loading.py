"""Images per second that one core loads and decodes for training, from a folder, .zip, .tar and .npz.

    python benchmarks/loading.py [--count 128] [--rounds 3] [--json]

The images are smooth noise, generated on the fly: JPEGs of quality 90, which are smaller than photographs and decode
somewhat faster, and plain pixels in the .npz. All are interleaved round by round. CPU time is measured, so that other
processes on the machine do not count; `--workers N` of `var train` reads on N cores.
"""

import argparse
import statistics
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from tables import print_rows

from varcli.images.dataset import ImageSet, open_images
from varcli.training.data import Crops

SIZES = {"64 × 64, to 64": (64, 64, 64), "256 × 256, to 256": (256, 256, 256), "500 × 375, to 256": (500, 375, 256)}
"""Width and height of the stored images, and pixels of the crops; ImageNet's are about as large as the last."""
ENLARGE = 1.125
"""Default of `--resize-ratio`."""


def make_sources(folder: Path, size: tuple[int, int], count: int) -> dict[str, Path]:
    """Write the same images in every format; return their paths."""
    random = np.random.default_rng(0)
    coarse = [Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8)) for _ in range(count)]
    images = [image.resize(size, Image.Resampling.BICUBIC) for image in coarse]
    for number, image in enumerate(images):
        path = folder / "images" / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)
    files = sorted((folder / "images").glob("*/*"))
    with zipfile.ZipFile(folder / "images.zip", "w") as stored, tarfile.open(folder / "images.tar", "w") as tar:
        for path in files:
            stored.write(path, path.relative_to(folder / "images"))
            tar.add(path, path.relative_to(folder / "images"))
    np.savez(folder / "images.npz", np.stack([np.asarray(image) for image in images]), np.arange(count) % 2)
    return {kind: folder / f"images{kind}" for kind in ("", ".zip", ".tar", ".npz")}


def reader(images: ImageSet, pixels: int) -> Callable[[], None]:
    """Return what reads all images once."""
    crops = Crops(images, pixels, ENLARGE, seed=0)

    def read() -> None:
        for number in range(len(images)):
            crops[number, 0]

    return read


def measure(count: int, rounds: int) -> list[dict[str, object]]:
    """Return one row per image size: median images per second of one core, from each kind of source."""
    rows = []
    for name, (width, height, pixels) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            sources = make_sources(Path(folder), (width, height), count)
            readers = {
                kind: reader(open_images([path], require_labels=True, read_headers=False), pixels)
                for kind, path in sources.items()
            }
            taken: dict[str, list[float]] = {kind: [] for kind in readers}
            for turn in range(rounds + 1):
                for kind, read in readers.items():
                    start = time.process_time()
                    read()
                    if turn > 0:  # the first round fills the disk cache
                        taken[kind].append(time.process_time() - start)
        rates = {kind or "folder": round(count / statistics.median(seconds)) for kind, seconds in taken.items()}
        rows.append({"pixels": name} | rates)
    return rows


def main() -> None:
    """Measure and print a Markdown table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=128, help="images of each size")
    parser.add_argument("--rounds", type=int, default=3, help="how often each source is read")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    given = parser.parse_args()
    print_rows(measure(given.count, given.rounds), as_json=given.json)


if __name__ == "__main__":
    main()
