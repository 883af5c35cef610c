"""`var sample` by several processes: what one process leaves, whatever happens to one of them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import small
from support.fork_server import python
from support.provenances import listing
from support.threads import one_thread
from varcli import cli

pytestmark = pytest.mark.slow

CLASSES = "1,207,281,963,985"
posix = pytest.mark.skipif(not Path("/proc").exists(), reason="reads there which process is which")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("model") / "small.safetensors")


@pytest.fixture
def here(model, monkeypatch, tmp_path):
    """An empty folder, and the small model for every command in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VAR_CHECKPOINT", str(model))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with one_thread():
        yield tmp_path


def alone(*arguments):
    """Run `var sample` in this process."""
    assert cli.run(["sample", "--device", "cpu", *map(str, arguments)]) == 0


def begin(*arguments, executable=sys.executable):
    """Begin a `var sample` in processes of their own."""
    words = [executable, "-m", *arguments, "--device", "cpu"]
    return subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def shared(*arguments):
    """Run a `var sample` by two processes to its end; return exit code, stdout and stderr."""
    process = begin("varcli", "sample", *arguments, "--nproc", 2, executable=python())
    out, err = process.communicate()
    return process.returncode, out, err.decode()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_folder_and_a_sheet_are_those_of_one_process(here, capsysbinary):
    what = ("-c", CLASSES, "-n", 7, "--dtype", "fp32")  # 35 images: the last round is not full
    code, out, err = shared(*what, "-o", "two", "--grid", "two.png")
    assert (code, err) == (0, "var: also written: two.png\n")
    alone(*what, "-o", "one", "--grid", "one.png")
    assert contents("one") == contents("two") and len(contents("one")) == 35
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()
    assert out == capsysbinary.readouterr().out.replace(b"one/", b"two/")


def test_torchrun_streams_the_same(here, capsysbinary):
    what = ("-c", CLASSES, "-n", 4, "-o", "-", "--dtype", "fp32", "--quiet")
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    process = begin(*launcher, "varcli", "sample", *what)
    together = process.communicate()[0]
    alone(*what)
    assert process.returncode == 0 and together == capsysbinary.readouterr().out
    assert listing(here) == []


def test_a_mistake_is_one_line(here):
    code, out, err = shared("-c", "tench")
    assert (code, out, listing(here)) == (3, b"", [])
    assert err.startswith("var: error: this checkpoint does not know 0 tench; ") and err.count("\n") == 1


def rank(launcher, number):
    """Return the process id of one of a launcher's ranks."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(") ", 1)[1].split()[1])
            if parent == launcher and f"RANK={number}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:
            pass  # it has ended
    raise AssertionError(f"no rank {number}")


def wait_for(path, size, process):
    """Wait until a file has that many bytes."""
    for _ in range(4000):
        if path.exists() and path.stat().st_size > size:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{path} stays small")


@posix
def test_a_lost_share_is_made_good_by_any_number_of_processes(here):
    what = ("-c", CLASSES, "-n", 60, "-o", "x.npz", "--dtype", "fp32", "--quiet")
    process = begin("varcli", "sample", *what, "--nproc", 3)
    wait_for(Path("x.npz.part"), 20 * 16 * 16 * 3, process)
    os.kill(rank(process.pid, 1), signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == 5
    assert err.decode() == (
        "var: error: rank 1 of 3 was ended by SIGKILL; run the command again, with --resume to keep what is done\n"
    )
    before = Path("x.npz.part").read_bytes()
    assert shared(*what, "--resume") == (0, b"", "")
    resumed = contents(here)
    assert before[128:] in resumed[Path("x.npz")]
    alone(*what)
    assert contents(here) == resumed


@posix
@pytest.mark.parametrize(
    ("out", "begun", "size"),
    [("x.tar", "x.tar.part", 2**16), ("o", "o/1-goldfish-20.png", 0)],  # an .npz in the test above
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(here, capsys, out, begun, size):
    what = ("-c", CLASSES, "-n", 60, "-o", out, "--dtype", "fp32")
    process = begin("varcli", "sample", *what, "--quiet")
    wait_for(Path(begun), size, process)
    process.kill()
    process.communicate()
    alone(*what, "--resume", "--json")
    assert 0 < len(capsys.readouterr().out.splitlines()) < 300
    resumed = contents(here)
    alone(*what)
    assert contents(here) == resumed


def listening(pid):
    """Return the addresses, as hexadecimal, on which a process listens."""
    own = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    lines = [*Path("/proc/net/tcp").read_text().splitlines()[1:], *Path("/proc/net/tcp6").read_text().splitlines()[1:]]
    fields = [line.split() for line in lines]
    return {line[1].split(":")[0] for line in fields if line[3] == "0A" and f"socket:[{line[9]}]" in own}


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


@posix
def test_interrupt_reaches_all_and_says_how_to_go_on(here):
    process = begin("varcli", "sample", "-c", CLASSES, "-n", 200, "-o", "x.npz", "--nproc", 2)
    wait_for(Path("x.npz.part"), 20 * 16 * 16 * 3, process)
    others = [rank(process.pid, number) for number in (0, 1)]
    heard = set().union(*map(listening, [process.pid, *others]))
    assert heard and heard <= LOOPBACK, "nobody outside this machine can talk to them"
    assert listening(process.pid) == set()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and out == b""
    kept, interrupted = err.decode().splitlines()
    assert interrupted == "var: interrupted"
    assert re.search(r"x\.npz\.part keeps \d+ images?; the same command with --resume continues$", kept)
    assert not any(Path(f"/proc/{pid}").exists() for pid in others)
    assert listing(Path()) == ["x.npz.part", "x.npz.part.jsonl"]
