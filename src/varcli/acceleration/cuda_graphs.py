"""Two ways to run the steps of the scale loop: as they are, or as CUDA graphs, captured once per batch size.

A step is a function without arguments. Captured, it becomes a list of kernels with fixed addresses, which the GPU
replays without waiting for Python: with small batches most of the time is Python's otherwise. Two things follow. What
distinguishes one batch from the next must come in through memory that stays where it is; `copy_in` does that. And what
a captured step returns stays where it is too: later steps read it there, and the next batch overwrites it.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from varcli.acceleration.devices import out_of_memory

Result = TypeVar("Result")

Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""Captures a step; returns what replays it, and what the step returned: memory that holds results after a replay."""


class Runner(Protocol):
    """Runs the steps of one batch after another."""

    def copy_in(self, name: str, given: Tensor, device: torch.device) -> Tensor:
        """Copy a batch's own data from the host to the device, without waiting for the copy."""

    def run(self, name: str, step: Callable[[], Result]) -> Result:
        """What a step returns; its name says which of a batch's steps it is."""


class EagerRunner:
    """Runs each step as it is."""

    def copy_in(self, name: str, given: Tensor, device: torch.device) -> Tensor:
        """Return a copy on the device."""
        return pinned(given, device).to(device, non_blocking=True)

    def run(self, name: str, step: Callable[[], Result]) -> Result:
        """What a step returns."""
        return step()


class GraphRunner:
    """Runs each step as it is for the first batch, captures it for the second, and replays it from then on.

    So single batches cost nothing extra, and a step has run before it is captured: libraries are loaded, and have
    chosen their kernels. All batches must be of one size and go through the same steps in the same order.
    """

    def __init__(self, capture: Capture, failed: Callable[[RuntimeError], None]) -> None:
        """Take what captures a step, and what to call when that fails: all steps then run as they are."""
        self.capture, self.failed = capture, failed
        self.buffers: dict[str, Tensor] = {}
        self.run_before: set[str] = set()
        self.graphs: dict[str, tuple[Callable[[], None], Any]] = {}
        self.capturing = True

    def copy_in(self, name: str, given: Tensor, device: torch.device) -> Tensor:
        """Fill the buffer on the device that is kept for this, and return it."""
        if name not in self.buffers:
            self.buffers[name] = torch.empty_like(given, device=device)
        return self.buffers[name].copy_(pinned(given, device), non_blocking=True)

    def run(self, name: str, step: Callable[[], Result]) -> Result:
        """What the step returns, to be used before the next batch begins.

        Raises:
            RuntimeError: memory ran out during the capture; a smaller batch may fit.
        """
        if name not in self.run_before or not self.capturing:
            first = step()
            self.run_before.add(name)
            return first
        try:
            if name not in self.graphs:
                self.graphs[name] = self.capture(step)
        except RuntimeError as error:
            # A captured step after one that runs as it is would read this batch's results forever.
            self.graphs.clear()
            if out_of_memory(error):
                raise
            self.capturing = False
            self.failed(error)
            return step()
        replay, result = self.graphs[name]
        replay()
        return result


def pinned(given: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor in pinned memory, which a GPU reads by itself; torch keeps it until that is done."""
    return given.pin_memory() if device.type == "cuda" else given


def cuda_capture(device: torch.device) -> Capture:
    """Return a function that captures steps as CUDA graphs, which share one memory pool.

    They may share it because `GraphRunner.graphs` holds all that one graph leaves for another; the rest is free again
    after each of them. Other threads may use the GPU during a capture.
    """
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def capture(step: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        graph = torch.cuda.CUDAGraph()
        context = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        try:
            # If a capture cannot be ended, its stream stays the current one: the middle context undoes that.
            with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)), context:
                result = step()
        except RuntimeError as error:
            torch.cuda.synchronize(device)
            # Before 2.12 torch leaves this out when a capture fails, and then cannot give memory back.
            with suppress(AttributeError, RuntimeError):
                index = torch.cuda.current_device() if device.index is None else device.index
                torch._C._cuda_endAllocateToPool(index, pool)
            if isinstance(
                error.__context__, RuntimeError
            ):  # the step's error, after which the capture could not be ended
                raise error.__context__ from None
            raise

        def replay() -> None:
            with torch.cuda.device(device):  # a graph runs on the current device, whichever it was captured on
                graph.replay()

        return replay, result

    return capture
