"""Token files: images as token maps in safetensors, for scripts to work on.

``tokens.0`` … ``tokens.K-1`` are int32 of shape (images, side, side), coarse to fine. The metadata has
the sides, the codebook's size, the tokenizer's hash and the images' names; a file that a script wrote may leave all of
it out, and the last scales too.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from varcli.checkpoints.safetensors_io import load_tensors, reason, save_tensors
from varcli.config import TokenizerConfig
from varcli.errors import CheckpointError, InputError
from varcli.files import parse_json


@dataclass(frozen=True, slots=True)
class TokenFile:
    """What a token file holds."""

    maps: list[Tensor]
    """Of each scale, (images, l) int64."""
    names: list[str]
    """Of the images, in the same order."""


def save_tokens(
    path: Path, images: Sequence[Sequence[Tensor]], names: Sequence[str], config: TokenizerConfig, sha256: str
) -> None:
    """Write token maps: for each image one per scale, (1, l).

    Raises:
        RunError: the file cannot be written.
    """
    tensors = {
        f"tokens.{scale}": torch.cat([tokens[scale] for tokens in images]).to(torch.int32).unflatten(1, (side, side))
        for scale, side in enumerate(config.sides)
    }
    metadata = {
        "kind": "tokens",
        "sides": ",".join(map(str, config.sides)),
        "codebook_size": str(config.codebook_size),
        "tokenizer_sha256": sha256,
        "names": json.dumps([name.encode(errors="replace").decode() for name in names], ensure_ascii=False),
    }
    save_tensors(path, tensors, metadata)


def load_tokens(path: Path, config: TokenizerConfig, sha256: str, name: str) -> TokenFile:
    """Return the token maps of a file, called `name`, checked against the tokenizer that is to decode them.

    Raises:
        InputError: the file cannot be read, is none of tokens, or holds other shapes or numbers.
        CheckpointError: they were made by another tokenizer.
    """
    if path.is_file() and path.stat().st_size == 0:
        raise InputError(f"{name} is empty: give a token file")
    try:
        tensors, metadata = load_tensors(path)
    except CheckpointError as error:
        why = reason(error.__cause__ or error)
        raise InputError(f"the token file {name} cannot be read: {why}") from error
    unknown = sorted(tensor for tensor in tensors if not re.fullmatch(r"tokens\.[0-9]+", tensor))
    if unknown or not tensors or set(tensors) != {f"tokens.{scale}" for scale in range(len(tensors))}:
        found = unknown[0] if unknown else ", ".join(sorted(tensors)) or "nothing"
        raise InputError(f"the token file {name} must hold tokens.0, tokens.1 … of the first scales on (got {found})")
    if metadata.get("tokenizer_sha256", sha256) != sha256:
        raise CheckpointError(f"the tokens of {name} are another tokenizer's: give the --checkpoint that made them")
    maps = token_maps([tensors[f"tokens.{k}"] for k in range(len(tensors))], config, f" of {name}")
    return TokenFile(maps, _names(metadata.get("names"), len(maps[0])))


def token_maps(tokens: Sequence[Tensor], config: TokenizerConfig, where: str = "") -> list[Tensor]:
    """Return token maps as (images, l) int64 each, checked against the tokenizer that is to decode them.

    Args:
        tokens: one map per scale, coarse to fine, (images, l) or (images, side, side); the last ones may be missing.
        config: of the tokenizer.
        where: for messages, what holds them.

    Raises:
        InputError: there are more scales than the tokenizer has, other shapes, or numbers that are none of its.
    """
    if not 1 <= len(tokens) <= len(config.sides):
        raise InputError(
            f"the tokens{where} must be one map for each of the first scales, 1 to {len(config.sides)} "
            f"(got {len(tokens)})"
        )
    maps = [_checked(where, each, scale, config) for scale, each in enumerate(tokens)]
    if len({len(idx_Bl) for idx_Bl in maps}) != 1 or not len(maps[0]):
        raise InputError(f"the tokens{where} must have the same number of images at every scale, at least one")
    return maps


def _checked(where: str, tokens: Tensor, scale: int, config: TokenizerConfig) -> Tensor:
    """Return one scale's map as (images, l) int64."""
    side, count = config.sides[scale], config.codebook_size
    if tokens.dtype.is_floating_point or tokens.dtype.is_complex or tokens.dtype == torch.bool:
        raise InputError(f"the tokens{where} must be whole numbers (got {tokens.dtype} at scale {scale + 1})")
    if tuple(tokens.shape[1:]) not in ((side, side), (side * side,)):
        shape = " × ".join(map(str, tokens.shape)) or "a single number"
        raise InputError(f"the tokens{where} must be images × {side} × {side} at scale {scale + 1} (got {shape})")
    idx_Bl = tokens.to(torch.int64).flatten(1)
    if idx_Bl.numel() and not 0 <= int(idx_Bl.min()) <= int(idx_Bl.max()) < count:
        raise InputError(
            f"the tokens{where} must be rows of the codebook, 0 to {count - 1} (scale {scale + 1} has others)"
        )
    return idx_Bl


def _names(text: str | None, count: int) -> list[str]:
    """Return the names that a file gives its images; numbers where it gives none, or other than it has images."""
    try:
        names = parse_json(text or "")
    except ValueError:
        names = None
    fit = isinstance(names, list) and len(names) == count and all(isinstance(name, str) for name in names)
    return names if fit else [str(i) for i in range(count)]
