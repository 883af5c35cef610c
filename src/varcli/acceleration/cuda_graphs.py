"""How the steps of the scale loop are run: as they are, or as CUDA graphs recorded once for a size of batch.

A step is a function without arguments. Recorded, it becomes a list of kernels with fixed addresses, which the GPU
goes through without waiting for Python: in a small batch most of the time is Python's otherwise. Two things follow.
What distinguishes one batch from the next must come in through memory that stays where it is, and does so through
`admit`. And what a recorded step returns stays where it is: that is where the steps after it read it, and where the
next batch overwrites it.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from varcli.acceleration.devices import out_of_memory

Result = TypeVar("Result")

Record = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""Takes a step; returns what plays it again, and what it returned: memory that holds results once it was played."""


class Runner(Protocol):
    """Runs the steps of one batch after another."""

    def admit(self, name: str, given: Tensor, device: torch.device) -> Tensor:
        """What a batch brings along, from the host to the device, without waiting for the copy."""

    def run(self, name: str, step: Callable[[], Result]) -> Result:
        """What a step returns; its name says which of a batch's steps it is."""


class EagerRunner:
    """Runs each step as it is."""

    def admit(self, name: str, given: Tensor, device: torch.device) -> Tensor:
        """Return a copy on the device."""
        return pinned(given, device).to(device, non_blocking=True)

    def run(self, name: str, step: Callable[[], Result]) -> Result:
        """What a step returns."""
        return step()


class GraphRunner:
    """Runs each step as it is for the first batch, records it for the second, and from then on plays it.

    So single batches cost nothing extra, and what is recorded has been run: libraries are loaded, and have
    chosen their kernels. All batches must be of one size and go through the same steps in the same order.
    """

    def __init__(self, record: Record, failed: Callable[[RuntimeError], None]) -> None:
        """Take what records a step, and whom to tell when that cannot be done: all steps then run as they are."""
        self.record, self.failed = record, failed
        self.places: dict[str, Tensor] = {}
        self.known: set[str] = set()
        self.recordings: dict[str, tuple[Callable[[], None], Any]] = {}
        self.recording = True

    def admit(self, name: str, given: Tensor, device: torch.device) -> Tensor:
        """Return the place on the device that is kept for this, filled anew."""
        if name not in self.places:
            self.places[name] = torch.empty_like(given, device=device)
        return self.places[name].copy_(pinned(given, device), non_blocking=True)

    def run(self, name: str, step: Callable[[], Result]) -> Result:
        """What the step returns, to be used before the next batch begins.

        Raises:
            RuntimeError: memory ran out while it was recorded; a smaller batch may fit.
        """
        if name not in self.known or not self.recording:
            first = step()
            self.known.add(name)
            return first
        try:
            if name not in self.recordings:
                self.recordings[name] = self.record(step)
        except RuntimeError as error:
            # A step after one that runs as it is would read what that returned for this batch, for ever.
            self.recordings.clear()
            if out_of_memory(error):
                raise
            self.recording = False
            self.failed(error)
            return step()
        play, result = self.recordings[name]
        play()
        return result


def pinned(given: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host in memory that a GPU can fetch from by itself; torch keeps it until that is done."""
    return given.pin_memory() if device.type == "cuda" else given


def cuda_recorder(device: torch.device) -> Record:
    """What records steps as CUDA graphs that share one pool of memory.

    They may share it because all that one graph leaves for another is held in `GraphRunner.recordings`; the rest is
    free again after each of them. Other threads may go on using the GPU while one is recorded.
    """
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def record(step: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        try:
            # A capture that cannot be ended leaves its stream the current one: the middle context undoes that.
            with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)), capture:
                result = step()
        except RuntimeError as error:
            torch.cuda.synchronize(device)
            # Before 2.12 torch leaves this out where a capture breaks off, and then fails at giving memory back.
            with suppress(AttributeError, RuntimeError):
                index = torch.cuda.current_device() if device.index is None else device.index
                torch._C._cuda_endAllocateToPool(index, pool)
            if isinstance(error.__context__, RuntimeError):  # the step's; after it the capture could not be ended
                raise error.__context__ from None
            raise

        def play() -> None:
            with torch.cuda.device(device):  # a graph plays on the current device, whatever it was recorded on
                graph.replay()

        return play, result

    return record
