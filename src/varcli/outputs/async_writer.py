"""Writing images to a sink while the next ones are sampled.

Worker threads encode them (zlib releases the interpreter lock), and one more thread writes them in the order in which
they came. Their number is limited, so that memory stays flat.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Full, Queue
from threading import Thread
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from varcli.images.provenance import Provenance
from varcli.outputs.sinks import Sink

if TYPE_CHECKING:
    from pathlib import Path

    from varcli.images.provenance import Pixels


class Made(Protocol):
    """An image as its caller knows it."""

    @property
    def provenance(self) -> Provenance:
        """What its file will say."""


Item = TypeVar("Item", bound=Made)


class AsyncWriter(Generic[Item]):
    """Writes images to an open sink; a context manager, to be left before the sink is closed.

    An error in its threads is raised when the next image is given, or at the end.
    """

    def __init__(self, output: Sink, placed: Callable[[Item, "Path | None"], None], ahead: int) -> None:
        """Take the sink, what to call for each image written, and how many may be under way."""
        self._output, self._placed = output, placed
        self._waiting: Queue[tuple[Item, Any] | None] = Queue(ahead)
        self._encoders = ThreadPoolExecutor(thread_name_prefix="encoder")
        self._error: BaseException | None = None
        self._thread = Thread(target=self._put_all, name="writer", daemon=True)
        self._thread.start()

    def prepare(self, item: Item, pixels: "Pixels") -> "Future[Any]":
        """The encoded image, as a future; another rank may put it."""
        return self._encoders.submit(self._output.prepare, pixels, item.provenance)

    def put(self, item: Item, prepared: Any) -> None:
        """Queue the next image, when there is room: what `prepare` returned, or its result."""
        self._raise()
        self._waiting.put((item, prepared))

    def wait(self) -> None:
        """Wait until every queued image is written."""
        self._waiting.join()
        self._raise()

    def __enter__(self) -> "AsyncWriter[Item]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # After an error finished images are still written, unless nothing reads the pipe.
        deadline = None if kind is None else monotonic() + _GRACE
        with suppress(Full):
            self._waiting.put(None, timeout=_left(deadline))
        self._thread.join(_left(deadline))
        self._encoders.shutdown(wait=kind is None, cancel_futures=True)
        if kind is None:
            self._raise()

    def _put_all(self) -> None:
        while taken := self._waiting.get():
            if self._error is None:
                try:
                    item, prepared = taken
                    content = prepared.result() if isinstance(prepared, Future) else prepared
                    self._placed(item, self._output.put(content, item.provenance))
                except BaseException as error:  # for the main thread to raise
                    self._error = error
            self._waiting.task_done()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def _left(deadline: float | None) -> float | None:
    """Return the seconds until then, never less than 0; None where there is no end."""
    return None if deadline is None else max(0.0, deadline - monotonic())


_GRACE = 10.0
"""Seconds to write the last images when the run ends early: a pipe may no longer be read."""
