"""The app, the list of its commands, and the one place where an error becomes a line and an exit code.

Exit codes: 0 success, 1 a bug (with its traceback), 2 to 5 as `varcli.errors` says, 130 Ctrl-C, 141 the
reader of our output closed the pipe, 143 SIGTERM during training, after its state was saved.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import pairwise
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from varcli import __version__, collector, console, distributed
from varcli.errors import RunError, UsageError, VarError

COMMANDS = {
    "sample": ("sample", "sample", "Generate images of classes."),
    "inpaint": ("edit", "inpaint", "Fill a hole in an image."),
    "outpaint": ("edit", "outpaint", "Extend an image beyond its borders."),
    "edit": ("edit", "edit", "Repaint a region with an object of another class."),
    "reconstruct": ("tokens", "reconstruct", "Encode and decode images with the tokenizer."),
    "tokens": ("tokens", "tokens_app", "Encode images to token files and decode them."),
    "score": ("score", "score", "Print the negative log-likelihood of images given a class."),
    "classify": ("score", "classify", "Print which classes explain images best."),
    "eval": ("eval", "evaluate", "Measure images: FID, inception score, KID, precision and recall."),
    "eval stats": ("eval", "eval_stats", "Compute reference statistics for FID."),
    "report": ("report", "report", "Put evaluations and training runs on one page."),
    "bench": ("bench", "bench", "Benchmark sampling on this machine."),
    "demo": ("demo", "demo", "Serve a web page for sampling and editing."),
    "show": ("show", "show", "Show an image's settings and the command that reproduces it."),
    "classes": ("classes", "classes", "Search class names, and which of them a checkpoint knows."),
    "checkpoints": ("checkpoints", "checkpoints_app", "List, download, convert, merge and verify models."),
    "train": ("train", "train_app", "Train a tokenizer, then a transformer on its tokens."),
    "scaling": ("scaling", "scaling_app", "Train models of several sizes and fit scaling laws to them."),
}
"""Module, name and purpose of each command, in the order of the help; a module is imported only when needed."""

RENAMED: dict[str, tuple[str, Callable[[float], float] | None]] = {
    "--accumulate": ("--grad-accum", None),
    "--batch": ("--batch-size", None),
    "--best": ("--best-of", lambda kept: 1 / kept),
    "--draft": ("--approximate", None),
    "--enlarge": ("--resize-ratio", None),
    "--lpips": ("--perceptual-weight", None),
    "--num": ("--num-images", None),
    "--paper": ("--released-rule", None),
    "--reject": ("--best-of", lambda rejected: 1 / (1 - rejected)),
    "--scales": ("--growth", None),
    "--store": ("--save-dtype", None),
}
"""Options of the previous version, their new names, and how a value converts; removed in the next version."""

INTERRUPTED, CLOSED_PIPE = 130, 141
"""Exit codes as a shell reports them, for programs that Ctrl-C or a closed pipe ended."""


class Commands(TyperGroup):
    """The commands of `COMMANDS`, each imported when it is used."""

    listing = False
    """Whether commands are only named, for the help."""

    def __init__(self, **settings: Any) -> None:
        """Name the commands, for the help and for suggestions where a name is unknown."""
        super().__init__(**settings)
        self.commands = {name: TyperCommand(name, help=purpose) for name, (_, _, purpose) in COMMANDS.items()}

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help without importing any command."""
        self.listing = True
        super().format_help(ctx, formatter)
        self.listing = False

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command by name, None if there is none."""
        if cmd_name not in COMMANDS:
            return None
        if self.listing:
            return self.commands[cmd_name]
        module, name, _ = COMMANDS[cmd_name]
        found = getattr(import_module(f"varcli.commands.{module}"), name)
        if not isinstance(found, typer.Typer):
            function, found = found, typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            found.command(cmd_name)(function)
        command: Any = typer.main.get_command(found)
        command.name = cmd_name
        for part in (command, *getattr(command, "commands", {}).values()):
            part.make_context = console.writing_results()(part.make_context)  # which answers --help
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return name, command and what is left of a command line; some names are of two words."""
        words = 2 if " ".join(args[:2]) in COMMANDS else 1
        return super().resolve_command(ctx, [" ".join(args[:words]), *args[words:]])

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        """Read the command line; --help and --version are answered here already."""
        with _ending_quietly(), console.writing_results():
            return super().make_context(*arguments, **settings)

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        with _ending_quietly():
            return super().invoke(ctx)


@contextmanager
def _ending_quietly() -> Iterator[None]:
    """End quietly where the reader of our output closed the pipe."""
    try:
        try:
            yield
        finally:
            with console.writing_results():
                sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise  # rich, which prints the help, turns the one into the other
        console.discard_results()
        raise typer.Exit(CLOSED_PIPE) from error


app = typer.Typer(
    name="var", cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich"
)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.result(f"var {__version__}")
        raise typer.Exit


@app.callback()
def var(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Generate images with visual autoregressive modeling: next-scale prediction, coarse to fine."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (the process's own if None); return the exit code."""
    words = with_new_names(sys.argv[1:] if arguments is None else arguments)
    distributed.remember_command_line(words)
    try:
        code = app(words, prog_name="var", standalone_mode=False) or 0
    except VarError as error:
        return _failed(str(error), error.exit_code)
    except typer.TyperException as error:
        message = in_our_words(error.format_message(), words)
        return _failed(message, UsageError.exit_code) if message else UsageError.exit_code  # nothing typed: the help
    except ImportError as error:
        if not (error.path or "").endswith(".so"):
            raise  # a bug, not a library that the system refuses, such as torch's where `ulimit -v` is low
        return _failed(f"a library cannot be loaded: {error}; is `ulimit -v` too low?", RunError.exit_code)
    if code == INTERRUPTED and not distributed.launched():
        console.note("interrupted")
    return int(code)


def with_new_names(arguments: Sequence[str]) -> list[str]:
    """The command line with renamed options under their new names, each with a note to the user."""
    words = list(arguments)
    if words[:2] == ["eval", "stats"] and "--features" in words:  # was a flag, and names the extractor now
        from varcli.evaluation.metrics import FEATURES

        i = words.index("--features")
        if not {*words[i + 1 : i + 2]} & {*FEATURES, "none"}:
            words[i] = "--keep-features"
            console.note("--features is now --keep-features; the old name will be removed in the next version")
    for i, word in enumerate(words[: words.index("--")] if "--" in words else words):
        flag, joined, value = word.partition("=")
        if flag not in RENAMED:
            continue
        name, convert = RENAMED[flag]
        words[i] = f"{name}{joined}{value}"
        if convert is None:
            console.note(f"{flag} is now {name}; the old name will be removed in the next version")
            continue
        try:
            changed = f"{convert(float(value if joined else words[i + 1])):g}"
        except (ValueError, ArithmeticError, IndexError):
            continue  # the new option will refuse it
        if joined:
            words[i] = f"{name}={changed}"
        else:
            words[i + 1] = changed
        console.note(f"{flag} is now {name} {changed}; the old name will be removed in the next version")
    return words


def in_our_words(message: str, words: Sequence[str]) -> str:
    """Typer's message about a command line as a sentence that says what was given and what would be right."""
    if message.startswith("Got unexpected extra argument"):
        return f"{message}: quotes keep several words together, as in --class 'golden retriever'"
    if message.startswith("No such option: --resume") and words[:1] == ["train"]:
        return f"{message}; the same command resumes a run that was stopped"
    if missing := re.match(r"Missing option '(--[\w-]+)'", message):
        example = ", as in --class 207" if missing[1] == "--class" else ""
        return f"{missing[1]} is required{example}"
    invalid = re.match(r"Invalid value for '(--[\w-]+)'(?: / '(-\w)')?: (.*)", message)
    if not invalid:
        return message
    flag, short, reason = invalid.groups()
    for pattern, template in _RIGHT:
        if found := re.match(pattern, reason):
            right = found.expand(template).replace("'", "")
            got = ""
            for word, following in pairwise([*words, ""]):  # of an option given twice the last counts
                if word in (flag, short):
                    got = f" (got {following})"
                elif word.startswith(f"{flag}="):
                    got = f" (got {word.partition('=')[2]})"
            return f"{flag} must be {right}{got}"
    return f"{flag}: {reason}"


_RIGHT = (
    (r"Input should be greater than or equal to (.+)", r"at least \1"),
    (r"Input should be less than or equal to (.+)", r"at most \1"),
    (r"Input should be (greater|less) than (.+)", r"\1 than \2"),
    (r"Input should be a valid number", "a number"),
    (r"Input should be a valid integer", "a whole number"),
    (r"Value error, .+ is not one of (.+?)\.?$", r"one of \1"),
)
"""What Typer says of a value, by pydantic, and what would be right."""


def _failed(message: str, code: int) -> int:
    if not distributed.report_error(message):
        console.failure(message)
    return code


def main() -> None:
    """Run `var`."""
    collector.pause()
    console.prepare_streams()
    code = run()
    if distributed.launched():
        # Sharded weights keep torch's process groups alive, and destroying these at the interpreter's end aborted one
        # run in five ("terminate called without an active exception", torch 2.14).
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)
