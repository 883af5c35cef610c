"""Several processes for one command: launching ranks, and what they exchange.

`--nproc N` starts the very command line N times on this machine. Each of these processes is a rank. They find
each other through a file in a folder that only this user can enter, talk over the loopback interface, and sign
what they send with a key that only they know. The first to fail ends all of them; its error is handed to the
launcher, which prints it once.

``torchrun … -m varcli`` starts ranks too, also on several machines. Then torch's own rendezvous is used, which
listens on the network, without a password.
"""

import hmac
import json
import os
import pickle
import secrets
import signal
import subprocess
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

from varcli.errors import RunError, UsageError, VarError
from varcli.files import private_folder

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store  # type: ignore[attr-defined]  # public all the same


Item = TypeVar("Item")


def launched() -> bool:
    """Whether this process is one of several ranks, and so must not launch any itself."""
    return os.environ.keys() >= _NUMBERS and int(os.environ["WORLD_SIZE"]) > 1


_NUMBERS = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
"""The variables that a launcher sets for each rank."""


# --- launching ranks ---------------------------------------------------------------------------------


def remember_command_line(words: Sequence[str]) -> None:
    """Store the command line for `launch`."""
    _command_line[:] = words


_command_line: list[str] = []


RANKS_PER_CORE = 4
"""More than one a core gains nothing, but a few more are harmless; hundreds would make the machine unusable."""


def launch(count: int) -> int:
    """Run the command line that is being run as `count` ranks on this machine; return the exit code.

    They share the cores, unless OMP_NUM_THREADS says how many threads each is to have. Whatever ends this
    process ends them with it.

    Raises:
        UsageError: there are far more of them than cores.
        VarError: what the first of them to fail raised.
        KeyboardInterrupt: Ctrl-C, which reached all of them.
    """
    most = RANKS_PER_CORE * cores()
    if count > most:
        raise UsageError(
            f"--nproc {count} is too much for this machine, since each process loads the model: give the number of "
            f"GPUs or of cores ({cores()} here), and {most} at most"
        )
    with private_folder() as folder:
        settings = {
            "WORLD_SIZE": str(count),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // count))),
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
            _RENDEZVOUS: str(folder / "rendezvous"),
            _KEY: secrets.token_hex(32),
        }
        if sys.platform in _LOOPBACK:
            settings |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), _LOOPBACK[sys.platform])
        command = [sys.executable, "-m", "varcli", *_command_line]
        errors = [folder / f"error{rank}.json" for rank in range(count)]
        ranks: list[subprocess.Popen[bytes]] = []
        with _signals() as received:
            try:
                for rank, error in enumerate(errors):
                    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), _ERROR_FILE: str(error)}
                    # In a session of its own: Ctrl-C reaches it through this process, once.
                    ranks.append(subprocess.Popen(command, env=os.environ | settings | own, start_new_session=True))
                failed = _first_failure(ranks, received)
            finally:
                _end(ranks, received)
        if received:
            if received[0] == signal.SIGINT:
                raise KeyboardInterrupt
            return 128 + received[0]
        return 0 if failed is None else _exit_code(failed, count, ranks[failed].returncode, errors[failed])


_RENDEZVOUS, _KEY = "VARCLI_RENDEZVOUS", "VARCLI_KEY"
"""The variables in which the launcher gives its ranks the rendezvous file, and the key that signs what they send."""
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""The variable that says where a rank leaves its error; torchrun's name for it, as the file is in its format."""
_LOOPBACK = {"linux": "lo", "darwin": "lo0"}
"""The loopback interface, by system."""


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Yield the list that the signals which would end this process are added to instead."""
    received: list[int] = []
    kept = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores one
            kept[number] = signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _first_failure(ranks: Sequence[subprocess.Popen[bytes]], received: Sequence[int]) -> int | None:
    """Wait until all ranks have ended, one has failed or a signal was received; return the rank that failed."""
    while not received:
        codes = [rank.poll() for rank in ranks]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed or None not in codes:
            return failed[0] if failed else None
        time.sleep(0.05)
    return None


def _end(ranks: Sequence[subprocess.Popen[bytes]], received: Sequence[int]) -> None:
    """End the ranks that still run: with a signal, then, after a while or at a second signal, by killing them.

    Args:
        ranks: all of them.
        received: signals so far, to which more may be added; the ranks get the first, or SIGTERM after a failure.
    """
    number = received[0] if received else signal.SIGTERM
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number) if os.name != "nt" else rank.terminate()
    deadline = time.monotonic() + (_SAVING if received else _GRACE)
    while None in [rank.poll() for rank in ranks] and time.monotonic() < deadline and len(received) < 2:
        time.sleep(0.05)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
            rank.wait()


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _exit_code(rank: int, count: int, code: int, error: Path) -> int:
    """Return the exit code of a rank that failed, or raise what it raised."""
    if code < 0:
        what = f"rank {rank} of {count} was ended by {signal.Signals(-code).name}"
        how = ", with --resume to keep what is done" if _command_line[:1] == ["sample"] else " to resume"
        raise RunError(f"{what}; run the command again{how}")
    kinds = {kind.exit_code: kind for kind in VarError.__subclasses__()}
    if code in kinds and error.exists():
        raise kinds[code](json.loads(error.read_text(encoding="utf-8"))["message"]["message"])
    return code


def report_error(message: str) -> bool:
    """Hand an error to the launcher; False where there is none, and the error must be printed here."""
    file = os.environ.get(_ERROR_FILE)
    if not launched() or not file:
        return False
    details = {"timestamp": str(int(time.time())), "py_callstack": message}
    Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}), encoding="utf-8")
    return True


# --- what ranks exchange -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """The ranks that work on one command.

    Exchanges are collective: all ranks must call `sum`, `gather`, `broadcast` and `barrier` equally often and in the
    same order. Objects are pickled on the way, and unpickled only if signed with the launcher's key; nothing is stored.
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

        With more processes than GPUs they share them. A launcher may make only one GPU visible to each.
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

            for name in sorted(sums):
                dist.all_reduce(sums[name])
        return sums

    def gather(self, item: Item) -> list[Item]:
        """All ranks' items in order for the main rank, nothing for the others."""
        if self.world_size == 1:
            return [item]
        import torch
        import torch.distributed as dist

        mine = _packed(item)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(mine)]))
        longest = max(int(size) for size in sizes)
        mine = torch.nn.functional.pad(mine, (0, longest - len(mine)))
        shares = [torch.empty_like(mine) for _ in sizes] if self.is_main else None
        dist.gather(mine, shares)
        return [_unpacked(share[: int(size)]) for share, size in zip(shares or [], sizes, strict=False)]

    def broadcast(self, item: Item) -> Item:
        """The main rank's item, for all."""
        if self.world_size == 1:
            return item
        import torch
        import torch.distributed as dist

        packed = _packed(item) if self.is_main else None
        size = torch.tensor([0 if packed is None else len(packed)])
        dist.broadcast(size, 0)
        if packed is None:
            packed = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(packed, 0)
        return item if self.is_main else _unpacked(packed)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather(None)


def _packed(item: Any) -> "Tensor":
    """An object as signed bytes."""
    import torch

    content = pickle.dumps(item)
    return torch.frombuffer(bytearray(_signature(content) + content), dtype=torch.uint8)


def _unpacked(packed: "Tensor") -> Any:
    """The object in signed bytes.

    Raises:
        RunError: another rank did not send them.
    """
    content = packed.numpy().tobytes()
    signature, content = content[:_SIGNATURE], content[_SIGNATURE:]
    if not hmac.compare_digest(signature, _signature(content)):
        raise RunError("what arrived was not sent by a process of this run; run the command again")
    return pickle.loads(content)


def _signature(content: bytes) -> bytes:
    return hmac.digest(os.environ.get(_KEY, "").encode(), content, "sha256")


_SIGNATURE = 32
"""Bytes of a signature."""


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Join the ranks that work on this command.

    Without a launcher it is alone, and torch.distributed is not touched. CPU tensors go through gloo,
    those on GPUs through NCCL.

    Raises:
        RunError: another process is gone, and no launcher ended this one.
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
    end_with_parent()
    rendezvous = os.environ.get(_RENDEZVOUS)
    store: Store | None = None
    try:
        if rendezvous:  # ours; torchrun uses other variables
            store = dist.FileStore(rendezvous, group.world_size)  # type: ignore[attr-defined]  # public all the same
            store.set_timeout(_PATIENCE)
        elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = _store_of_this_start(group)
        dist.init_process_group(backend, timeout=_PATIENCE, store=store, rank=group.rank, world_size=group.world_size)
        yield group
        group.barrier()  # a rank that ended earlier would close the connection
        dist.destroy_process_group()
    except RuntimeError as error:
        if not any(word in str(error) for word in ("gloo", "NCCL", "TCPStore", "onnect")):
            raise
        time.sleep(_GRACE)  # the launcher ends this process: the other's error is the one to be reported
        raise RunError("another process ended early; see its error, and run the command again") from error


_PATIENCE = timedelta(days=1)
"""How long one process waits for another: practically forever, as the launcher notices sooner when one fails."""


def _store_of_this_start(group: ProcessGroup) -> "Store":
    """Return torchrun's store, under a prefix that the ranks of this start share.

    `torchrun --max-restarts` keeps its store, in which new ranks would read the addresses of ended ones and try to
    connect to these (https://github.com/pytorch/pytorch/issues/135712). Its count of restarts is no prefix: machines
    count their own. So the main rank hands out a random one, as answer to a random number of each other rank, and again
    until it was taken: a number may be that of an ended rank, an answer never is.
    """
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # public all the same

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=_PATIENCE)
    if not group.is_main:
        question = secrets.token_hex(16)
        store.set(f"varcli/rank{group.rank}", question)
        prefix = store.get(f"varcli/{question}").decode()
        store.set(f"{prefix}/taken{group.rank}", "")
        return PrefixStore(prefix, store)
    prefix = f"varcli/{secrets.token_hex(16)}"
    for rank in range(1, group.world_size):
        while not store.check([f"{prefix}/taken{rank}"]):
            question = store.get(f"varcli/rank{rank}").decode()
            store.set(f"varcli/{question}", prefix)
            time.sleep(0.05)
    return PrefixStore(prefix, store)


_GRACE = 30.0
"""Seconds in which the launcher should notice a failure, and in which the other ranks must then end."""
_SAVING = 600.0
"""Seconds in which a rank must end when told to. It finishes a step first, and saves a state of many gigabytes."""


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Send this process a signal when the one that started it was killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()
