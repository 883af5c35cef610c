"""Python's garbage collector, which `var` pauses while it imports torch.

Importing makes hundreds of thousands of objects and no garbage. The collector looks through them again and again, and
once more when the process ends: together a third of the time that `import torch` takes.
"""

import gc
from threading import Event

_paused = Event()


def pause() -> None:
    """Collect nothing until `resume`."""
    gc.disable()
    _paused.set()


def resume() -> None:
    """Collect again if `pause` was called, but never what there is now."""
    if _paused.is_set():
        _paused.clear()
        gc.freeze()
        gc.enable()
