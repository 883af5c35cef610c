"""Images with their provenance, for Python users."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varcli.errors import UsageError
from varcli.files import write_atomically
from varcli.images.provenance import Provenance, Raster, png_bytes

if TYPE_CHECKING:
    import PIL.Image

    from varcli.images.png16 import Levels


@dataclass(frozen=True, slots=True, repr=False)
class Image:
    """An image that was sampled, edited or reconstructed."""

    array: "Levels"
    """(height, width, channels): uint8 RGB; an edit keeps the channels and bits of the image it started from."""
    provenance: Provenance
    """All that determines it."""
    info: dict[str, Any] = field(default_factory=dict)
    """Metadata of the image that an edit started from: resolution, colour profile, EXIF."""

    def __repr__(self) -> str:
        """The class, the seed and the size, without the pixels."""
        height, width = self.array.shape[:2]
        return f"<varcli.Image: {self.class_name}, seed {self.seed}, {width} × {height}>"

    @property
    def label(self) -> int | None:
        """The class, as an ImageNet index where the model has ImageNet's classes; None for an unconditional image."""
        return self.provenance.class_id

    @property
    def class_name(self) -> str:
        """Name of the class; "none" for an unconditional image."""
        return self.provenance.class_name

    @property
    def seed(self) -> int:
        """Seed of this image alone."""
        return self.provenance.seed

    @property
    def pil(self) -> "PIL.Image.Image":
        """The image as Pillow's, in 8 bits."""
        import PIL.Image

        from varcli.images.png16 import to_8_bits

        levels = to_8_bits(self.array)
        return PIL.Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)

    @property
    def raster(self) -> Raster:
        """The image as it goes into a file."""
        return Raster(self.array, self.info)

    def png(self) -> bytes:
        """The content of a PNG file, its provenance inside."""
        return png_bytes(self.raster, self.provenance)

    def save(self, path: str | Path) -> Path:
        """Write a PNG, whole or not at all, and return its path.

        Raises:
            UsageError: the name does not end in .png.
            RunError: the file cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise UsageError(f"images are saved as .png, which is lossless and holds their provenance (got {path})")
        write_atomically(path, self.png())
        return path
