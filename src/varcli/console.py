"""What the user sees: results on stdout, everything else on stderr. No torch here."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from unicodedata import category

from varcli.errors import RunError


def prepare_streams() -> None:
    """Make the standard streams fit for any text, and those that the caller closed lead nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - for good
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # é is \xe9 where the encoding has none


def result(line: str) -> None:
    """Write one line of results to stdout, at once, so that a reader behind a pipe need not wait.

    Raises:
        RunError: stdout cannot be written.
    """
    _write_results(readable(line))


def note(line: str) -> None:
    """Write one line about the run to stderr, if that can be written: no reason to stop if not."""
    shown = readable(line)
    if len(shown) > LONGEST:
        shown = f"{shown[: LONGEST * 2 // 3]} … {shown[-LONGEST // 3 :]}"  # what would be right stands at the end
    with suppress(OSError):
        sys.stderr.write(f"var: {shown}\n")
        sys.stderr.flush()


LONGEST = 500
"""Characters of a note or an error; what a file holds may be of any length."""


def counted(number: float, noun: str) -> str:
    """Return a number with its noun in singular or plural: 1 image, 2 images, 2 classes."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:.15g} {noun}{ending}"


def notes(quiet: bool) -> Callable[[str], None]:
    """Return `note`, or what says nothing to those who want errors only."""
    return (lambda line: None) if quiet else note


def failure(message: str) -> None:
    """Write an error to stderr, as one line whatever it holds."""
    note("error: " + " ".join(message.split()))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write rows to stdout: as a table with headings on a terminal, else with tabs between and no headings.

    Raises:
        RunError: stdout cannot be written.
    """
    shown = [list(map(readable, row)) for row in rows]
    if not sys.stdout.isatty():
        for row in shown:
            _write_results("\t".join(row))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in shown:
        drawn.add_row(*row)
    with writing_results():
        Console(markup=False, highlight=False).print(drawn)


def readable(text: str) -> str:
    r"""Return text with what would steer a terminal, or could not be seen, as escapes such as ``\x1b``.

    Those are control characters and line breaks, marks that change the direction of text, and half characters.
    """
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode() if category(character) in _UNSEEN else character
        for character in text
    )


_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of control, format and half characters, and of breaks of lines and paragraphs."""


def _write_results(line: str) -> None:
    with writing_results():
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


@contextmanager
def writing_results() -> Iterator[None]:
    """Turn what goes wrong with stdout into an error, unless its reader went away.

    Raises:
        RunError: it cannot be written.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_results()
        raise RunError(f"standard output cannot be written: {error.strerror}") from error


def discard_results() -> None:
    """Let what still waits to be written to stdout lead nowhere: it would fail again when the interpreter ends."""
    with suppress(OSError):  # a stream of a test has no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def progress(label: str, total: int | None, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Yield what to call after one of `total` steps, or with how many were made: it moves a bar on stderr.

    A second argument is the text behind the bar.
    There is no bar where stderr is no terminal, where `quiet` is asked for, or where the total is unknown.
    """
    if quiet or total is None or not sys.stderr.isatty():
        yield lambda count=1, text="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
        TextColumn("{task.fields[text]}", markup=False),
    )
    # rich would send redirected results to stderr too: right on a terminal, wrong in a pipe.
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task(label, total=total, text="")
        yield lambda count=1, text="": bar.update(task, advance=count, text=text)
