"""Images on their way into a place, while the next ones are made.

Worker threads encode them (zlib lets others compute meanwhile), and one more thread puts them down in the
order in which they were taken. Only so many are under way that memory stays flat.
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
    """Whatever a caller knows of an image."""

    @property
    def provenance(self) -> Provenance:
        """What its file says of it."""


Item = TypeVar("Item", bound=Made)


class AsyncWriter(Generic[Item]):
    """Puts images into an open output; a context manager, to be left before the output is closed.

    What goes wrong in its threads is raised where the next image is given, or at the end.
    """

    def __init__(self, output: Sink, placed: Callable[[Item, "Path | None"], None], ahead: int) -> None:
        """Take where images go, what to call when one is there, and how many may be under way."""
        self._output, self._placed = output, placed
        self._waiting: Queue[tuple[Item, Any] | None] = Queue(ahead)
        self._encoders = ThreadPoolExecutor(thread_name_prefix="encoder")
        self._error: BaseException | None = None
        self._thread = Thread(target=self._put_all, name="writer", daemon=True)
        self._thread.start()

    def prepare(self, item: Item, pixels: "Pixels") -> "Future[Any]":
        """Return what will be the image, encoded; in another process than the one that puts it, if need be."""
        return self._encoders.submit(self._output.prepare, pixels, item.provenance)

    def put(self, item: Item, prepared: Any) -> None:
        """Take the next image, once there is room for it, as `prepare` returned it or the result of that."""
        self._raise()
        self._waiting.put((item, prepared))

    def wait(self) -> None:
        """Return when every image taken is in its place."""
        self._waiting.join()
        self._raise()

    def __enter__(self) -> "AsyncWriter[Item]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        deadline = None if kind is None else monotonic() + _GRACE  # what was made is kept, unless nobody takes it
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
"""Seconds for the last images to be put down when the run is ended early: a pipe may take nothing any more."""
