"""Frozen configurations and their JSON form. No torch here.

Each field's default stands here and nowhere else. A configuration is checked when it is made and
raises ValueError with a line a user can act on.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, TypeVar

from varcli.scales import check_sides, sequence_length

HEAD_WIDTH = 64
"""Channels of one attention head, the same at every depth."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """Shape of a multi-scale residual VQVAE (paper, section 3.2). Defaults: the released one."""

    sides: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """Sides s_1 … s_K of the token maps."""
    codebook_size: int = 4096
    """V, the number of codebook rows."""
    codebook_width: int = 32
    """C, the channels of a codebook row and of the feature map."""
    base_width: int = 160
    """Channels at full resolution; a multiple of 32, the number of groups of every GroupNorm."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each level as multiples of base_width; each level after the first halves the resolution."""
    encoder_blocks: int = 2
    """Residual blocks a level in the encoder; the decoder has one more."""
    kernel_count: int = 4
    """Convolutions φ shared among the scales."""

    def __post_init__(self) -> None:
        check_sides(self.sides)
        _require(self.base_width > 0 and self.base_width % 32 == 0, f"base width: {self.base_width}; a multiple of 32")
        _require(len(self.multipliers) > 0 and min(self.multipliers) > 0, "multipliers: each must be at least 1")
        for name in ("codebook_size", "codebook_width", "encoder_blocks", "kernel_count"):
            _require(getattr(self, name) > 0, f"{name.replace('_', ' ')}: {getattr(self, name)}; at least 1")

    @property
    def downsampling(self) -> int:
        """Pixels per side of a finest token."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def pixels(self) -> int:
        """Side of the picture in pixels."""
        return self.downsampling * self.sides[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """Shape of a VAR transformer (paper, section 3.1 and table 6)."""

    depth: int
    """Number of blocks, the one dial of the released models."""
    width: int
    """D, the channels of the residual stream; 64 × depth in the released models."""
    sides: tuple[int, ...]
    """Sides s_1 … s_K of the token maps."""
    codebook_size: int
    """V of its tokenizer."""
    codebook_width: int
    """C of its tokenizer."""
    class_count: int = 1000
    """Rows of the class table, without the one for "no class"."""
    shared_adaln: bool = False
    """One modulation for all blocks (d36) instead of one a block."""

    def __post_init__(self) -> None:
        check_sides(self.sides)
        _require(self.depth > 0, f"depth: {self.depth}; at least 1")
        _require(
            self.width > 0 and self.width % HEAD_WIDTH == 0,
            f"width: {self.width}; a multiple of {HEAD_WIDTH}, the head width",
        )
        for name in ("codebook_size", "codebook_width", "class_count"):
            _require(getattr(self, name) > 0, f"{name.replace('_', ' ')}: {getattr(self, name)}; at least 1")

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.width // HEAD_WIDTH

    @property
    def length(self) -> int:
        """L, the tokens of all scales."""
        return sequence_length(self.sides)

    @property
    def null_class(self) -> int:
        """Row of the class table that means "no class"."""
        return self.class_count


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Settings of one sampling run; with a seed and a class they determine a picture."""

    cfg: float = 1.5
    """Strength of classifier-free guidance at the last scale; it rises linearly from 0 at the first."""
    top_k: int = 900
    """Draw from this many best tokens; 0 is no limit, 1 is greedy."""
    top_p: float = 0.96
    """Draw from the best tokens that hold this probability; 0 is no limit."""
    smooth: bool = False
    """Mix codebook rows instead of drawing one: for looks, never for metrics."""

    def __post_init__(self) -> None:
        _require(self.cfg >= 0, f"cfg: {self.cfg}; 0 (no guidance) or more")
        _require(self.top_k >= 0, f"top-k: {self.top_k}; 0 (off) or more")
        _require(0 <= self.top_p <= 1, f"top-p: {self.top_p}; between 0 (off) and 1")


PRESETS = {
    "metrics": SampleConfig(cfg=1.5, top_k=900, top_p=0.96),
    "looks": SampleConfig(cfg=4.0, top_k=900, top_p=0.95),
}
"""The paper's settings for FID, and those its authors use for pictures to look at."""

Config = TypeVar("Config")


def to_json(config: Any) -> str:
    """Return a configuration as JSON with sorted keys."""
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


def from_json(kind: type[Config], text: str) -> Config:
    """Return the configuration that `to_json` wrote.

    Raises:
        ValueError: the text is no JSON object, or has other fields than `kind`, or a bad value.
    """
    given = json.loads(text)
    if not isinstance(given, dict):
        raise ValueError(f"{kind.__name__}: {text[:40]}; a JSON object")
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if given.keys() != names:
        raise ValueError(f"{kind.__name__} fields: {', '.join(sorted(given.keys() ^ names))} missing or unknown")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
