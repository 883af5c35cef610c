"""Kill commands at random moments, go on with them, and hold what they leave to what an undisturbed run leaves.

    python benchmarks/kill.py [--checkpoint NAME|FILE] [--rounds 3] [--images 12] [--seed 0] [--job NAME ...]

Each round kills a command one to three times, by SIGKILL, SIGTERM, SIGINT or SIGHUP, and then lets it end. The exit
code is 1 if any result differs, a process outlives its command, or a temporary file stays.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tables import print_rows

VAR = [sys.executable, "-m", "varcli"]
SMALL = "--sides 1,2,4 --multipliers 1,1,1 --base-width 32 --codebook-size 64 --codebook-width 8"
PACE = "--epochs 8 --batch-size 4 --lpips 0 --gan 0 --workers 1 --save-every 2"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
CHANGING = ("metrics.jsonl", "state.safetensors", "state-previous.safetensors")
"""Files that tell speeds and times too."""


def jobs(checkpoint: str, images: int, data: Path) -> dict[str, list[str]]:
    """Return the commands by name; each writes to `out` in the current folder, and goes on if it is run again."""
    sample = [*VAR, "sample", "-c", "random", "-n", str(images), "-m", checkpoint, "--quiet", "--resume"]
    train = [*VAR, "train", "tokenizer", str(data), *SMALL.split(), *PACE.split(), "--quiet", "-o", "out"]
    outs = {"folder": "out/", "npz": "out.npz", "tar": "out.tar"}
    found = {f"sample {kind}": [*sample, "-o", out] for kind, out in outs.items()}
    found |= {f"sample {kind}, 2 processes": [*sample, "-o", out, "--nproc", "2"] for kind, out in outs.items()}
    return found | {"train tokenizer": train}


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file in a folder that equal runs leave equal, by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in CHANGING)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def survivors(folder: Path) -> list[int]:
    """Return the processes that still work in a folder, once they have had some seconds to end."""
    for _ in range(50):
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended, or is another user's
                found += [int(process.name)] * ((process / "cwd").readlink() == folder)
        if not found:
            break
        time.sleep(0.1)
    return found


def begin(command: list[str], folder: Path) -> "subprocess.Popen[bytes]":
    """Start a command in a folder, whose own temporary folder is beside it."""
    folder.mkdir(exist_ok=True)
    temporary = folder.with_suffix(".tmp")
    temporary.mkdir(exist_ok=True)
    environment = os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def disturbed(command: list[str], folder: Path, seconds: float, source: random.Random) -> tuple[int, list[str]]:
    """Run a command to its end, killed on the way; return how many signals ended it and what was wrong then."""
    wrong, ended = [], 0
    for _ in range(source.randint(1, 3)):
        process = begin(command, folder)
        time.sleep(source.uniform(0, seconds))
        if process.poll() is None:
            number = source.choice(SIGNALS)
            process.send_signal(number)
            told = process.communicate()[1]
            ended += process.returncode != 0
            if b"Traceback" in told:
                wrong.append(f"a traceback after {number.name}")
            if survivors(folder):
                wrong.append(f"a process outlived {number.name}")
    process = begin(command, folder)
    told = process.communicate()[1]
    if process.returncode:
        wrong.append(f"exit code {process.returncode}: {told.decode()[-300:]}")
    if left := list(folder.with_suffix(".tmp").glob(".varcli-*")):
        wrong.append(f"temporary files stay: {left[0].name}")
    return ended, wrong


def measure(name: str, command: list[str], rounds: int, source: random.Random, place: Path) -> dict[str, object]:
    """Return one row of the table: how often a command was killed and how often the result was equal."""
    start = time.perf_counter()
    process = begin(command, place / "alone")
    told = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"{name}: {told.decode()}")
    seconds = time.perf_counter() - start
    expected, equal, signals, wrong = contents(place / "alone"), 0, 0, []
    for number in range(rounds):
        folder = place / f"round{number}"
        ended, said = disturbed(command, folder, seconds, source)
        signals += ended
        wrong += said
        equal += contents(folder) == expected
        sys.stderr.write(f"{name}: round {number + 1} of {rounds}\n")
        shutil.rmtree(folder)
    if equal < rounds:
        wrong.append("results differ")
    return {"command": name, "rounds": rounds, "signals": signals, "equal": equal, "wrong": "; ".join(wrong) or "–"}


def main() -> None:
    """Run the loop and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="tiny64", help="name or file of what `var sample` uses")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each command")
    parser.add_argument("--images", type=int, default=12, help="images of each run of `var sample`")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    parser.add_argument("--job", action="append", help="only this row of the table; repeatable")
    given = parser.parse_args()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # what nohup starts is deaf to it, and so are its children
    signal.signal(signal.SIGINT, signal.default_int_handler)
    source = random.Random(given.seed)
    checkpoint = str(Path(given.checkpoint).resolve()) if Path(given.checkpoint).is_file() else given.checkpoint
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        data = place / "data"
        for label in ("one", "two"):
            (data / label).mkdir(parents=True)
            for i in range(6):  # noise, in a format that needs no library
                pixels = random.Random(f"{label}{i}").randbytes(20 * 20 * 3)
                (data / label / f"{i}.ppm").write_bytes(b"P6 20 20 255\n" + pixels)
        rows = []
        for number, (name, command) in enumerate(jobs(checkpoint, given.images, data).items()):
            if not given.job or name in given.job:
                (place / str(number)).mkdir()
                rows.append(measure(name, command, given.rounds, source, place / str(number)))
    print_rows(rows, as_json=False)
    sys.exit(any(row["wrong"] != "–" for row in rows))


if __name__ == "__main__":
    main()
