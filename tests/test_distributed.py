"""Several processes at one command: alone nothing is started, together they agree, and none outlives the others."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from varcli import distributed
from varcli.distributed import ProcessGroup, launched, process_group, report_error
from varcli.errors import InputError, RunError, UsageError
from varcli.files import temporary_name

pytestmark = pytest.mark.slow

TOGETHER = """
import torch
from varcli.distributed import process_group
with process_group() as group:
    assert group.is_main == (group.rank == 0)
    assert list(group.shard(range(7))) == ([0, 2, 4, 6] if group.is_main else [1, 3, 5])
    tensors = {"b": torch.tensor([1.5, group.rank], dtype=torch.float64), "a": torch.tensor(group.rank + 1)}
    sums = group.sum(tensors)
    assert sums["b"].tolist() == [3.0, 1.0] and sums["a"].item() == 3, sums
    assert tensors["b"].tolist() == [1.5, group.rank]
    assert group.gather([b"x" * group.rank] * 2) == ([[b""] * 2, [b"x"] * 2] if group.is_main else [])
    assert group.broadcast({"from": group.rank}) == {"from": 0}
    group.barrier()
"""


def launch(tmp_path, code, count=2, restarts=0, **changes):
    """Run a script as torchrun does."""
    (tmp_path / "script.py").write_text(code)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    words += [f"--max-restarts={restarts}", "script.py"]
    return subprocess.run(
        words, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"} | changes, capture_output=True, check=False
    )


def test_several_processes_agree(tmp_path):
    done = launch(tmp_path, TOGETHER)
    assert done.returncode == 0, done.stderr.decode()


KILLED = """
    import os, signal
    starts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if group.rank == starts:
        os.kill(os.getpid(), signal.SIGKILL)
    if starts < 2:
        group.barrier()
"""


def test_torchrun_starts_ranks_again(tmp_path):
    """Also where addresses of the ended ones are still in its store, which it keeps."""
    done = launch(tmp_path, TOGETHER + KILLED, restarts=2)
    assert done.returncode == 0, done.stderr.decode()


def test_one_process_needs_no_torch():
    code = (
        "import sys; from varcli.distributed import process_group\n"
        "with process_group() as group: print("
        "group.world_size, list(group.shard('ab')), group.gather(1), group.broadcast(2))\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.split(None, 1)[0] == b"1" and done.stdout.split(None, 1)[1].strip() == b"['a', 'b'] [1] 2"


def test_one_process_is_its_own_group():
    with process_group() as group:
        assert group == ProcessGroup(rank=0, world_size=1) and group.is_main
        assert group.device("auto") == "auto" and group.device("cuda:1") == "cuda:1"
        group.barrier()


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    group = ProcessGroup(rank=5, world_size=8, local_rank=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert group.device("auto") == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert group.device("auto") == group.device("cuda") == "cuda:1"
    assert group.device("cpu") == "cpu" and group.device("cuda:3") == "cuda:3"


@pytest.mark.parametrize(("gpus", "own"), [(8, 5), (2, 1), (1, 0)])
def test_processes_share_gpus_where_they_are_more(monkeypatch, gpus, own):
    """Or where a launcher shows each its own alone; what torch takes for current is the one that is named."""
    current = []
    numbers = {"RANK": "13", "WORLD_SIZE": "16", "LOCAL_RANK": "5"}
    for name, value in numbers.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(distributed, "end_with_parent", lambda: None)
    for name in TALK:
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)
    with process_group() as group:
        assert group.device("auto") == f"cuda:{own}"
    assert current == [f"cuda:{own}"]


TALK = ("init_process_group", "all_gather", "gather", "destroy_process_group")


def test_an_error_is_handed_up_only_to_a_launcher(tmp_path, monkeypatch):
    file = tmp_path / "error.json"
    assert not launched() and not report_error("no")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert not report_error("no")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launched(), "some clusters set it for everything"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launched() and report_error("yes")
    assert '"message": "yes"' in file.read_text()


def test_only_what_a_rank_of_this_run_signed_is_unpickled(tmp_path, monkeypatch):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    monkeypatch.setenv("VARCLI_KEY", "another run's")
    packed = distributed._packed(Malicious())
    monkeypatch.setenv("VARCLI_KEY", "this run's")
    with pytest.raises(RunError, match="was not sent by a process of this run"):
        distributed._unpacked(packed)
    assert not (tmp_path / "made").exists()
    assert distributed._unpacked(distributed._packed({"a": [1, b"x"]})) == {"a": [1, b"x"]}


@pytest.mark.parametrize(
    ("words", "outcome"),
    [
        (["--version"], 0),
        (["sample", "-c", "nonsense that is no class"], InputError),
        (["sample", "--no-such-option"], UsageError),
    ],
)
def test_the_launcher_answers_as_the_command_does(words, outcome, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / f"{temporary_name(tmp_path / 'private').replace(f'-{os.getpid()}-', '-4999999-')}"
    left.mkdir()
    distributed.remember_command_line(words)
    if outcome == 0:
        assert distributed.launch(2) == 0
    else:
        with pytest.raises(outcome):
            distributed.launch(2)
    assert list(tmp_path.iterdir()) == [], "its own folder goes, and what a killed launcher left"


@pytest.mark.parametrize(
    ("said", "kind", "message"),
    [
        (
            "[third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer",
            RunError,
            "another process ended",
        ),
        ("shapes differ", RuntimeError, "shapes differ"),
    ],
)
def test_a_lost_process_is_no_riddle(said, kind, message, monkeypatch, tmp_path):
    """Where a launcher does not end this process, it says that another one is gone; a bug stays a bug."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(distributed._RENDEZVOUS, str(tmp_path / "x"))
    monkeypatch.setattr(distributed, "launched", lambda: True)
    monkeypatch.setattr(distributed, "end_with_parent", lambda: None)
    monkeypatch.setattr(distributed, "_GRACE", 0.0)
    try:
        with pytest.raises(kind, match=message), distributed.process_group():
            raise RuntimeError(said)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("received", "saved"), [([signal.SIGTERM], True), ([], False), ([signal.SIGTERM, signal.SIGTERM], False)]
)
def test_ranks_may_save_when_told_to_end_but_not_after_a_failure(received, saved, monkeypatch, tmp_path):
    code = """
import signal, sys, time
from pathlib import Path
def save(number, frame):
    time.sleep(1)
    Path("saved").touch()
    sys.exit()
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""
    monkeypatch.setattr(distributed, "_GRACE", 0.1)
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE) as rank:
        rank.stdout.readline()
        distributed._end([rank], received)
    assert (tmp_path / "saved").exists() == saved


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads process states there")
def test_no_rank_outlives_its_launcher(tmp_path):
    code = """
import os, signal, time
from pathlib import Path
from varcli.distributed import process_group
with process_group() as group:
    Path(f"pid{group.rank}").write_text(str(os.getpid()))
    group.barrier()
    if group.is_main:
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
"""
    launch(tmp_path, code)
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
    assert all(ended(pid) for pid in pids)


def ended(pid, patience=20.0):
    """Return whether a process is gone, or waits for nobody to ask how it ended, within so many seconds."""
    import time

    for _ in range(int(patience * 10)):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False
