"""Type, range and help of each option. Defaults are in the configurations. No torch here."""

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

from typer import Argument, Option

from varcli.config import SampleConfig, option_flags
from varcli.console import notes
from varcli.errors import UsageError

DEFAULT_CHECKPOINT: Final = "tiny64"
DEFAULT_PRESET: Final = "looks"
"""Default to the "looks" preset; evaluation uses "metrics"."""


# --- options from dataclasses ----------------------------------------------------------------------


def expand(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option per field of each dataclass among its keyword-only parameters.

    A parameter annotated with a dataclass, whose fields are annotated as options, gets an instance of it. One
    annotated `Annotated[dict[str, Any], Config]` gets a dict of the options that were typed, so that the others keep
    the values of a preset or recipe; the fields of `Config` are declared with `varcli.config.option`. With names
    of fields after `Config`, these alone become options.
    """
    parameters, build = _expanded(command, inspect.signature(command).parameters.values())

    @functools.wraps(command)
    def run(**typed: Any) -> None:
        command(**build(typed))

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


Build = Callable[[dict[str, Any]], dict[str, Any]]
"""Takes every option of a command line by name; returns the arguments that they make."""


def _expanded(owner: Any, declared: Iterable[inspect.Parameter]) -> tuple[list[inspect.Parameter], Build]:
    """The options that a function's parameters or a dataclass's fields stand for, and what makes these of them."""
    hints = get_type_hints(owner, include_extras=True)
    parameters: list[inspect.Parameter] = []
    builders: dict[str, Callable[[dict[str, Any]], Any]] = {}
    for parameter in declared:
        name = parameter.name
        hint: Any = hints[name]
        if isinstance(hint, type) and is_dataclass(hint):
            inner, build = _expanded(hint, inspect.signature(hint).parameters.values())
            builders[name] = functools.partial(_instance, hint, build)
        elif (config := _config_of(hint)) is not None:
            kinds, chosen = get_type_hints(config), get_args(hint)[2:]
            declared_in = [field for field in fields(config) if "help" in field.metadata]
            inner = [
                _parameter(field, kinds[field.name]) for field in declared_in if not chosen or field.name in chosen
            ]
            names = [option.name for option in inner]
            builders[name] = functools.partial(_typed_only, names)
        else:
            inner = [parameter.replace(annotation=hint)]
            builders[name] = operator.itemgetter(name)
        parameters += inner
    return parameters, lambda typed: {name: build(typed) for name, build in builders.items()}


def _instance(kind: Any, build: Build, typed: dict[str, Any]) -> Any:
    return kind(**build(typed))


def _typed_only(names: Sequence[str], typed: dict[str, Any]) -> dict[str, Any]:
    return {name: typed[name] for name in names if typed[name] is not None}


def _config_of(hint: Any) -> Any:
    """The dataclass of which a parameter takes the typed options, None if it is another kind of parameter."""
    if get_origin(hint) is not Annotated:
        return None
    kind, config = get_args(hint)[:2]
    return config if get_origin(kind) is dict and is_dataclass(config) else None


def _parameter(field: "Field[Any]", kind: Any) -> inspect.Parameter:
    """A field as an option that is None where it is not typed."""
    shown = field.metadata["shown"]
    if shown is None and field.default is not MISSING and not isinstance(field.default, bool):
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)
    if get_origin(kind) is tuple:
        kind = str  # parsed by the command: 1,2,3
    declared = Option(
        *option_flags(field),
        help=field.metadata["help"],
        metavar=field.metadata["metavar"],
        show_default=shown or False,
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, declared]
    )


Settings = Annotated[dict[str, Any], SampleConfig]
"""The options of sampling, one per field; a command gets those that were typed."""

# --- options one by one ----------------------------------------------------------------------------

Classes = Annotated[
    list[str],
    Option(
        "--class",
        "-c",
        metavar="CLASS",
        help="Index (207), name ('golden retriever'), list (1,5,207), range (10-20), all, none (unconditional), "
        "random, or - to read one per line from stdin. Repeatable.",
    ),
]
Count = Annotated[int, Option("--count", "-n", min=1, help="Images per class.")]
Seed = Annotated[int, Option("--seed", min=0, help="Seed of each class's first image; the next ones count up from it.")]
Checkpoint = Annotated[
    str,
    Option(
        "--checkpoint",
        "-m",
        envvar="VAR_CHECKPOINT",
        metavar="NAME|FILE",
        help="Model: a name from `var checkpoints list`, or a file.",
    ),
]
Preset = Annotated[
    Literal["metrics", "looks"],
    Option(
        "--preset", help="Published settings: for metrics, or for images to look at. The options above override them."
    ),
]
Out = Annotated[
    str | None,
    Option(
        "--out",
        "-o",
        metavar="PATH",
        help="A .png file, a folder, .npz (for FID toolkits), .tar (WebDataset), or - for stdout.",
        show_default="files in the current folder",
    ),
]
ImageArgument = Annotated[str, Argument(metavar="IMG", help="An image of any size and kind, or - for standard input.")]
ImagesOut = Annotated[
    str | None,
    Option(
        "--out",
        "-o",
        metavar="PATH",
        help="A .png file, a folder, or - for stdout (several: a tar stream).",
        show_default="files in the current folder",
    ),
]
Grid = Annotated[Path | None, Option("--grid", metavar="FILE", help="Also write a contact sheet of all images, .png.")]
Growth = Annotated[
    Path | None,
    Option(
        "--growth",
        metavar="FILE",
        help="Also write the image growing scale by scale: a strip (.png) or an animation (.gif).",
    ),
]
BatchSize = Annotated[
    int | None,
    Option(
        "--batch-size",
        min=1,
        help="Batch size for 16-bit GPU sampling; always 1 elsewhere, so results never depend on it.",
        show_default="as memory allows",
    ),
]
Device = Annotated[str, Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.")]
Dtype = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    Option("--dtype", help="Precision; auto is 16 bits on CUDA and on CPUs that have bf16, else fp32."),
]
TrainingDtype = Annotated[
    Literal["auto", "fp32", "bf16"],
    Option("--dtype", help="Precision; auto is the run's own, or bf16 where it is faster."),
]
Compiled = Annotated[
    bool, Option("--compile", help="Compile the networks with torch.compile first: minutes, then faster steps.")
]
TokenCache = Annotated[
    Path | None,
    Option(
        "--tokens",
        metavar="DIR",
        help="Cache of token maps, which runs can share; missing ones are computed.",
        show_default="in --out",
    ),
]
Quantize = Annotated[
    Literal["int8"] | None,
    Option(
        "--quantize",
        help="8-bit weights and activations: less memory, and faster on CPUs for models as large as d16.",
        show_default="off",
    ),
]
Processes = Annotated[
    int,
    Option(
        "--nproc",
        metavar="N",
        min=1,
        help="Split the work over N processes and the available GPUs.",
    ),
]
Resume = Annotated[bool, Option("--resume", help="Skip images that an earlier run has written.")]
SkipBad = Annotated[bool, Option("--skip-bad", help="Leave out images that cannot be read, instead of stopping.")]
DEFAULT_FEATURES = "inception-v3-compat"
InceptionFile = Annotated[
    Path | None,
    Option("--inception", envvar="VAR_INCEPTION", metavar="FILE", help="Inception's weights, instead of a download."),
]
DinoFile = Annotated[
    Path | None,
    Option("--dinov2", envvar="VAR_DINOV2", metavar="FILE", help="DINOv2's weights, instead of a download."),
]
Holdout = Annotated[
    int, Option("--holdout", metavar="N", min=0, help="Keep the last N images of each class for validation.")
]
Workers = Annotated[
    int | None,
    Option("--workers", min=0, help="Data-loading workers.", show_default="one less than cores, 8 at most"),
]
Json = Annotated[bool, Option("--json", help="Print results as JSON, one object per line.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Print errors only: no progress bar, notes or paths.")]
ImageFile = Annotated[Path, Argument(metavar="FILE", help="A PNG that var wrote, or - for standard input.")]
Words = Annotated[
    list[str] | None, Argument(metavar="[WORDS]", help="Words of the name; without any, all classes are listed.")
]


BestOf = Annotated[
    float,
    Option(
        "--best-of",
        metavar="N",
        min=1,
        help="Sample N candidates per image and keep those of highest classifier confidence; may be fractional.",
    ),
]
DecideAt = Annotated[
    int | None,
    Option(
        "--decide-at",
        metavar="SCALE",
        min=1,
        help="Choose among candidates of --best-of after this scale, and finish only those kept; the coarsest is 1.",
        show_default="after the last",
    ),
]
Classifier = Annotated[
    str,
    Option(
        "--classifier",
        metavar="NAME|FILE",
        help="Classifier: self (the checkpoint's own likelihoods), efficientnet-lite0, a torchvision model such as "
        "resnet101, one with its weights (resnet50:FILE.safetensors), or a TorchScript file (a program you trust).",
    ),
]
DEFAULT_CLASSIFIER: Final = "resnet101"
"""torchvision's, as in VQGAN's rejection sampling."""


def parse_numbers(flag: str, text: str) -> tuple[int, ...]:
    """Parse whole numbers such as 1,2,3.

    Raises:
        UsageError: it is no such list.
    """
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise UsageError(f"{flag} must be whole numbers separated by commas, such as 1,2,3 (got {text})") from None


def check_image_outputs(out: str | None, as_json: bool, growth: Path | None, count: int) -> None:
    """Raise UsageError if single images cannot be written as requested."""
    if out == "-" and as_json:
        raise UsageError(STDOUT_TWICE)
    if growth and count != 1:
        raise UsageError(f"--growth shows exactly one image (got {count} images)")


def extractor_weights(features: str, inception: Path | None, dinov2: Path | None) -> Path | None:
    """Return the file given for the weights of a feature extractor, None for a download or where it needs none."""
    return {DEFAULT_FEATURES: inception, "dinov2": dinov2}.get(features)


def tell_also(*files: Path | None, quiet: bool) -> None:
    """Note which files were written besides the results, whose names are on stdout."""
    for file in filter(None, files):
        notes(quiet)(f"also written: {file}")


STDOUT_TWICE = "--json cannot be used with --out -: stdout can carry the images or the lines, not both"
