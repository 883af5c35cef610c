"""References that images are measured against: mean and covariance of features, from a file."""

import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from varcli.checkpoints.registry import cache_folder, listed
from varcli.errors import CheckpointError, InputError
from varcli.evaluation.statistics import FeatureShape, Moments
from varcli.files import cannot_write, file_sha256, replacing
from varcli.images.sources import ARCHIVE_ERRORS, PIXELS, square_side


@dataclass(frozen=True, kw_only=True, slots=True)
class Asset:
    """A file for evaluation: a reference, or the weights of a feature extractor."""

    name: str
    note: str = ""
    """What it is, in words."""
    pixels: int | None = None
    """Side of its images, for a reference."""
    bundled: str | None = None
    """File inside the package, for one that ships with it."""
    address: str | None = None
    """Where to download it, for one that does not."""
    bytes: int | None = None
    """Size; None where it is not known before the first download."""
    sha256: str | None = None
    """Of its bytes; None where it is not known before the first download."""
    option: str = "--reference FILE"
    """The option that gives it instead."""

    @property
    def path(self) -> Path:
        """Its path, where it may not exist yet."""
        if self.bundled:
            return Path(__file__).parents[1] / "evaluation" / self.bundled
        return cache_folder() / str(self.address).rpartition("/")[2]


@lru_cache(maxsize=1)
def references() -> Mapping[str, Asset]:
    """Return all references known by name, in the order of `checkpoints.toml`."""
    return {name: Asset(name=name, **facts) for name, facts in listed()["references"].items()}


def weights(extractor: str) -> Asset:
    """The file of a feature extractor's weights."""
    return Asset(name=extractor, **listed()["weights"][extractor])


def find_reference(reference: str, progress: bool = True) -> Path:
    """Return the path of a reference given by name or path, downloading a known one at its first use.

    Raises:
        InputError: there is no such name or path.
        CheckpointError: it cannot be downloaded.
        RunError: what was downloaded cannot be stored.
    """
    if reference in references():
        return _fetched(references()[reference], references()[reference].option, progress)
    if not Path(reference).exists():
        raise InputError(
            f"there is no reference {reference}: neither a file nor one of the names {', '.join(references())}"
        )
    return Path(reference)


def find_weights(extractor: str, given: Path | None = None, progress: bool = True) -> Path:
    """Return the file of a feature extractor's weights: the one given, else the known one, downloaded if need be.

    Raises:
        CheckpointError: the given one is not there, or the known one cannot be downloaded.
        RunError: what was downloaded cannot be stored.
    """
    asset = weights(extractor)
    if given is None:
        return _fetched(asset, asset.option, progress)
    if not given.is_file():
        raise CheckpointError(f"there is no weights file {given}; {asset.address} is the published one")
    return given


def _fetched(material: Asset, option: str, progress: bool) -> Path:
    if material.bundled and not material.path.exists():
        raise CheckpointError(f"{material.path.name} is missing from this installation: install varcli again")
    if material.address is None:
        return material.path
    from varcli.downloads import fetch

    return fetch(
        material.address,
        material.path,
        size=material.bytes,
        sha256=material.sha256,
        advice=f"get it on another machine and give it by {option}, or put it at {material.path}",
        progress=progress,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """Statistics that images are measured against."""

    name: str
    """As users know it."""
    sha256: str
    """Of its file, or another fingerprint."""
    mean: NDArray[np.float64]
    """Of the features, (N,)."""
    covariance: NDArray[np.float64]
    """Of the features, (N, N)."""
    count: int | None = None
    """Images it is made of, None where it does not say."""
    pixels: int | None = None
    """Their side, likewise."""
    extractor: str | None = None
    """sha256 of the weights its features were computed with, likewise."""
    pool: NDArray[np.float32] | None = None
    """Features of its images (P, N), for KID, precision and recall; None where they were not kept."""
    spatial: Moments | None = None
    """Of the spatial features, for sFID; None where it has none."""
    agreement: tuple[float, float] | None = None
    """Class agreement of its images, top-1 and top-5 among their classes; None where it was not measured."""
    path: Path | None = None
    """Its file, if it holds images too: ADM's batches have statistics of all and images of some."""

    def check_extractor(self, name: str, sha256: str, shape: FeatureShape) -> None:
        """Check that features of a network with these weights may be compared with it.

        Raises:
            InputError: it was made with other weights, or by another network.
        """
        if self.extractor not in (None, sha256):
            raise InputError(
                f"the reference {self.name} was made with weights {str(self.extractor)[:12]}, and those of {name} are "
                f"{sha256[:12]}; {_ADVICE}"
            )
        if len(self.mean) != shape.pool:
            raise InputError(
                f"the reference {self.name} has {len(self.mean)} features, and {name} has {shape.pool}; {_ADVICE}"
            )


_ADVICE = "make statistics with: var eval stats DATA -o FILE"


def holds_images(path: Path) -> bool:
    """Whether a path leads to images, which `open_images` takes, and not to statistics.

    Raises:
        InputError: it leads to a damaged .npz.
    """
    if path.suffix.lower() != ".npz":
        return path.is_dir() or path.suffix.lower() in (".zip", ".tar")
    with _reading(path), zipfile.ZipFile(path) as stored:
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
        with zipfile.ZipFile(path) as members:
            size = sum(info.file_size for info in members.infolist() if info.filename.removesuffix(".npy") in _KEYS)
        if size > MOST_BYTES:
            raise _unusable(path, f"has {size / 2**30:.1f} GiB of statistics, and at most {MOST_BYTES >> 30} are read")
        found: dict[str, Any] = {key: stored[key] for key in _KEYS if key in stored.files}
        pool = found["mu"].shape[-1] if found["mu"].ndim else 0
        spatial = None
        if "mu_s" in found and "sigma_s" in found:
            size = found["mu_s"].shape[-1] if found["mu_s"].ndim else 0
            mean = _numbers(path, "mu_s", found["mu_s"], (size,))
            spatial = Moments(0, mean, _covariance(path, "sigma_s", found["sigma_s"], size))
        count = int(found["n"]) if "n" in found else None
        if count is not None and count < 1:
            raise _unusable(path, f"is of {count} images")
        return Reference(
            name=name or path.name,
            sha256=file_sha256(path),
            mean=_numbers(path, "mu", found["mu"], (pool,)),
            covariance=_covariance(path, "sigma", found["sigma"], pool),
            spatial=spatial,
            count=count,
            pixels=int(found["pixels"]) if "pixels" in found else square_side(path),
            extractor=str(found["extractor"]) if "extractor" in found else None,
            pool=_numbers(path, "pool", found["pool"], (len(found["pool"]), pool)) if "pool" in found else None,
            agreement=_shares(path, found["agreement"]) if "agreement" in found else None,
            path=path if "arr_0" in stored.files else None,
        )


MOST_BYTES = 2 << 30
"""Of a reference's statistics and features together, unpacked."""
_KEYS = ("mu", "sigma", "mu_s", "sigma_s", "n", "pixels", "extractor", "pool", "agreement")


def save_reference(
    path: Path,
    moments: Moments,
    *,
    pixels: int,
    extractor: str,
    pool: NDArray[np.float32] | None = None,
    spatial: Moments | None = None,
    agreement: tuple[float, float] | None = None,
) -> None:
    """Write statistics as an .npz that other toolkits read too, whole or not at all.

    Args:
        path: the file.
        moments: number, mean and covariance of the features.
        pixels: side of the images.
        extractor: sha256 of the network's weights.
        pool: the features themselves, for KID, precision and recall.
        spatial: moments of the spatial features, for sFID, under ADM's names.
        agreement: class agreement of the images, top-1 and top-5.

    Raises:
        RunError: it cannot be written.
    """
    arrays = {"mu": moments.mean, "sigma": moments.covariance, "n": moments.count, "pixels": pixels}
    arrays |= {"extractor": extractor} | ({} if pool is None else {"pool": pool})
    arrays |= {} if agreement is None else {"agreement": agreement}
    arrays |= {} if spatial is None else {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # numbers and text become arrays
    except OSError as error:
        raise cannot_write(path, error) from error


def _shares(path: Path, found: NDArray[Any]) -> tuple[float, float]:
    first, five = _numbers(path, "agreement", found, (2,))
    return float(first), float(five)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the errors of a file that is not an .npz into one line."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"the reference {path} is a pipe or device; expected a file or a folder of images")
        if not zipfile.is_zipfile(path):
            raise EOFError
        yield
    except OSError as error:
        raise InputError(f"the reference {path} cannot be read: {error.strerror or error}") from error
    except ARCHIVE_ERRORS as error:
        raise _unusable(path, "is not an .npz of statistics") from error


def _numbers(path: Path, key: str, values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Return an array of a file, statistics in float64 and features as they are."""
    if values.shape != shape or not np.issubdtype(values.dtype, np.floating):
        raise _unusable(path, f"has a {key} of {values.dtype} {values.shape}, not floats {shape}")
    if not np.isfinite(values).all():
        raise _unusable(path, f"has a {key} with values that are not finite")
    return values if key == "pool" else values.astype(np.float64)


def _covariance(path: Path, key: str, values: NDArray[Any], size: int) -> NDArray[np.float64]:
    """A covariance of a file, having checked that it is one: symmetric and, but for rounding, not negative."""
    sigma_NN = _numbers(path, key, values, (size, size))
    scale = np.abs(sigma_NN).max(initial=0)
    if not np.allclose(sigma_NN, sigma_NN.T, rtol=0, atol=1e-3 * scale):
        raise _unusable(path, f"has a {key} that is not symmetric")
    try:
        np.linalg.cholesky(sigma_NN + 1e-3 * scale * np.eye(len(sigma_NN)))
    except np.linalg.LinAlgError as error:
        raise _unusable(path, f"has a {key} that is not a covariance: it has negative variances") from error
    return sigma_NN


def _unusable(path: Path, what: str) -> InputError:
    return InputError(f"the reference {path} {what}; {_ADVICE}")
