"""How long the phases of a run take, told by the device's own clock where it has one."""

import time
from itertools import pairwise
from typing import Any

import torch

from varcli.sampling.devices import synchronize


class Stopwatch:
    """Runs from when it is made; on CUDA it marks moments in the stream, so that nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phases: list[str] = []
        synchronize(device)
        self._moments = [self._now()]

    def mark(self, phase: str) -> None:
        """Note that this phase ends now."""
        self.phases.append(phase)
        self._moments.append(self._now())

    def seconds(self) -> list[float]:
        """Return how long each phase took, in the order they ended."""
        synchronize(self.device)
        pairs = pairwise(self._moments)
        if self.device.type == "cuda":
            return [begin.elapsed_time(end) / 1000 for begin, end in pairs]
        return [end - begin for begin, end in pairs]

    def _now(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        synchronize(self.device)
        return time.perf_counter()
