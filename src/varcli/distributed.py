"""Several processes for one command: launching ranks, and what they exchange.

`--nproc N` starts the very command line N times through torch's elastic launcher, so it is the same as
``torchrun --nproc-per-node N -m varcli …``, which also goes across machines. Each of them is a rank. The
first to fail ends all of them; its error is handed to the launcher, which prints it once.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from varcli.errors import RunError, VarError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


Item = TypeVar("Item")


def launched() -> bool:
    """Whether this process is one of several ranks, and so must not launch any itself."""
    return os.environ.keys() >= _NUMBERS and int(os.environ["WORLD_SIZE"]) > 1


_NUMBERS = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
"""The variables that a launcher sets for each rank."""


# --- launching ranks ---------------------------------------------------------------------------------


def remember_command_line(words: Sequence[str]) -> None:
    """Remember the command line, for `launch`."""
    _command_line[:] = words


_command_line: list[str] = []


def launch(count: int) -> int:
    """Run the command line that is being run as `count` ranks on this machine; return the exit code.

    They share the cores, unless OMP_NUM_THREADS says how many threads each is to have. Whatever ends this
    process but SIGKILL ends them with it.

    Raises:
        VarError: what the first of them to fail raised.
        KeyboardInterrupt: Ctrl-C, which reached all of them.
    """
    import logging
    from tempfile import TemporaryDirectory

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable()  # what the launcher says of failing ranks; they speak for themselves
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // count)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with TemporaryDirectory(prefix="varcli-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id="varcli",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "varcli", *_command_line)
        except ChildFailedError as error:
            return _exit_code(error, count)
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from error
            return 128 + int(error.sigval)
    return 0


def _cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _exit_code(error: "ChildFailedError", count: int) -> int:
    """Return the exit code of the first rank that failed, or raise what it raised."""
    rank, first = error.get_first_failure()
    if first.exitcode < 0:
        what = f"process {rank} of {count} was ended by {first.signal_name()}"
        raise RunError(f"{what}; run the command again, with --resume to keep what is done") from error
    kinds = {kind.exit_code: kind for kind in VarError.__subclasses__()}
    if first.exitcode in kinds and isinstance(first.message, dict):
        raise kinds[first.exitcode](first.message["message"]) from error
    return first.exitcode


def report_error(message: str) -> bool:
    """Leave an error for the launcher; False where there is none, and the error must be printed here."""
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not launched() or not place:
        return False
    details = {"timestamp": str(int(time.time())), "py_callstack": message}
    Path(place).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}), encoding="utf-8")
    return True


# --- what ranks exchange -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """The ranks that work on one command.

    What they exchange is to be exchanged by all of them: each calls `sum`, `gather`, `broadcast` and `barrier`
    as often as the others and in the same order. torch pickles objects on the way; none of that is stored.
    """

    rank: int = 0
    """Number of this process, from 0."""
    world_size: int = 1
    """Number of processes, on all machines."""
    local_rank: int = 0
    """Number of this process on its machine."""

    @property
    def is_main(self) -> bool:
        """Whether this rank talks to the user and owns the files."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """Return the name of this process's device: of several GPUs, each process has its own.

        They share them if they are more. A launcher may show each its own alone, as the only one there is.
        """
        if self.world_size == 1 or name not in ("auto", "cuda"):
            return name
        import torch

        return f"cuda:{self.local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else name

    def shard(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield this rank's items: every `world_size`-th, beginning with number `rank`."""
        return islice(items, self.rank, None, self.world_size)

    def sum(self, tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
        """Each tensor's sum over all ranks."""
        sums = {name: tensor.clone() for name, tensor in tensors.items()}
        if self.world_size > 1:
            import torch.distributed as dist

            with _others_expected():
                for name in sorted(sums):
                    dist.all_reduce(sums[name])
        return sums

    def gather(self, item: Item) -> list[Item]:
        """All ranks' items in order for the main rank, nothing for the others."""
        if self.world_size == 1:
            return [item]
        import torch.distributed as dist

        items: list[Any] | None = [None] * self.world_size if self.is_main else None
        with _others_expected():
            dist.gather_object(item, items)
        return items or []

    def broadcast(self, item: Item) -> Item:
        """The main rank's item, for all."""
        if self.world_size == 1:
            return item
        import torch.distributed as dist

        items = [item]
        with _others_expected():
            dist.broadcast_object_list(items)
        return items[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather(None)


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Join the ranks that work on this command.

    Without a launcher it is alone, and torch.distributed is not touched. CPU tensors go through gloo,
    those on GPUs through NCCL.
    """
    if not launched():
        yield ProcessGroup()
        return
    import torch
    import torch.distributed as dist

    group = ProcessGroup(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    backend = "gloo"
    if torch.cuda.is_available() and dist.is_nccl_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(group.device("cuda"))
    _end_with_launcher()
    with _others_expected():
        dist.init_process_group(backend, timeout=_PATIENCE)
    yield group
    with _others_expected():
        group.barrier()  # whoever leaves earlier takes the connection along
        dist.destroy_process_group()


_PATIENCE = timedelta(days=1)
"""How long one process waits for another: for good, the launcher notices sooner when one fails."""


@contextmanager
def _others_expected() -> Iterator[None]:
    """Wait for the launcher's end where another process is gone: its error is the one to be told.

    Raises:
        RunError: no launcher ended this process.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in ("gloo", "NCCL", "TCPStore", "onnect")):
            raise
        time.sleep(_GRACE)
        raise RunError("another process ended early; see its error, and run the command again") from error


_GRACE = 30.0
"""Seconds in which a launcher should have noticed; it looks ten times a second."""


def _end_with_launcher() -> None:
    """Keep this process from working on when its launcher was killed."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
