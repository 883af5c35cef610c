"""Frozen configurations and their JSON form. No torch here.

Each field's default stands here and nowhere else. A configuration is checked when it is made and
raises ValueError with a line a user can act on.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from varcli.errors import ConfigError, InputError

GRID_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
GRID_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
GRID_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)


def sequence_length(sides: Sequence[int]) -> int:
    """Return L, the number of tokens of all scales together."""
    return sum(side * side for side in sides)


def spans(sides: Sequence[int]) -> list[slice]:
    """Return for each scale the slice of the sequence its tokens take."""
    found, start = [], 0
    for side in sides:
        found.append(slice(start, start + side * side))
        start += side * side
    return found


def progress_ratio(scale: int, count: int) -> float:
    """Return k/(K-1), how far scale k (0-based) lies between the first and the last; 0 if K = 1."""
    return scale / max(count - 1, 1)


def check_sides(sides: Sequence[int]) -> None:
    """Raise ConfigError unless sides begin with 1 and grow strictly."""
    growing = all(a < b for a, b in pairwise(sides))
    if not sides or sides[0] != 1 or not growing:
        given = ",".join(map(str, sides))
        raise ConfigError(f"sides must begin with 1 and grow, e.g. 1,2,3,4,6,8 (got {given})")


def sides_of_length(length: int) -> tuple[int, ...]:
    """Return the published grid that has this many tokens.

    Raises:
        InputError: no published grid has this length, so the sides must be given.
    """
    for grid in (GRID_256, GRID_512, GRID_1024):
        if sequence_length(grid) == length:
            return grid
    raise InputError(f"token count: {length} belongs to no published grid; give the sides with --sides 1,2,3,…")


HEAD_WIDTH = 64
"""Channels of one attention head, the same at every depth."""


def option(default: Any, help: str, *flags: str, metavar: str | None = None, shown: str | None = None) -> Any:
    """Declare a field that is also a command-line option.

    Args:
        default: of the field.
        help: what `--help` says.
        flags: of the option, e.g. "--num-images", "-n"; by default `--` and the field's name.
        metavar: placeholder of the value in `--help`.
        shown: default as `--help` words it, where it is not the field's own.
    """
    metadata = {"help": help, "flags": flags, "metavar": metavar, "shown": shown}
    return dataclasses.field(default=default, metadata=metadata)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_finite(config: Any) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = field.name.replace("_", "-")
        _require(
            not isinstance(value, float) or math.isfinite(value), f"--{name} must be a finite number (got {value})"
        )


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
        """Side of the image in pixels."""
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


PRESET_S = "the preset's"

APPROXIMATIONS = ("guidance", "tokens", "cache")
"""Approximations of sampling: no guidance in the last scales, fewer tokens there, fewer keys and values kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Settings of one sampling run; with a seed and a class they determine an image.

    A field here is all that a new setting needs: its option and help, its place in the provenance, `--resume`,
    reports and the command that reproduces an image follow from it. Its default must mean "off", since files
    written before it existed do not mention it.
    """

    cfg: float = option(
        1.5,
        "Strength of classifier-free guidance at the last scale, rising linearly from 0 at the first; 0 is off.",
        shown=PRESET_S,
    )
    top_k: int = option(900, "Sample from this many most likely tokens; 0 is off, 1 is greedy.", shown=PRESET_S)
    top_p: float = option(
        0.96, "Sample from the most likely tokens that hold this probability; 0 is off.", shown=PRESET_S
    )
    smooth: bool = option(False, "Mix codebook vectors instead of sampling one: smoother images, not for metrics.")
    approximate: str = option(
        "", f"Approximations that save time: {', '.join(APPROXIMATIONS)} (comma-separated), or all.", metavar="NAMES"
    )

    def __post_init__(self) -> None:
        _require_finite(self)
        names = {name.strip() for name in self.approximate.split(",")} - {""}
        names = set(APPROXIMATIONS) if names == {"all"} else names
        choices = ", ".join(APPROXIMATIONS)
        _require(
            names <= set(APPROXIMATIONS),
            f"--approximate takes some of {choices}, separated by commas, or all (got {self.approximate})",
        )
        ordered = ",".join(name for name in APPROXIMATIONS if name in names)
        object.__setattr__(self, "approximate", ordered)  # one spelling for one meaning
        _require(self.cfg >= 0, f"--cfg must be 0 (no guidance) or more (got {self.cfg:g})")
        _require(self.top_k >= 0, f"--top-k must be 0 (off) or more (got {self.top_k})")
        _require(0 <= self.top_p <= 1, f"--top-p must be between 0 (off) and 1 (got {self.top_p:g})")

    def describe(self) -> str:
        """The settings in a line, e.g. "cfg 1.5, top-k 900, top-p 0.96"; what is off by default and off is left out."""
        words = []
        for field in dataclasses.fields(self):
            name, value = field.name.replace("_", "-"), getattr(self, field.name)
            if isinstance(value, bool):
                words += [name] * value
            elif value != "":
                words.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
        return ", ".join(words)

    @property
    def approximations(self) -> frozenset[str]:
        """The approximations one by one."""
        return frozenset(name for name in self.approximate.split(",") if name)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """What both training stages ask. Everything here shapes the result, so a resumed run must agree."""

    epochs: float
    """Passes over the training images."""
    batch: int = 768
    """Images an update."""
    accumulate: int = 1
    """Parts a batch is computed in, to save memory."""
    base_lr: float = 1e-4
    """Learning rate for 256 images an update; it grows in proportion to the batch."""
    final_lr: float
    """Learning rate at the end, as a fraction."""
    weight_decay: float
    """Decoupled weight decay at the start."""
    ema: float = 0.9999
    """Decay of the weights' moving average, which is what the checkpoint holds."""
    enlarge: float = 1.125
    """Shorter side before the random crop, as a multiple of the image's side."""
    seed: int = 0
    """Of the initial weights, the order, the crops and every draw in between."""

    def __post_init__(self) -> None:
        _require_finite(self)
        _require(self.epochs > 0, f"epochs: {self.epochs}; more than 0")
        _require(self.batch > 0, f"batch: {self.batch}; at least 1")
        _require(
            self.accumulate > 0 and self.batch % self.accumulate == 0,
            f"accumulate: {self.accumulate}; it divides the batch of {self.batch}",
        )
        _require(self.base_lr > 0, f"base lr: {self.base_lr}; more than 0")
        _require(0 <= self.final_lr <= 1, f"final lr: {self.final_lr}; a fraction between 0 and 1")
        _require(self.weight_decay >= 0, f"weight decay: {self.weight_decay}; 0 or more")
        _require(0 <= self.ema < 1, f"ema: {self.ema}; from 0 (off) to below 1")
        _require(self.enlarge >= 1, f"enlarge: {self.enlarge}; 1 (no margin) or more")

    @property
    def lr(self) -> float:
        """Peak learning rate at this batch size."""
        return self.base_lr * self.batch / 256

    def steps(self, images: int) -> int:
        """Return the updates of a run over that many images."""
        return math.ceil(self.epochs * images / self.batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerTrainingConfig(TrainingConfig):
    """How to train a tokenizer (paper, equation 5)."""

    epochs: float = 250
    final_lr: float = 0.3
    weight_decay: float = 0.005
    lpips: float = 1.0
    """λ_P, weight of the perceptual distance; 0 needs no VGG weights."""
    gan: float = 0.4
    """λ_G, weight of the adversarial loss; 0 is off."""
    gan_start: float = 0.22
    """When the adversarial loss sets in, as a fraction of the training."""
    scale_drop: float = 0.0
    """Probability that an update leaves out the last scales, which keeps the coarse ones in use."""

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        _require(self.lpips >= 0, f"lpips: {self.lpips}; 0 (off) or more")
        _require(self.gan >= 0, f"gan: {self.gan}; 0 (off) or more")
        _require(0 <= self.gan_start <= 1, f"gan start: {self.gan_start}; a fraction between 0 and 1")
        _require(0 <= self.scale_drop <= 1, f"scale drop: {self.scale_drop}; a probability")


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerTrainingConfig(TrainingConfig):
    """How to train a transformer (paper, section 4 and appendix)."""

    epochs: float = 200
    final_lr: float = 0.1
    weight_decay: float = 0.05
    final_weight_decay: float = 0.05
    """Decoupled weight decay at the end."""
    gamma_init: float = 1e-3
    """Factor of the initial weights behind the gates γ: deeper models start closer to the identity."""
    crops: int = 4
    """Random crops an image whose tokens are cached, epochs taking turns; 1 is the centre alone.

    Differs: the released recipe draws a new crop every time, and computes tokens anew for it.
    """

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        _require(self.final_weight_decay >= 0, f"final weight decay: {self.final_weight_decay}; 0 or more")
        _require(self.gamma_init > 0, f"gamma init: {self.gamma_init}; more than 0")
        _require(self.crops > 0, f"crops: {self.crops}; at least 1")


def transformer_recipe(depth: int) -> TransformerTrainingConfig:
    """Return the published recipe of the released model nearest in depth, the shallower of two."""
    recipes = {
        16: TransformerTrainingConfig(epochs=200),
        20: TransformerTrainingConfig(epochs=250),
        24: TransformerTrainingConfig(epochs=350, base_lr=8e-5, final_lr=0.01, gamma_init=1e-4),
        30: TransformerTrainingConfig(
            epochs=350, batch=1024, base_lr=8e-5, final_lr=0.01, final_weight_decay=0.08, gamma_init=1e-5
        ),
        36: TransformerTrainingConfig(epochs=350, base_lr=8e-5, final_lr=0.01, gamma_init=5e-6),
    }
    return recipes[min(recipes, key=lambda known: (abs(known - depth), known))]


PRESETS = {
    "metrics": SampleConfig(cfg=1.5, top_k=900, top_p=0.96),
    "looks": SampleConfig(cfg=4.0, top_k=900, top_p=0.95),
}
"""The paper's settings for FID, and those its authors use for images to look at."""

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
