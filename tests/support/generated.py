"""The parts of README and docs that the program itself writes; as a script, puts them in.

Between `<!-- begin: COMMAND -->` and `<!-- end -->` stands what the command prints.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COLUMNS = 100
PART = re.compile(r"(?<=<!-- begin: )(.+?)( -->\n).*?(?=<!-- end -->)", re.DOTALL)


def printed(command):
    """Return what a `var …` command prints, as wide as the page shows it, on any machine."""
    plain = {"COLUMNS": str(COLUMNS), "NO_COLOR": "1", "TERM": "dumb", "PYTHONUTF8": "1"}
    forced = ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TERMINAL_WIDTH")  # what Typer and Rich also look at
    environment = {name: value for name, value in os.environ.items() if name not in forced} | plain
    words = [sys.executable, "-m", "varcli", *shlex.split(command)[1:]]
    done = subprocess.run(words, env=environment, capture_output=True, check=True)
    lines = done.stdout.decode().splitlines()
    return "\n".join(line.rstrip() for line in lines).strip("\n") + "\n"


def filled(text):
    """Return a page with all parts as the program prints them now."""

    def fill(part):
        content = printed(part[1])
        return f"{part[1]}{part[2]}" + (content if "--markdown" in part[1] else f"```text\n{content}```\n")

    return PART.sub(fill, text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
