"""The one training loop, for both stages: resume, step, log, validate, save.

A run lives in a folder:

    state.safetensors    everything needed to resume (never removed, only replaced atomically)
    state-previous.safetensors   the state before that one, in case it is damaged
    metrics.jsonl        one line of figures every so often
    *.safetensors        the checkpoint others use, written by the stage
    samples/             images to look at
"""

import json
import math
import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, TypeVar

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from varcli.acceleration.devices import out_of_memory, peak_bytes
from varcli.checkpoints.safetensors_io import load_header, load_tensors, save_tensors, tensors_sha256
from varcli.config import (
    TokenizerConfig,
    TokenizerTrainingConfig,
    TrainingConfig,
    TransformerTrainingConfig,
    option_names,
)
from varcli.console import counted, in_words
from varcli.distributed import ProcessGroup
from varcli.errors import CheckpointError, InputError, RunError, UsageError
from varcli.files import cannot_lock, cannot_write, parse_json
from varcli.training import optim
from varcli.training.data import reader_failures
from varcli.training.metrics_log import Metrics, MetricsLog
from varcli.training.optim import Tensors
from varcli.training.parallel import Rows, gather_on_main, mean_over_ranks, rows_of_part, sum_over_ranks

BEFORE = {"perceptual": "lpips", "flip": False, "freeze": "", "adapter": "", "scale_weight": "mean", "init": None}
BEFORE |= {"commitment": 0.25, "cca": 0.0, "cca_beta": 0.02, "scale_drop": 0.0}
"""Values of these settings in runs that began before the settings existed."""


class Stage(Protocol):
    """A stage of training: its losses, and what follows a step. `update` is the skeleton that both share."""

    device: torch.device
    group: ProcessGroup
    average: optim.MovingAverage[Any]
    optimizer: torch.optim.AdamW

    @property
    def training(self) -> TrainingConfig:
        """The recipe."""

    def batches(self, steps: range) -> Generator[Any, None, None]:
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
        """Clear the gradients."""

    def observe(self, step: int) -> dict[str, Tensor]:
        """Return figures of the state after a logged step, the same on all ranks; vectors hold one per scale."""

    def validate(self) -> Metrics:
        """Return figures of the averaged weights on held-out images, on the main rank. To be called by all."""

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
    copies: float = 0.0
    """Part of the training images that are exact duplicates of others, for `var train status`."""
    log_every: int = 50
    validate_every: int = 1000
    save_every: int = 500
    eval_every: int = 0
    """0 measures nothing."""
    evaluate: Callable[[], Metrics] = dict
    """Measures the checkpoint that was written last; called by all ranks, the main one gets the figures."""
    preview: Callable[[Path, int], None] = field(default=lambda folder, step: None)
    """Draws images of the averaged weights into a folder."""
    report: Callable[[int, Metrics], None] = field(default=lambda step, figures: None)
    """Shows figures as they come."""
    after_step: Callable[[int, float], None] = field(default=lambda step, loss: None)
    """Called after each step, with its number and loss."""
    note: Callable[[str], None] = field(default=lambda line: None)
    """Takes remarks for the user."""

    @property
    def state_file(self) -> Path:
        """The file a killed run continues from."""
        return self.folder / STATE

    @property
    def previous_state_file(self) -> Path:
        """The state before it."""
        return self.folder / PREVIOUS_STATE


STATE, PREVIOUS_STATE = "state.safetensors", "state-previous.safetensors"


def state_files(folder: Path) -> list[Path]:
    """The states that a run's folder has, the newest first. A kill while one is written leaves only the one before."""
    return [file for file in (folder / STATE, folder / PREVIOUS_STATE) if file.exists()]


def begun_in_bf16(folder: Path) -> bool | None:
    """Whether the run in a folder began in bf16; None where there is none, or its state does not say."""
    for file in state_files(folder):
        with suppress(CheckpointError, LookupError, ValueError, TypeError):
            return bool(parse_json(load_header(file)[1]["identity"])["bf16"])
    return None


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
        self.received = 0  # the signal's number
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.received and isinstance(error, RuntimeError):
            signal.raise_signal(self.received)  # another rank is gone, so no step will end, and a launcher waits

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:  # a second signal: the user does not want to wait
            raise KeyboardInterrupt
        self.received = number


TERMINATED = 128 + signal.SIGTERM
"""The exit code of a run that SIGTERM ended, as a shell reports it."""
CHECKPOINTS = ("model.safetensors", "tokenizer.safetensors")
"""What a run leaves for others, and what no other run may replace."""


def check_run(run: Run) -> int:
    """Check that the folder holds this very run, or none; returns the step it has come to. Nothing is changed.

    A run may be given another number of epochs than it was begun with: its learning rates are then those of that length
    from there on. It must not have come so far already, or it would end without its last, small learning rates.

    Raises:
        UsageError: the folder holds a run with other settings or images, or a checkpoint without the run's state.
        CheckpointError: the run's states are damaged.
    """
    if not state_files(run.folder):
        finished = [name for name in CHECKPOINTS if (run.folder / name).exists()]
        if finished:
            raise UsageError(
                f"{run.folder} has a {finished[0]} and no state from which its run could resume, "
                "so training would replace it; use another --out"
            )
        return 0
    return from_newest_state(run.folder, lambda file: check_state(file, run))


State = TypeVar("State")


def from_newest_state(folder: Path, read: Callable[[Path], State]) -> State:
    """Return what `read` makes of the newest state or, where that is damaged, of the one before it.

    Raises:
        CheckpointError: there is none that is whole.
    """
    *newer, oldest = state_files(folder)
    for file in newer:
        with suppress(CheckpointError):
            return read(file)
    return read(oldest)


def check_state(file: Path, run: Run) -> int:
    """Check that a state is of this very run; returns its step. No tensors are read.

    Raises:
        UsageError: it is of a run with other settings or images.
        CheckpointError: it is damaged.
    """
    _, metadata = load_header(file)
    try:
        begun, step = BEFORE | parse_json(metadata["identity"]), int(metadata["step"])
        begun.setdefault("perceptual_weight", begun.get("lpips"))
        begun.setdefault("clip_grad", 2.0 if "gamma_init" in begun else 0.0)
        images = parse_json(metadata.get("images", "{}"))
        given = json.loads(json.dumps(run.identity))
        different = sorted(key for key in given if begun.get(key) != given[key])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(file, "it does not say which run it belongs to") from error
    if "pictures" in different and images:
        raise UsageError(f"the run in {run.folder} was begun with {_other_images(images, run.images)}; use {_AGAIN}")
    if different == ["epochs"]:
        if run.steps < step:
            raise UsageError(
                f"the run in {run.folder} has come to step {step}, and --epochs {given['epochs']:g} ends at step "
                f"{run.steps}; give more --epochs, or another --out"
            )
    elif different:
        was = ", ".join(_as_typed(key, begun.get(key), given.get(key), "now") for key in different[:3])
        raise UsageError(f"the run in {run.folder} was begun with {was}; use {_AGAIN}")
    return step


_AGAIN = "the same again, or another --out"


def _as_typed(setting: str, begun: Any, now: Any, mark: str) -> str:
    """Return a setting of a run as the option that sets it, with its value and the other one, such as "(now 2)"."""
    if setting == "bf16":
        begun, now = ("bf16" if value else "fp32" for value in (begun, now))
        return f"--dtype {begun} ({mark} {now})"
    kinds = (TokenizerConfig, TokenizerTrainingConfig, TransformerTrainingConfig)
    known = next((names[setting] for names in map(option_names, kinds) if setting in names), None)
    return f"{known or '--' + setting.replace('_', '-')} {begun!r} ({mark} {now!r})"


def check_ranks(run: Run, step: int, group: ProcessGroup) -> None:
    """Check that all ranks were given the same; to be called by all, before anything is written.

    Args:
        run: of this rank.
        step: the one it has come to, as `check_run` says.
        group: the ranks.

    Raises:
        InputError: one reads other images, or another folder of the run.
        UsageError: one has other settings, another tokenizer file or another kind of device.
    """
    for rank, (identity, images, its_step) in enumerate(group.gather((run.identity, dict(run.images), step))):
        if its_step != step:
            raise InputError(
                f"rank 0 resumes {run.folder} at step {step}, and rank {rank} at step {its_step}; "
                "--out must be a folder that all of them share"
            )
        different = sorted(key for key in identity if identity[key] != run.identity.get(key))
        if "pictures" in different:
            what = _other_images(run.images, images, f"rank {rank}")
            raise InputError(f"rank 0 reads {what}; all must read the same data")
        if different:
            key = different[0]
            what = _as_typed(key, run.identity.get(key), identity[key], f"rank {rank}")
            raise UsageError(f"rank 0 has {what}; all must have the same")
    group.barrier()


def _other_images(before: Mapping[str, int], now: Mapping[str, int], where: str = "now") -> str:
    """Say how images differ from those that are there now, or elsewhere, from their numbers per class."""
    changed = [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]
    counts = [f"{name} {before.get(name, 0)} ({where} {now.get(name, 0)})" for name in sorted(changed)]
    what = f"{counted(sum(before.values()), 'image')} ({where} {sum(now.values())})"
    return f"{what}: {in_words(counts)}" if counts else f"{what}, of which some had other names or sizes"


def resume(stage: Stage, run: Run) -> int:
    """Load the state of a run that was under way; returns the step to begin with.

    Raises:
        VarError: as `check_run`, or the state is another network's.
    """
    if not state_files(run.folder):
        return check_run(run)
    newest = state_files(run.folder)[0]
    file, step, identity = from_newest_state(run.folder, lambda file: load_state(stage, run, file))
    before, now = identity.get("epochs", 0), run.identity.get("epochs", 0)
    if before != now:
        run.note(f"resuming at step {step}, with the learning rates of {counted(now, 'epoch')} instead of {before:g}")
    if file != newest:
        run.note(f"{newest} is damaged; resuming from the state before it, at step {step}")
        stage.group.barrier()  # all ranks have read it
        if stage.group.is_main:
            file.replace(newest)  # so that the next save keeps the good one, not the damaged one
    return step


def load_state(stage: Stage, run: Run, file: Path) -> tuple[Path, int, dict[str, Any]]:
    """Load a state into the stage; returns its file, step and identity.

    Raises:
        VarError: as `resume`.
    """
    step = check_state(file, run)
    tensors, metadata = load_tensors(file)
    if "sha256" in metadata and metadata["sha256"] != tensors_sha256(tensors):  # earlier versions wrote none
        raise _damaged(file, "its tensors are not those that were written")
    try:
        stage.load_tensors(tensors)
    except (KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        raise _damaged(file, "its tensors are not those of this model") from error
    return file, step, parse_json(metadata["identity"])


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"the state {file} is damaged: {what}; use another --out")


def save_state(stage: Stage, run: Run, step: int) -> None:
    """Write the state to continue from, and keep the one before it: one of them is whole whenever the run is killed.

    To be called by all ranks, which may have shards of it.
    """
    tensors = gather_on_main(stage.tensors(), stage.group)
    if not stage.group.is_main:
        return
    metadata = {"step": str(step), "identity": json.dumps(run.identity, sort_keys=True)}
    metadata["images"], metadata["copies"] = json.dumps(run.images, sort_keys=True), str(run.copies)
    metadata["sha256"] = tensors_sha256(tensors)
    try:
        if run.state_file.exists():
            run.state_file.replace(run.previous_state_file)
    except OSError as error:
        raise cannot_write(run.previous_state_file, error) from error
    save_tensors(run.state_file, tensors, metadata)


def train(stage: Stage, run: Run) -> Metrics:
    """Train from the beginning, or from where the folder's run stopped, to the end; return the last figures.

    To be called by all ranks; the main one writes the files. Ctrl-C and SIGTERM end the run after the step under way,
    with its state saved.

    Raises:
        RunError: the loss is not finite, memory does not suffice, a data-loading worker is ended, or another
            run is under way in the folder; the last good checkpoint stays.
        UsageError: the folder holds a run with other settings, or a checkpoint that would be replaced.
        CheckpointError: the states of the folder's run are damaged.
        KeyboardInterrupt: Ctrl-C.
        SystemExit: SIGTERM, with the code 143.
    """
    make_folder(run.folder)
    with (
        only_run(run.folder) if stage.group.is_main else nullcontext(),
        memory_explained(run.batch),
        reader_failures(),
    ):
        return continue_run(stage, run, resume(stage, run))


def continue_run(stage: Stage, run: Run, start: int) -> Metrics:
    """Take the steps from `start` on; returns the last figures. Of a finished run only the checkpoint is written."""
    group = stage.group
    log = MetricsLog(run.folder, start, run.batch) if group.is_main else None
    remaining = range(start, run.steps)
    if not remaining:
        run.note(f"nothing left to do: all {run.steps} steps are done")
        conclude(stage, run, start)
    with StopSignal() as stop, closing(stage.batches(remaining)) as batches:
        for step, batch in zip(remaining, batches, strict=True):
            done = step + 1
            metrics = update(stage, batch, step, run.steps)
            loss = metrics["loss"].item()
            if not math.isfinite(loss):
                kept = f"; {run.folder} keeps the last good state" if state_files(run.folder) else ""
                raise RunError(f"the loss is not finite at step {done}{kept}; try a lower --base-lr in another --out")
            run.after_step(done, loss)
            last = done == run.steps
            # A signal may reach one rank alone, or one a step earlier than another.
            received = torch.tensor([stop.received > 0, stop.received == signal.SIGTERM], dtype=torch.int64)
            stopping, terminated = map(bool, sum_over_ranks(received, group))
            stopping &= not last
            observed = stage.observe(done) if in_log(run, done) else {}
            if log:
                log.add(metrics)
            record(stage, run, log, done, observed, stopping)
            if stopping:
                group.barrier()  # the state must be saved before any rank ends
                run.note(f"stopped after step {done} of {run.steps}, with the state saved; the same command resumes it")
                raise SystemExit(TERMINATED) if terminated else KeyboardInterrupt
    return group.broadcast(log.last if log else {})


def record(
    stage: Stage, run: Run, log: MetricsLog | None, done: int, observed: Mapping[str, Tensor], stopping: bool
) -> None:
    """Write what is due after a step: state, checkpoint, preview, figures. To be called by all ranks.

    A run that is stopped saves its state at once: a scheduler does not wait for a validation.
    """
    last = done == run.steps
    validating = last or (validation_due(run, done) and not stopping)
    evaluating = validating and run.eval_every > 0 and (last or done % run.eval_every == 0)
    # Before an evaluation, which takes long, and before a checkpoint, which without a state no run could replace.
    if evaluating or (validating and not stage.group.broadcast(bool(state_files(run.folder)))):
        save_state(stage, run, done)
    if validating or done % run.log_every == 0:
        validation = conclude(stage, run, done) if validating else {}
        if evaluating:
            validation |= run.evaluate()
        if log:
            log.write(done, validation, observed, run.steps - done, peak_bytes(stage.device))
            run.report(done, log.last)
    if not evaluating and (last or done % run.save_every == 0 or stopping):
        save_state(stage, run, done)


def validation_due(run: Run, done: int) -> bool:
    """Whether a validation, and with it a checkpoint, follows a step that is not the last; an evaluation needs both."""
    return done % run.validate_every == 0 or (run.eval_every > 0 and done % run.eval_every == 0)


def in_log(run: Run, done: int) -> bool:
    """Whether the log has a line of a step."""
    return done == run.steps or done % run.log_every == 0 or validation_due(run, done)


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
    """Turn an out-of-memory error into advice.

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
    """Validate; on the main rank write the checkpoint, draw images and return the figures. To be called by all."""
    with stage.average.whole():
        figures = stage.validate()
        if not stage.group.is_main:
            return {}
        stage.save(run.folder, figures | {"steps": run.steps}, step)
        images = run.folder / "samples"
        make_folder(images)
        run.preview(images, step)
        return figures


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """Return bf16 autocast for a device."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
