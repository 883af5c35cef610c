"""Start-up time: `var --help`, and `var sample` from process start to PNG, against `import torch`.

    python benchmarks/startup.py [--checkpoint NAME|FILE] [--rounds 7] [--json]

All three are interleaved round by round; the table shows medians and their ratio to `import torch`.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tables import print_rows


def seconds(command: list[str]) -> float:
    """Return how long a process takes from start to end."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(checkpoint: str, rounds: int) -> list[dict[str, object]]:
    """Return one row per command: median seconds, and their ratio to `import torch`."""
    var = str(Path(sys.executable).with_name("var"))
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            'python -c "import torch"': [sys.executable, "-c", "import torch"],
            "var --help": [var, "--help"],
            "var sample": [var, "sample", "-c", "random", "-m", checkpoint, "-o", f"{folder}/image.png"],
        }
        taken: dict[str, list[float]] = {name: [] for name in commands}
        for turn in range(rounds + 1):
            for name, command in commands.items():
                needed = seconds(command)
                if turn > 0:  # the first round fills the disk cache
                    taken[name].append(needed)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    torch = medians['python -c "import torch"']
    return [
        {"command": name, "seconds": round(median, 3), "times `import torch`": round(median / torch, 2)}
        for name, median in medians.items()
    ]


def main() -> None:
    """Measure and print a Markdown table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="tiny64", help="name or file of the model for `var sample`")
    parser.add_argument("--rounds", type=int, default=7, help="how often each is measured")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    given = parser.parse_args()
    print_rows(measure(given.checkpoint, given.rounds), as_json=given.json)


if __name__ == "__main__":
    main()
