"""`var report`: results of `var eval` and training runs as one page."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from varcli.console import result
from varcli.errors import UsageError

Results = Annotated[
    list[str],
    Argument(
        metavar="RESULT...",
        help="Files that `var eval --out` wrote, folders of `var train` runs, or - for lines of `var eval --json` on "
        "stdin.",
    ),
]
Out = Annotated[
    Path,
    Option("--out", "-o", metavar="FILE", help="An .html page with charts and images, or an .md text of its tables."),
]
PAGE, TEXT = (".html", ".htm"), (".md", ".markdown")


def report(results: Results, out: Out = Path("report.html")) -> None:
    """Put evaluations and training runs side by side, and beside the paper, on one page that needs nothing else."""
    if out.suffix.lower() not in PAGE + TEXT:
        raise UsageError(f"out: {out}; a name ending in .html or .md")
    from varcli.checkpoints.registry import registry
    from varcli.files import check_writable, write_atomically
    from varcli.report import page, sources, tables

    check_writable(out)
    evaluations, runs = sources.read(results)
    published = {name: tables.Published(entry.precision, entry.recall) for name, entry in registry().items()}
    made = page.html if out.suffix.lower() in PAGE else page.markdown
    write_atomically(out, made(evaluations, runs, published))
    result(str(out))
