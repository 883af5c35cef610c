"""The one training loop, for both stages: resume, step, log, validate, save.

A run lives in a folder:

    state.safetensors    everything needed to go on (removed by nobody; only replaced atomically)
    metrics.jsonl        one line of figures every so often
    *.safetensors        the checkpoint others use, written by the stage
    samples/             images to look at
"""

import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from varcli.acceleration.devices import out_of_memory
from varcli.checkpoints.safetensors_io import load_header, load_tensors, save_tensors
from varcli.config import TrainingConfig
from varcli.distributed import ProcessGroup
from varcli.errors import CheckpointError, RunError, UsageError
from varcli.files import cannot_lock, cannot_write, parse_json
from varcli.images.dataset import in_words
from varcli.training import optim
from varcli.training.metrics_log import Metrics, MetricsLog
from varcli.training.optim import Tensors
from varcli.training.parallel import Rows, mean_over_ranks, rows_of_part, sum_over_ranks

BEFORE = {"perceptual": "lpips", "flip": False, "freeze": "", "adapter": "", "scale_weight": "mean", "init": None}
"""What runs had that were begun before these settings existed."""


class Stage(Protocol):
    """A stage of training: its losses, and what follows a step. `update` is the skeleton that both share."""

    device: torch.device
    group: ProcessGroup

    @property
    def training(self) -> TrainingConfig:
        """The recipe."""

    def batches(self, steps: range) -> Iterator[Any]:
        """Yield what each step of `steps` needs."""

    def prepare(self, batch: Any, step: int, steps: int) -> Sequence[Any]:
        """Set the schedules of a step, and split its batch into `training.accumulate` parts."""

    def add_gradients(self, part: Any, rows: Rows, last: bool) -> dict[str, Tensor]:
        """Add the gradients of a part of the batch, the `last` one or not; returns its figures, the loss among them."""

    def gradient_norm(self) -> Tensor:
        """The norm of all gradients together, which are clipped where the recipe clips them."""

    def apply_gradients(self, step: int, steps: int) -> None:
        """Let the optimizers step, then the moving average, then what else follows a step."""

    def clear_gradients(self) -> None:
        """Forget the gradients."""

    def validate(self) -> Metrics:
        """Return figures of the averaged weights on held-out images."""

    def tensors(self) -> Tensors:
        """Return the whole state."""

    def load_tensors(self, tensors: Tensors) -> None:
        """Set the state that `tensors` returned."""

    def save(self, folder: Path, figures: Metrics, step: int) -> None:
        """Write the checkpoint that others use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Where and how long to train. Nothing here changes the result."""

    folder: Path
    steps: int
    batch: int
    identity: dict[str, Any]
    """All that shapes the result; a run continues only where it is the same."""
    images: Mapping[str, int] = field(default_factory=dict)
    """Number of training images of each class, to say what has changed where the identity has."""
    log_every: int = 50
    validate_every: int = 1000
    save_every: int = 500
    preview: Callable[[Path, int], None] = field(default=lambda folder, step: None)
    """Draws images of the averaged weights into a folder."""
    report: Callable[[int, Metrics], None] = field(default=lambda step, figures: None)
    """Shows figures as they come."""
    note: Callable[[str], None] = field(default=lambda line: None)
    """Takes remarks for the user."""

    @property
    def state_file(self) -> Path:
        """The file a killed run continues from."""
        return self.folder / "state.safetensors"


def update(stage: Stage, batch: Any, step: int, steps: int) -> dict[str, Tensor]:
    """One step of training: schedule, gradients of the batch in parts, clipping, optimizer, moving average.

    Returns:
        Figures averaged over the parts and ranks. The loss is NaN, and the weights are as before, if it or a
        gradient is not finite.
    """
    training = stage.training
    optim.seed_step(training.seed, step)
    totals: dict[str, Tensor] = {}
    parts = stage.prepare(batch, step, steps)
    for number, part in enumerate(parts):
        if number:
            optim.seed_step(training.seed, step)  # each part draws for the whole batch
        rows = rows_of_part(training.batch, training.accumulate, number, stage.group)
        for name, value in stage.add_gradients(part, rows, number == len(parts) - 1).items():
            totals[name] = totals.get(name, torch.zeros((), device=stage.device)) + value.detach()
    means = mean_over_ranks([total / training.accumulate for total in totals.values()], stage.group)
    metrics = dict(zip(totals, means, strict=True))
    metrics["gradient_norm"] = stage.gradient_norm()
    if metrics["loss"].isfinite() and metrics["gradient_norm"].isfinite():
        stage.apply_gradients(step, steps)
    else:
        metrics["loss"] = torch.full_like(metrics["loss"], torch.nan)
    stage.clear_gradients()
    return metrics


class StopSignal:
    """Remembers Ctrl-C and SIGTERM while a step runs, so that the run can save before it ends."""

    def __enter__(self) -> "StopSignal":
        self.received = False
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:  # whoever asks twice does not want to wait
            raise KeyboardInterrupt
        self.received = True


CHECKPOINTS = ("model.safetensors", "tokenizer.safetensors")
"""What a run leaves for others, and what no other run may replace."""


def check_run(run: Run) -> int:
    """Check that the folder holds this very run, or none; returns the step it has come to. Nothing is changed.

    A run may be given more epochs than it was begun with: the schedules are then those of the longer run.

    Raises:
        UsageError: the folder holds a run with other settings or images, or a checkpoint without the run's state.
        CheckpointError: the run's state is damaged.
    """
    if not run.state_file.exists():
        finished = [name for name in CHECKPOINTS if (run.folder / name).exists()]
        if finished:
            raise UsageError(
                f"{run.folder} has a {finished[0]} and no state from which its run could go on, "
                "so training would replace it; use another --out"
            )
        return 0
    _, metadata = load_header(run.state_file)
    try:
        begun, step = BEFORE | parse_json(metadata["identity"]), int(metadata["step"])
        begun.setdefault("perceptual_weight", begun.get("lpips"))
        begun.setdefault("clip_grad", 2.0 if "gamma_init" in begun else 0.0)
        images = parse_json(metadata.get("images", "{}"))
        given = json.loads(json.dumps(run.identity))
        different = sorted(key for key in given if begun.get(key) != given[key])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(run, "it does not say which run's it is") from error
    longer = different == ["epochs"] and given["epochs"] > begun["epochs"]
    if "pictures" in different and images:
        raise UsageError(f"the run in {run.folder} was begun with {_other_images(images, run.images)}; use {_AGAIN}")
    if different and not longer:
        was = ", ".join(f"{key} {begun.get(key)!r} (now {given.get(key)!r})" for key in different[:3])
        raise UsageError(f"the run in {run.folder} was begun with {was}; use {_AGAIN}")
    return step


_AGAIN = "the same again, or another --out"


def _other_images(before: Mapping[str, int], now: Mapping[str, int]) -> str:
    """Say how the images of a run differ from those that are there now, from their numbers per class."""
    changed = [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]
    counts = [f"{name} {before.get(name, 0)} (now {now.get(name, 0)})" for name in sorted(changed)]
    what = f"{sum(before.values())} images (now {sum(now.values())})"
    return f"{what}: {in_words(counts)}" if counts else f"{what}, of which some had other names or sizes"


def resume(stage: Stage, run: Run) -> int:
    """Load the state of a run that was under way; returns the step to begin with.

    Raises:
        VarError: as `check_run`, or the state is another network's.
    """
    step = check_run(run)
    if run.state_file.exists():
        tensors, metadata = load_tensors(run.state_file)
        before, now = parse_json(metadata["identity"]).get("epochs"), run.identity.get("epochs")
        if before != now:
            run.note(f"going on from step {step} of {before:g} epochs, by the learning rates of {now:g} epochs")
        try:
            stage.load_tensors(tensors)
        except (KeyError, ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise
            raise _damaged(run, "its tensors are not those of this model") from error
    return step


def _damaged(run: Run, what: str) -> CheckpointError:
    return CheckpointError(f"the state {run.state_file} is damaged: {what}; use another --out")


def save_state(stage: Stage, run: Run, step: int) -> None:
    """Write the state to continue from, atomically."""
    metadata = {"step": str(step), "identity": json.dumps(run.identity, sort_keys=True)}
    metadata["images"] = json.dumps(run.images, sort_keys=True)
    save_tensors(run.state_file, stage.tensors(), metadata)


def train(stage: Stage, run: Run) -> Metrics:
    """Train from the beginning, or from where the folder's run stopped, to the end; return the last figures.

    To be called by all ranks; the main one writes the files. Ctrl-C and SIGTERM end the run after the step under way,
    with its state saved.

    Raises:
        RunError: the loss is not finite, memory does not suffice, or another run is under way in the folder;
            the last good checkpoint stays.
        UsageError: the folder holds a run with other settings, or a checkpoint that would be replaced.
        CheckpointError: the state of the folder's run is damaged.
    """
    make_folder(run.folder)
    with only_run(run.folder) if stage.group.is_main else nullcontext(), memory_explained(run.batch):
        return continue_run(stage, run, resume(stage, run))


def continue_run(stage: Stage, run: Run, start: int) -> Metrics:
    """Take the steps from `start` on; returns the last figures. A finished run has its checkpoint written anew."""
    group = stage.group
    log = MetricsLog(run.folder, start, run.batch) if group.is_main else None
    remaining = range(start, run.steps)
    if not remaining and log:
        conclude(stage, run, start)
    with StopSignal() as stop:
        for step, batch in zip(remaining, stage.batches(remaining), strict=True):
            done = step + 1
            metrics = update(stage, batch, step, run.steps)
            if not math.isfinite(metrics["loss"].item()):
                kept = f"; {run.folder} keeps the last good state" if run.state_file.exists() else ""
                raise RunError(f"the loss is not finite at step {done}{kept}; try a lower --base-lr in another --out")
            last = done == run.steps
            # A signal may reach one rank alone, or one a step earlier than another.
            stopping = bool(sum_over_ranks(torch.tensor(int(stop.received)), group)) and not last
            if log:
                log.add(metrics)
                record(stage, run, log, done, stopping)
            if stopping:
                group.barrier()  # the state is to be saved before any rank ends
                raise KeyboardInterrupt
    return group.broadcast(log.last if log else {})


def record(stage: Stage, run: Run, log: MetricsLog, done: int, stopping: bool) -> None:
    """Write what is due after a step: state, checkpoint, preview, figures."""
    last = done == run.steps
    validating = last or done % run.validate_every == 0
    if validating and not run.state_file.exists():
        save_state(stage, run, done)  # before the checkpoint, which without a state no run could replace
    if validating or done % run.log_every == 0:
        log.write(done, conclude(stage, run, done) if validating else {})
        run.report(done, log.last)
    if last or done % run.save_every == 0 or stopping:
        save_state(stage, run, done)


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Keep a second run out of a folder.

    Raises:
        RunError: one is under way there.
    """
    lock = FileLock(folder / "lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(f"another run is using {folder}; wait for it, or use another --out") from None
    except (OSError, NotImplementedError) as error:
        Path(lock.lock_file).unlink(missing_ok=True)
        raise cannot_lock(folder, error) from error
    with lock:
        yield


@contextmanager
def memory_explained(batch: int) -> Iterator[None]:
    """Say what to do when memory does not suffice.

    Raises:
        RunError: it did not.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise RunError(
            f"a batch of {batch} does not fit into memory; a larger --grad-accum computes it in parts"
        ) from error


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        RunError: the system refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error


def conclude(stage: Stage, run: Run, step: int) -> Metrics:
    """Validate, write the checkpoint and draw images; return the figures."""
    figures = stage.validate()
    stage.save(run.folder, figures | {"steps": run.steps}, step)
    images = run.folder / "samples"
    make_folder(images)
    run.preview(images, step)
    return figures


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """Return bf16 autocast for a device."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
