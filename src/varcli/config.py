"""Frozen configurations and their JSON form. No torch here.

Each field's default stands here and nowhere else. A configuration is checked when it is made and
raises ValueError with a line a user can act on.
"""

import dataclasses
import json
import math
import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar, get_args, get_origin

from varcli.errors import ConfigError, InputError
from varcli.files import parse_json

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
    """Raise ConfigError unless sides begin with 1, grow strictly and make a model that a computer can hold."""
    given = ",".join(map(str, sides))
    growing = all(a < b for a, b in pairwise(sides))
    if not sides or sides[0] != 1 or not growing:
        raise ConfigError(f"sides must begin with 1 and grow, e.g. 1,2,3,4,6,8 (got {given})")
    if sides[-1] > LARGEST_SIDE or sequence_length(sides) > MOST_TOKENS:
        raise ConfigError(f"sides must be at most {LARGEST_SIDE} and make at most {MOST_TOKENS} tokens (got {given})")


def sides_of_length(length: int) -> tuple[int, ...]:
    """Return the published grid that has this many tokens.

    Raises:
        InputError: no published grid has this length, so the sides must be given.
    """
    for grid in (GRID_256, GRID_512, GRID_1024):
        if sequence_length(grid) == length:
            return grid
    raise InputError(f"no published grid has {length} tokens: give the sides with --sides 1,2,3,…")


LARGEST_SIDE, MOST_TOKENS = 256, 16384
"""Of token maps: four times the side, and twice the tokens, of images of 1024 pixels."""
HEAD_WIDTH = 64
"""Channels of one attention head, the same at every depth."""


PRESET_S = "the preset's"
"""Where options get their defaults, as `--help` says it."""


def option(
    default: Any, help: str, *flags: str, metavar: str | None = None, shown: str | None = None, always: bool = False
) -> Any:
    """Declare a field that is also a command-line option.

    Args:
        default: of the field.
        help: what `--help` says.
        flags: of the option, e.g. "--num-images", "-n"; by default `--` and the field's name.
        metavar: placeholder of the value in `--help`.
        shown: default as `--help` words it, where it is not the field's own.
        always: whether the setting is stated with an image or result also where it has its default.
    """
    metadata = {"help": help, "flags": flags, "metavar": metavar, "shown": shown, "always": always}
    return dataclasses.field(default=default, metadata=metadata)


def option_flags(field: "dataclasses.Field[Any]") -> tuple[str, ...]:
    """Return the flags of a field declared with `option`."""
    flags: tuple[str, ...] = field.metadata["flags"]
    return flags or (f"--{field.name.replace('_', '-')}",)


def option_names(config: Any) -> dict[str, str]:
    """Return the option of each field of a dataclass that is one, such as "--batch-size" for `batch`."""
    return {field.name: option_flags(field)[0] for field in dataclasses.fields(config) if "flags" in field.metadata}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_types(config: Any) -> None:
    """Check each value against its field's type: a file or a caller may give anything."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = field.name.replace("_", "-")
        values = value if get_origin(field.type) is tuple and isinstance(value, tuple | list) else (value,)
        kind = get_args(field.type)[0] if get_origin(field.type) is tuple else field.type
        abstract, words = _KINDS[kind]
        fits = all(isinstance(v, abstract) and (kind is bool or not isinstance(v, bool)) for v in values)
        _require(fits, f"--{name} must be {words} (got {value!r})")
        finite = kind is not float or math.isfinite(value)
        _require(finite, f"--{name} must be a finite number (got {value})")


_KINDS: dict[Any, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "text"),
}
"""The values that a field of each type takes, NumPy's among them, and their name in messages."""


def _require_counts(config: Any, **largest: int) -> None:
    """Check that numbers are in range: a small file must not ask for a model that no computer can hold."""
    for name, most in largest.items():
        value = getattr(config, name)
        words = name.replace("_", " ")
        _require(value > 0, f"{words} must be at least 1 (got {value})")
        _require(value <= most, f"{words} must be at most {most} (got {value})")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """Shape of a multi-scale residual VQVAE (paper, section 3.2). Defaults: the released one."""

    sides: tuple[int, ...] = option(GRID_256, "Sides s_1 … s_K of the token maps, coarse to fine.", metavar="1,2,3,…")
    codebook_size: int = option(4096, "V, rows of the codebook.")
    codebook_width: int = option(32, "C, channels of a codebook row and of the feature map.")
    base_width: int = option(160, "Channels at full resolution, a multiple of 32: each GroupNorm has 32 groups.")
    multipliers: tuple[int, ...] = option(
        (1, 1, 2, 2, 4),
        "Channels of each level as multiples of the base width; the resolution halves from level to level.",
        metavar="1,2,…",
    )
    encoder_blocks: int = option(2, "Residual blocks per level in the encoder; the decoder has one more.")
    kernel_count: int = 4
    """Convolutions φ shared among the scales."""

    def __post_init__(self) -> None:
        _require_types(self)
        check_sides(self.sides)
        _require(
            self.base_width > 0 and self.base_width % 32 == 0,
            f"base width must be a multiple of 32 (got {self.base_width})",
        )
        _require(len(self.multipliers) > 0 and min(self.multipliers) > 0, "each of the multipliers must be at least 1")
        _require(
            len(self.multipliers) <= 8 and max(self.multipliers) <= 64,
            f"multipliers must be at most 8 numbers up to 64 (got {','.join(map(str, self.multipliers))})",
        )
        _require_counts(
            self, codebook_size=2**20, codebook_width=2**12, base_width=2**12, encoder_blocks=64, kernel_count=256
        )

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
    """One modulation for all blocks (d36) instead of one per block."""

    def __post_init__(self) -> None:
        _require_types(self)
        check_sides(self.sides)
        _require(
            self.width > 0 and self.width % HEAD_WIDTH == 0,
            f"width must be a multiple of {HEAD_WIDTH}, the channels of a head (got {self.width})",
        )
        _require_counts(self, depth=512, width=2**15, codebook_size=2**20, codebook_width=2**12, class_count=10**6)

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
        always=True,
    )
    top_k: int = option(
        900, "Sample from this many most likely tokens; 0 is off, 1 is greedy.", shown=PRESET_S, always=True
    )
    top_p: float = option(
        0.96, "Sample from the most likely tokens that hold this probability; 0 is off.", shown=PRESET_S, always=True
    )
    temperature: float = option(1.0, "Divide the logits by this; below 1 likely tokens are sampled more often.")
    ssg: float = option(
        0.0, "Strength of scaled spatial guidance, which amplifies what each scale adds to the one before; 0 is off."
    )
    vpg: float = option(
        0.0, "Strength of visual prefix guidance, which amplifies what depends on the coarser scales; 0 is off."
    )
    cfg_scales: str = option(
        "",
        "Use classifier-free guidance at these scales only, such as 3-8; the coarsest is 1.",
        metavar="FIRST-LAST",
    )
    refiner: str = option(
        "",
        "Second model, usually a smaller one, that samples the scales from --refine-from on.",
        metavar="NAME|FILE",
    )
    refine_from: int = option(0, "First scale that --refiner samples; the coarsest is 1.", metavar="SCALE", shown="off")
    smooth: bool = option(False, "Mix codebook vectors instead of sampling one: smoother images, not for metrics.")
    approximate: str = option(
        "", f"Approximations that save time: {', '.join(APPROXIMATIONS)} (comma-separated), or all.", metavar="NAMES"
    )

    def __post_init__(self) -> None:
        _require_types(self)
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
        _require(self.cfg <= 1000, f"--cfg must be at most 1000 (got {self.cfg:g})")
        _require(self.top_k >= 0, f"--top-k must be 0 (off) or more (got {self.top_k})")
        _require(0 <= self.top_p <= 1, f"--top-p must be between 0 (off) and 1 (got {self.top_p:g})")
        _require(
            0 < self.temperature <= 100, f"--temperature must be more than 0 and at most 100 (got {self.temperature:g})"
        )
        _require(0 <= self.ssg <= 100, f"--ssg must be between 0 (off) and 100 (got {self.ssg:g})")
        _require(0 <= self.vpg <= 100, f"--vpg must be between 0 (off) and 100 (got {self.vpg:g})")
        _require(
            bool(self.refiner) == (self.refine_from != 0),
            "--refiner and --refine-from need each other: which model samples the fine scales, and from which scale on "
            f"(got {f'--refiner {self.refiner}' if self.refiner else f'--refine-from {self.refine_from}'} alone)",
        )
        _require(
            self.refine_from == 0 or self.refine_from >= 2,
            f"--refine-from must be 2 or more: the main model samples the scales before it (got {self.refine_from})",
        )
        _require(
            not self.cfg_scales or (self.guided_scales.start >= 0 and len(self.guided_scales) > 0),
            f"--cfg-scales must be two numbers, such as 3-8, of which the first is not larger (got {self.cfg_scales})",
        )

    @property
    def rows(self) -> int:
        """Rows of the transformer's batch that an image takes: its class, "no class" and a damaged prefix."""
        return 1 + (self.cfg > 0) + (self.vpg > 0)

    @property
    def guided_scales(self) -> range:
        """Scales that are guided, from 0; the range may go beyond the last scale of a model."""
        if not self.cfg_scales:
            return range(LARGEST_SIDE)
        found = re.fullmatch(r"([1-9][0-9]{0,2})-([1-9][0-9]{0,2})", self.cfg_scales)
        return range(int(found[1]) - 1, int(found[2])) if found else range(0)

    def stated(self) -> dict[str, Any]:
        """The settings by name; those that are off by default are left out while they are off."""
        values = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return {field.name: value for field, value in values if field.metadata["always"] or value != field.default}

    def describe(self) -> str:
        """The settings in a line, e.g. "cfg 1.5, top-k 900, top-p 0.96"."""
        words = []
        for option_name, value in self.stated().items():
            name = option_name.replace("_", "-")
            if isinstance(value, bool):
                words.append(name)
            else:
                words.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
        return ", ".join(words)

    @property
    def approximations(self) -> frozenset[str]:
        """The approximations one by one."""
        return frozenset(name for name in self.approximate.split(",") if name)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Settings of both training stages. Everything here affects the result, so a resumed run must have the same."""

    epochs: float = option(200, "Passes over the training images.", shown="200, from depth 19 on 250, from 23 on 350")
    batch: int = option(768, "Images per step.", "--batch-size", shown="768; 1024 for transformers of depth 28 to 33")
    accumulate: int = option(
        1,
        "Parts in which a batch is computed, to save memory.",
        "--grad-accum",
        metavar="N",
    )
    base_lr: float = option(
        1e-4,
        "Learning rate for 256 images per step; it grows in proportion to the batch.",
        shown="0.0001, for transformers from depth 23 on 8e-05",
    )
    final_lr: float = option(
        0.1, "Learning rate at the end, as a fraction of the peak.", shown="0.1, from depth 23 on 0.01"
    )
    weight_decay: float = option(0.05, "Decoupled weight decay at the start.")
    ema: float = option(
        0.9999,
        "Decay of the moving average of the weights, which the checkpoint holds; 0 is off.",
    )
    enlarge: float = option(
        1.125,
        "Shorter side before the random crop, as a multiple of the model's image size.",
        "--resize-ratio",
    )
    flip: bool = option(False, "Mirror each image in every other epoch.")
    freeze: str = option(
        "",
        'Do not train the weights with these names, e.g. "encoder.*,quant*" (comma-separated).',
        metavar="PATTERNS",
    )
    clip_grad: float = option(0.0, "Largest norm of the gradient; 0 is off.")
    seed: int = option(0, "Random seed.")

    def __post_init__(self) -> None:
        _require_types(self)
        _require(self.clip_grad >= 0, f"--clip-grad must be 0 (off) or more (got {self.clip_grad:g})")
        _require(self.epochs > 0, f"--epochs must be more than 0 (got {self.epochs:g})")
        _require(self.batch > 0, f"--batch-size must be at least 1 (got {self.batch})")
        _require(
            self.accumulate > 0 and self.batch % self.accumulate == 0,
            f"--grad-accum must divide the batch of {self.batch} (got {self.accumulate})",
        )
        _require(self.base_lr > 0, f"--base-lr must be more than 0 (got {self.base_lr:g})")
        _require(0 <= self.final_lr <= 1, f"--final-lr must be a fraction between 0 and 1 (got {self.final_lr:g})")
        _require(self.weight_decay >= 0, f"--weight-decay must be 0 or more (got {self.weight_decay:g})")
        _require(0 <= self.ema < 1, f"--ema must be 0 (off) or more, and less than 1 (got {self.ema:g})")
        _require(self.enlarge >= 1, f"--resize-ratio must be 1 (no margin) or more (got {self.enlarge:g})")

    @property
    def lr(self) -> float:
        """Peak learning rate at this batch size."""
        return self.base_lr * self.batch / 256

    def steps(self, images: int) -> int:
        """Steps of a run over that many images."""
        return math.ceil(self.epochs * images / self.batch)


PERCEPTUAL = ("lpips", "resnet50", "efficientnet-lite0", "none")
"""Networks of the tokenizer's perceptual loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerTrainingConfig(TrainingConfig):
    """How to train a tokenizer (paper, equation 5)."""

    epochs: float = option(250, "Passes over the training images.")
    final_lr: float = option(0.3, "Learning rate at the end, as a fraction of the peak.")
    weight_decay: float = option(0.005, "Decoupled weight decay.")
    perceptual: str = option(
        "lpips",
        f"Network of the perceptual loss: {', '.join(PERCEPTUAL)}. The first two need downloaded weights.",
        metavar="NAME",
    )
    perceptual_weight: float = option(1.0, "λ_P, weight of the perceptual loss; 0 is off.")
    commitment: float = option(
        0.25,
        "β, weight of the commitment loss; the codebook loss has weight 1.",
    )
    gan: float = option(0.4, "λ_G, weight of the adversarial loss; 0 is off.")
    gan_start: float = option(0.22, "Start of the adversarial loss, as a fraction of training.")
    scale_drop: float = option(
        0.0,
        "Quantizer dropout: probability that a step leaves out the last scales, so that the coarse ones stay in use.",
    )

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        names = ", ".join(PERCEPTUAL)
        _require(self.perceptual in PERCEPTUAL, f"--perceptual must be one of {names} (got {self.perceptual})")
        _require(
            self.perceptual_weight >= 0, f"--perceptual-weight must be 0 (off) or more (got {self.perceptual_weight:g})"
        )
        _require(self.commitment >= 0, f"--commitment must be 0 (off) or more (got {self.commitment:g})")
        _require(self.gan >= 0, f"--gan must be 0 (off) or more (got {self.gan:g})")
        _require(0 <= self.gan_start <= 1, f"--gan-start must be a fraction between 0 and 1 (got {self.gan_start:g})")
        _require(0 <= self.scale_drop <= 1, f"--scale-drop must be a probability (got {self.scale_drop:g})")


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerTrainingConfig(TrainingConfig):
    """How to train a transformer (paper, section 4 and appendix)."""

    final_weight_decay: float = option(
        0.05, "Decoupled weight decay at the end.", shown="0.05; 0.08 for depth 28 to 33"
    )
    clip_grad: float = option(2.0, "Largest norm of the gradient; 0 is off.")
    scale_weight: str = option(
        "mean",
        'Weight of a token in the loss: "mean" is the same for all tokens, "side" is 1/side of its scale.',
        metavar="RULE",
    )
    scale_drop: float = option(
        0.0,
        "Probability that a step leaves out the last scale, for a fraction of its cost.",
    )
    adapter: str = option(
        "",
        "Train only an adapter and the class embedding: lora:RANK or modulation. It is merged into the checkpoint.",
    )
    cca: float = option(
        0.0,
        "λ of condition contrastive alignment: fine-tune --init so that samples need no guidance; 0 is off.",
    )
    cca_beta: float = option(0.02, "β of condition contrastive alignment.")
    gamma_init: float = option(
        1e-3,
        "Factor of the initial weights behind the gates γ.",
        shown="0.001, from depth 23 on 0.0001, less for deeper models",
    )
    crops: int = option(
        4,
        "Cached random crops per image, used in turn by the epochs; 1 is the centre alone.",
    )
    """Differs: the released recipe draws a new crop every time, and computes its tokens."""

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        _require(
            self.final_weight_decay >= 0, f"--final-weight-decay must be 0 or more (got {self.final_weight_decay:g})"
        )
        _require(self.cca >= 0, f"--cca must be 0 (off) or more (got {self.cca:g})")
        _require(self.cca_beta > 0, f"--cca-beta must be more than 0 (got {self.cca_beta:g})")
        _require(self.gamma_init > 0, f"--gamma-init must be more than 0 (got {self.gamma_init:g})")
        _require(
            self.scale_weight in ("mean", "side"), f"--scale-weight must be mean or side (got {self.scale_weight})"
        )
        _require(0 <= self.scale_drop <= 1, f"--scale-drop must be a probability (got {self.scale_drop:g})")
        _require(
            re.fullmatch(r"|modulation|lora:[1-9][0-9]{0,3}", self.adapter) is not None,
            f"--adapter must be lora:RANK, such as lora:16, or modulation (got {self.adapter})",
        )
        _require(self.crops > 0, f"--crops must be at least 1 (got {self.crops})")
        _require(
            not self.flip or self.crops % 2 == 0,
            f"--flip mirrors every other crop, so --crops must be even (got {self.crops})",
        )


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
    given = parse_json(text)
    if not isinstance(given, dict):
        raise ValueError(f"{kind.__name__} must be a JSON object (got {text[:40]})")
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if given.keys() != names:
        raise ValueError(f"{kind.__name__} has missing or unknown fields: {', '.join(sorted(given.keys() ^ names))}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
