"""`var report`: results of `var eval` and training runs as one page."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from varcli.console import result

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
    Option("--out", "-o", metavar="FILE", help="An .html page with charts and images, or an .md file of its tables."),
]


def report(results: Results, out: Out = Path("report.html")) -> None:
    """Compare evaluations and training runs with each other and with the paper, on one self-contained page."""
    from varcli.report.page import write_report

    write_report(results, out)
    result(str(out))
