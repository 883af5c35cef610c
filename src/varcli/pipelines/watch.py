"""Watching a training run: a progress bar, TensorBoard, Weights & Biases, and checks of its figures."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from varcli.checkpoints.safetensors_io import load_header
from varcli.console import progress
from varcli.errors import InputError, UsageError
from varcli.files import parse_json
from varcli.report.load import read_runs
from varcli.training.loop import Run, from_newest_state, in_log, state_files
from varcli.training.metrics_log import Metrics
from varcli.training.status import Check, check_lines

Tracker = Callable[[int, Metrics], None]
"""Takes figures as they come, with their step."""


def check_packages(tensorboard: bool, wandb: str | None) -> None:
    """Check that the requested packages are installed.

    Raises:
        UsageError: it is not.
    """
    for wanted, flag, module in ((tensorboard, "tensorboard", "torch.utils.tensorboard"), (wandb, "wandb", "wandb")):
        try:
            if wanted:
                import_module(module)
        except ImportError:
            raise UsageError(f"--{flag} needs another package: pip install 'varcli[{flag}]'") from None


@contextmanager
def watched(
    run: Run, report: Callable[[int, int, Metrics], None], tensorboard: bool, wandb: str | None, quiet: bool
) -> Iterator[Run]:
    """Yield the run with a progress bar, and with figures going to `report` and to the requested trackers.

    Only the main rank reports, so the trackers begin with the first figures.
    """
    trackers: list[Tracker] = []
    first = 0  # step that is taken; known only then, as the newest state may turn out to be damaged

    def log(step: int, figures: Metrics) -> None:
        if not trackers:
            trackers.extend([_tensorboard(run.folder / "tensorboard", first)] if tensorboard else [])
            trackers.extend([_wandb(wandb, run)] if wandb else [])
        named = {name.replace("validation_", "validation/"): value for name, value in figures.items()}
        for tracker in trackers:
            tracker(step, named)
        report(step, run.steps, figures)

    def after_step(step: int, loss: float) -> None:
        nonlocal first
        if not (first or quiet or in_log(run, step)):  # so that the user sees that the run works
            report(step, run.steps, {"loss": loss})
        first = first or step
        move(step, loss)

    with _bar(run, quiet) as move:
        yield replace(run, report=log, after_step=after_step)


@contextmanager
def _bar(run: Run, quiet: bool) -> Iterator[Callable[[int, float], None]]:
    """Yield what moves a bar with loss and images/s after each step, where stderr is a terminal."""
    with progress("training", run.steps, quiet) as advance:
        shown, since, seconds = 0, time.perf_counter(), 0.0

        def after_step(step: int, loss: float) -> None:
            nonlocal shown, since, seconds
            now = time.perf_counter()
            seconds = 0.9 * seconds + 0.1 * (now - since) if seconds else now - since
            advance(step - shown, f"loss {loss:.3f}, {run.batch / seconds:.1f} images/s")
            shown, since = step, now

        yield after_step


def _tensorboard(folder: Path, first: int) -> Tracker:
    """Write for TensorBoard; figures of a killed run from the step `first` on are removed."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder), purge_step=first)

    def track(step: int, figures: Metrics) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return track


def _wandb(project: str, run: Run) -> Tracker:
    """Send to a project of Weights & Biases, for one folder always to the same run.

    Raises:
        UsageError: it cannot begin, because no user is logged in, for example.
    """
    import wandb

    name = hashlib.sha256(str(run.folder.resolve()).encode()).hexdigest()[:16]
    settings: dict[str, Any] = {"project": project, "id": name, "resume": "allow", "name": run.folder.resolve().name}
    try:
        tracked = wandb.init(**settings, dir=str(run.folder), config=run.identity)
    except wandb.Error as error:
        raise UsageError(
            f"--wandb {project} cannot begin: {error}; run `wandb login`, or set WANDB_MODE=offline"
        ) from error
    return lambda step, figures: tracked.log(figures, step=step)


# --- how a run is doing ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """Progress of a run, and its checks."""

    stage: str
    step: int
    steps: int
    images: int
    """Training images."""
    figures: dict[str, float]
    """The newest line of its metrics log."""
    checks: list[Check]


def run_status(folder: str | Path) -> RunStatus:
    """Compare a run, finished or under way, with what is normal.

    Args:
        folder: of the run.

    Raises:
        InputError: the folder holds no run, or one without figures or state.
        CheckpointError: none of the run's states can be read.
    """
    (run,) = read_runs([Path(folder)])
    if not state_files(Path(folder)):
        raise InputError(f"the training run {folder} has no state yet: the first is saved after --save-every steps")
    state, (_, metadata) = from_newest_state(Path(folder), lambda file: (file, load_header(file)))
    last = dict(run.lines[-1])
    try:
        settings = parse_json(metadata["identity"])
        images = sum(parse_json(metadata.get("images", "{}")).values())
        steps = math.ceil(settings["epochs"] * images / settings["batch"]) or int(last["step"])
        checks = check_lines(run.lines, settings, steps, float(metadata["copies"]) if "copies" in metadata else None)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"the training run {folder} has a {state.name} that does not say how it is trained") from error
    return RunStatus(stage=run.stage, step=int(last["step"]), steps=steps, images=images, figures=last, checks=checks)
