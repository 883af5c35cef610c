"""Kill commands at random moments, resume them, and compare their results with an uninterrupted run's.

    python benchmarks/kill.py [--checkpoint NAME|FILE] [--rounds 3] [--images 40] [--seed 0] [--job NAME ...]

Each round kills a command one to three times, with SIGKILL, SIGTERM, SIGINT or SIGHUP, and then lets it finish. The
signal goes to the command, to one of its processes or to all of them. Moments are measured in CPU time, so that they do
not depend on how busy the machine is. The exit code is 1 if any result differs, a process outlives its command, a
traceback is printed, or a temporary file remains.
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
LOSSES = "--perceptual none --gan 0"
PACE = "--epochs 8 --batch-size 4 --workers 1 --save-every 2 --quiet -o out"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
CHANGING = ("metrics.jsonl", "state.safetensors", "state-previous.safetensors")
"""Files that also hold speeds and times."""
PATIENCE = 60
"""Seconds that processes have to end after their command, as each takes some on a busy machine."""


def jobs(checkpoint: str, images: int, data: Path) -> dict[str, list[str]]:
    """Return the commands by name; each writes to `out` in the current folder, and resumes if it is run again."""
    sample = [*VAR, "sample", "-c", "random", "-n", str(images), "-m", checkpoint, "--quiet", "--resume"]
    tokenizer = [*VAR, "train", "tokenizer", str(data), *SMALL.split(), *PACE.split(), *LOSSES.split()]
    transformer = [*VAR, "train", "transformer", str(data), "--tokenizer", checkpoint, "--depth", "1", *PACE.split()]
    outs = {"folder": "out/", "npz": "out.npz", "tar": "out.tar"}
    found = {f"sample {kind}": [*sample, "-o", out] for kind, out in outs.items()}
    found |= {"train tokenizer": tokenizer, "train transformer": transformer}
    return found | {f"{name}, 2 processes": [*command, "--nproc", "2"] for name, command in found.items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file in a folder that is the same after equal runs, by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in CHANGING)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def processes(folder: Path) -> dict[int, float]:
    """Return the processes that work in a folder, with the CPU seconds of each and its ended children."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if (process / "cwd").readlink() == folder:
                ticks = (process / "stat").read_text().rpartition(")")[2].split()[11:15]
                found[int(process.name)] = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return found


def begin(command: list[str], folder: Path) -> "subprocess.Popen[bytes]":
    """Start a command in a folder; its temporary folder and its standard error are beside it."""
    folder.mkdir(exist_ok=True)
    temporary = folder.with_suffix(".tmp")
    temporary.mkdir(exist_ok=True)
    environment = os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    with folder.with_suffix(".err").open("wb") as log:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
        )


def uninterrupted(name: str, command: list[str], folder: Path) -> tuple[float, float]:
    """Run a command; return its CPU seconds until its first file, and in all."""
    before, first = sum(os.times()[2:4]), 0.0
    process = begin(command, folder)
    while process.poll() is None:
        if not first and any(path.is_file() for path in folder.rglob("*")):
            first = sum(processes(folder).values())
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{name}: {folder.with_suffix('.err').read_text()}")
    return first, sum(os.times()[2:4]) - before


def interrupt(process: "subprocess.Popen[bytes]", folder: Path, moment: float, source: random.Random) -> list[str]:
    """Send a signal after this many CPU seconds of a command; return what was wrong with how it ended."""
    number, aim = source.choice(SIGNALS), source.choice(("the command", "one of its processes", "all of them"))
    while sum((alive := processes(folder)).values()) < moment and process.poll() is None:
        time.sleep(0.05)
    if process.poll() is not None:
        return []
    with suppress(ProcessLookupError):  # it ends just now
        if aim == "all of them":
            os.killpg(process.pid, number)
        else:
            os.kill(source.choice(list(alive)) if aim == "one of its processes" else process.pid, number)
    process.wait()
    printed = folder.with_suffix(".err").read_text(errors="replace")
    wrong = [f"a traceback after {number.name} to {aim}"] * ("Traceback" in printed)
    sys.stderr.write(printed if wrong else "")
    end = time.monotonic() + PATIENCE
    while (left := processes(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    for survivor in left:
        os.kill(survivor, signal.SIGKILL)
    return wrong + [f"a process outlived {number.name} to {aim}"] * bool(left)


def interrupted(
    command: list[str], folder: Path, first: float, seconds: float, source: random.Random
) -> tuple[int, list[str]]:
    """Run a command to its end with kills in between; return how often it was killed, and what was wrong."""
    wrong, killed = [], 0
    for _ in range(source.randint(1, 3)):
        process = begin(command, folder)
        wrong += interrupt(process, folder, source.uniform(source.choice((0, first)), seconds), source)
        killed += process.returncode != 0
        if process.returncode == 0:
            break
    process = begin(command, folder)
    if process.wait():
        wrong.append(f"exit code {process.returncode}: {folder.with_suffix('.err').read_text()[-300:]}")
    if left := list(folder.with_suffix(".tmp").glob(".varcli-*")):
        wrong.append(f"temporary files remain: {left[0].name}")
    return killed, wrong


def measure(name: str, command: list[str], rounds: int, source: random.Random, parent: Path) -> dict[str, object]:
    """Return one row of the table: how often a command was killed and how often the result was equal."""
    first, seconds = uninterrupted(name, command, parent / "alone")
    expected, equal, signals, wrong = contents(parent / "alone"), 0, 0, []
    for number in range(rounds):
        folder = parent / f"round{number}"
        killed, said = interrupted(command, folder, first, seconds, source)
        signals += killed
        wrong += said
        equal += contents(folder) == expected
        sys.stderr.write(f"{name}: round {number + 1} of {rounds}, killed {killed} times\n")
        shutil.rmtree(folder)
    if equal < rounds:
        wrong.append("results differ")
    return {"command": name, "rounds": rounds, "killed": signals, "equal": equal, "wrong": "; ".join(wrong) or "–"}


def main() -> None:
    """Run the loop and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="tiny64", help="name or file of the model for `var sample`")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each command")
    parser.add_argument("--images", type=int, default=40, help="images of each run of `var sample`")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    parser.add_argument("--job", action="append", help="only this row of the table; repeatable")
    given = parser.parse_args()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, also by child processes
    signal.signal(signal.SIGINT, signal.default_int_handler)
    source = random.Random(given.seed)
    checkpoint = str(Path(given.checkpoint).resolve()) if Path(given.checkpoint).is_file() else given.checkpoint
    with tempfile.TemporaryDirectory() as folder:
        parent = Path(folder).resolve()
        data = parent / "data"
        for label in ("one", "two"):
            (data / label).mkdir(parents=True)
            for i in range(6):  # noise, in a format that needs no library
                pixels = random.Random(f"{label}{i}").randbytes(20 * 20 * 3)
                (data / label / f"{i}.ppm").write_bytes(b"P6 20 20 255\n" + pixels)
        rows = []
        for number, (name, command) in enumerate(jobs(checkpoint, given.images, data).items()):
            if not given.job or name in given.job:
                (parent / str(number)).mkdir()
                rows.append(measure(name, command, given.rounds, source, parent / str(number)))
    print_rows(rows, as_json=False)
    sys.exit(any(row["wrong"] != "–" for row in rows))


if __name__ == "__main__":
    main()
