"""What pictures are measured against: mean and covariance of features, in a file or of pictures at hand."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from varcli.data.images import cannot_write
from varcli.errors import InputError
from varcli.evaluation.arrays import PIXELS, square_side
from varcli.evaluation.pictures import PictureList, open_pictures
from varcli.evaluation.statistics import POOL, Moments
from varcli.files import file_sha256, replacing


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """One side of every comparison."""

    name: str
    """As users know it."""
    sha256: str
    """Of its file, or what else tells it from others of that name."""
    mean: NDArray[np.float64]
    """Of the features, (N,)."""
    covariance: NDArray[np.float64]
    """Of the features, (N, N)."""
    count: int | None = None
    """Pictures it is made of, None where it does not say."""
    pixels: int | None = None
    """Their side, likewise."""
    extractor: str | None = None
    """sha256 of the weights its features were computed with, likewise."""
    pool: NDArray[np.float32] | None = None
    """Features of its pictures (P, N), for KID, precision and recall; None where they were not kept."""
    path: Path | None = None
    """Its file, where pictures are in it too: ADM's batches have statistics of all and pictures of some."""

    def pictures(self) -> PictureList | None:
        """Return the pictures in its file, None where it has none."""
        return open_pictures([self.path]) if self.path else None

    def check_extractor(self, sha256: str) -> None:
        """Find out whether features of a network with these weights may be compared with it.

        Raises:
            InputError: it was made with other weights.
        """
        if self.extractor not in (None, sha256):
            raise InputError(
                f"reference: {self.name} was made with Inception weights {str(self.extractor)[:12]}, these are "
                f"{sha256[:12]}; {_ADVICE}"
            )


_ADVICE = "make statistics with: var eval stats DATA -o FILE"


def holds_pictures(path: Path) -> bool:
    """Return whether a path leads to pictures, which `open_pictures` takes, and not to statistics."""
    if path.suffix.lower() != ".npz":
        return path.is_dir() or path.suffix.lower() in (".zip", ".tar")
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as stored:
        names = set(stored.namelist())
    return PIXELS in names and not names & {"mu.npy", "sigma.npy"}


def read_reference(path: Path, name: str | None = None) -> Reference:
    """Return statistics that `save_reference` wrote, or that of any .npz with `mu` and `sigma`, as ADM's have.

    Raises:
        InputError: the file cannot be read, lacks either, or has what are no statistics of Inception's features.
    """
    with _reading(path), np.load(path, allow_pickle=False) as stored:
        if missing := [key for key in ("mu", "sigma") if key not in stored.files]:
            raise _unusable(path, f"has no {' and no '.join(missing)}")
        found: dict[str, Any] = {key: stored[key] for key in _KEYS if key in stored.files}
        return Reference(
            name=name or path.name,
            sha256=file_sha256(path),
            mean=_numbers(path, "mu", found["mu"], (POOL,)),
            covariance=_numbers(path, "sigma", found["sigma"], (POOL, POOL)),
            count=int(found["n"]) if "n" in found else None,
            pixels=int(found["pixels"]) if "pixels" in found else square_side(path),
            extractor=str(found["extractor"]) if "extractor" in found else None,
            pool=_numbers(path, "pool", found["pool"], (len(found["pool"]), POOL)) if "pool" in found else None,
            path=path if "arr_0" in stored.files else None,
        )


_KEYS = ("mu", "sigma", "n", "pixels", "extractor", "pool")


def save_reference(
    path: Path, moments: Moments, *, pixels: int, extractor: str, pool: NDArray[np.float32] | None = None
) -> None:
    """Write statistics as an .npz that other toolkits read too, whole or not at all.

    Args:
        path: the file.
        moments: number, mean and covariance of the features.
        pixels: side of the pictures.
        extractor: sha256 of the network's weights.
        pool: the features themselves, for KID, precision and recall.

    Raises:
        RunError: it cannot be written.
    """
    arrays = {"mu": moments.mean, "sigma": moments.covariance, "n": moments.count, "pixels": pixels}
    arrays |= {"extractor": extractor} | ({} if pool is None else {"pool": pool})
    try:
        with replacing(path) as draft, draft.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # numbers and text become arrays
    except OSError as error:
        raise cannot_write(path, error) from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what a file that is no .npz raises into one line."""
    try:
        path.stat()
        if not zipfile.is_zipfile(path):
            raise EOFError
        yield
    except OSError as error:
        raise InputError(f"reference: {path} cannot be read; {error.strerror or error}") from error
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise _unusable(path, "is no .npz of statistics") from error


def _numbers(path: Path, key: str, values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Return an array of a file, statistics in float64 and features as they are."""
    if values.shape != shape or not np.issubdtype(values.dtype, np.floating):
        raise _unusable(path, f"has a {key} of {values.dtype} {values.shape}, not floats {shape}")
    if not np.isfinite(values).all():
        raise _unusable(path, f"has a {key} with values that are no numbers")
    return values if key == "pool" else values.astype(np.float64)


def _unusable(path: Path, what: str) -> InputError:
    return InputError(f"reference: {path} {what}; {_ADVICE}")
