"""Each option's type, range and help, once. Defaults stand in the configurations. No torch here."""

from pathlib import Path
from typing import Annotated, Final, Literal

from typer import Argument, Option

from varcli.config import APPROXIMATIONS
from varcli.errors import UsageError

DEFAULT_CHECKPOINT: Final = "tiny64"
DEFAULT_PRESET: Final = "looks"
"""Who types no settings wants images to look at; figures come from commands that say so."""

Classes = Annotated[
    list[str],
    Option(
        "--class",
        "-c",
        metavar="CLASS",
        help="Index (207), name ('golden retriever'), list (1,5,207), range (10-20), all, none (unconditional), "
        "random, or - for one a line on stdin. Repeatable.",
    ),
]
Count = Annotated[int, Option("--count", "-n", min=1, help="Images a class.")]
Seed = Annotated[int, Option("--seed", min=0, help="Seed of a class's first image; the next ones count up from it.")]
Checkpoint = Annotated[
    str,
    Option(
        "--checkpoint",
        "-m",
        envvar="VAR_CHECKPOINT",
        metavar="NAME|FILE",
        help="Which model: a name of `var checkpoints list`, or a file.",
    ),
]
Cfg = Annotated[
    float | None, Option("--cfg", help="Strength of classifier-free guidance, 0 for none.", show_default="the preset's")
]
TopK = Annotated[
    int | None,
    Option("--top-k", help="Draw from this many best tokens; 0 is off, 1 greedy.", show_default="the preset's"),
]
TopP = Annotated[
    float | None,
    Option("--top-p", help="Draw from the best tokens of this probability; 0 is off.", show_default="the preset's"),
]
Smooth = Annotated[bool, Option("--smooth", help="Mix tokens instead of drawing one: smoother, for looks only.")]
Preset = Annotated[
    Literal["metrics", "looks"],
    Option("--preset", help="Settings for measuring or for looking at; the options above override them."),
]
Out = Annotated[
    str | None,
    Option(
        "--out",
        "-o",
        metavar="PLACE",
        help="A .png file, a folder, .npz (for FID toolkits), .tar (WebDataset), or - for stdout.",
        show_default="files in the current folder",
    ),
]
Grid = Annotated[Path | None, Option("--grid", metavar="FILE", help="Also a contact sheet of all images, .png.")]
Scales = Annotated[
    Path | None,
    Option("--growth", metavar="FILE", help="Also the image growing scale by scale: strip .png, animation .gif."),
]
BatchSize = Annotated[
    int | None,
    Option(
        "--batch-size",
        min=1,
        help="Images at a time on a GPU in 16 bits; elsewhere always one, so that batches change nothing.",
        show_default="as memory allows",
    ),
]
Device = Annotated[str, Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.")]
Dtype = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    Option("--dtype", help="Precision; auto is 16 bits on CUDA and on CPUs that have bf16, else fp32."),
]
Quantize = Annotated[
    Literal["int8"] | None,
    Option(
        "--quantize",
        help="Weights and activations in 8 bits: on CPUs faster for models as large as d16; less memory.",
        show_default="off",
    ),
]
Approximate = Annotated[
    str | None,
    Option(
        "--approximate",
        metavar="NAMES",
        help=f"Approximations that save time: {', '.join(APPROXIMATIONS)} (with commas between), or all.",
        show_default="none",
    ),
]
Processes = Annotated[
    int,
    Option(
        "--nproc",
        metavar="N",
        min=1,
        help="Share the images among N processes, which share the GPUs where there are some.",
    ),
]
Resume = Annotated[bool, Option("--resume", help="Skip images that are there already.")]
Json = Annotated[bool, Option("--json", help="Results as JSON, one object a line.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="No progress bar, no notes, no paths; errors only.")]
ImageFile = Annotated[Path, Argument(metavar="FILE", help="A PNG that `var sample` wrote.")]
Words = Annotated[list[str] | None, Argument(metavar="[WORDS]", help="Words of the name; without them all classes.")]


def parse_numbers(what: str, text: str) -> tuple[int, ...]:
    """Return the whole numbers of a list such as 1,2,3.

    Raises:
        UsageError: it is no such list.
    """
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise UsageError(f"{what}: {text}; whole numbers with commas between, such as 1,2,3") from None


def parse_approximations(text: str | None) -> str | None:
    """Return approximations in the order of `APPROXIMATIONS`, each once; unknown ones are left to the configuration."""
    if text is None:
        return None
    given = {name.strip() for name in text.split(",")}
    if given == {"all"}:
        return ",".join(APPROXIMATIONS)
    return ",".join([name for name in APPROXIMATIONS if name in given] + sorted(given - set(APPROXIMATIONS)))


def check_precision(dtype: str, quantize: str | None) -> None:
    """Raise UsageError if two precisions are asked for."""
    if quantize and dtype != "auto":
        raise UsageError(f"quantize: {quantize} with --dtype {dtype}; one or the other")
