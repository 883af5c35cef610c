"""What the user sees: results on stdout, everything else on stderr. No torch here."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from unicodedata import category

from varcli.errors import InputError, RunError


def prepare_streams() -> None:
    """Make the standard streams accept any text, and replace those that the caller closed by the null device."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - for good
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # é is \xe9 where the encoding has none


def input_lines() -> Iterator[str]:
    """Yield the lines of standard input as they come; bytes that are no text are escaped, as in names of files.

    Raises:
        InputError: a line is so long that it has no end, perhaps.
    """
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    while line := sys.stdin.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            raise InputError(f"a line of standard input has more than {LONGEST_LINE >> 20} million characters")
        yield line


LONGEST_LINE = 1 << 28
"""Characters of a line of standard input, which may hold all paths that `find -print0` found."""


def result(line: str) -> None:
    """Write one line of results to stdout, at once, so that a reader behind a pipe need not wait.

    Raises:
        RunError: stdout cannot be written.
    """
    _write_results(readable(line))


def note(line: str) -> None:
    """Write one line about the run to stderr; an error in doing so is ignored."""
    shown = readable(line)
    if len(shown) > LONGEST:
        shown = f"{shown[: LONGEST * 2 // 3]} … {shown[-LONGEST // 3 :]}"  # the end says what would be right
    with suppress(OSError):
        sys.stderr.write(f"var: {shown}\n")
        sys.stderr.flush()


LONGEST = 500
"""Most characters of a note or an error; quoted file contents may be of any length."""


def counted(number: float, noun: str) -> str:
    """Return a number with its noun in singular or plural: 1 image, 2 images, 2 classes."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:.15g} {noun}{ending}"


def in_words(names: Sequence[str], most: int = 5) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def notes(quiet: bool) -> Callable[[str], None]:
    """Return `note`, or with `quiet` a function that prints nothing."""
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

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):  # the first names the row, and is never cut or broken
        drawn.add_column(column, overflow="fold", no_wrap=number == 0)
    for row in shown:
        drawn.add_row(*row)
    with writing_results():
        Console(markup=False, highlight=False).print(drawn)


def readable(text: str) -> str:
    r"""Return text with characters that control a terminal, or are invisible, as escapes such as ``\x1b``.

    Those are control characters and line breaks, marks that change the direction of text, and lone surrogates.
    """
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode() if category(character) in _UNSEEN else character
        for character in text
    )


_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of control and format characters, surrogates, and line and paragraph separators."""


def _write_results(line: str) -> None:
    with writing_results():
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


@contextmanager
def writing_results() -> Iterator[None]:
    """Turn a failure of stdout into an error, unless its reader closed the pipe.

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
    """Redirect stdout to the null device, as buffered output would fail again when the interpreter ends."""
    with suppress(OSError):  # a stream of a test has no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def progress(label: str, total: int | None, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Yield a function that moves a progress bar on stderr by one of `total` steps, or by as many as it is given.

    Its second argument is a text after the bar. There is no bar with `quiet`, where stderr is no terminal, or where the
    total is unknown.
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
