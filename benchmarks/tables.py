"""Tables of what a benchmark measured."""

import json
import sys
from collections.abc import Mapping, Sequence


def print_rows(rows: Sequence[Mapping[str, object]], as_json: bool) -> None:
    """Print rows as a Markdown table, or as JSON, one object per line."""
    if as_json:
        lines = [json.dumps(row) for row in rows]
    else:
        cells = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
        lines = [f"| {' | '.join(map(str, row))} |" for row in cells]
    sys.stdout.write("\n".join(lines) + "\n")
