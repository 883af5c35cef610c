"""`var scaling`: train a ladder of models, and fit scaling laws to finished runs (paper, section 4.2)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from varcli import charts
from varcli.checkpoints.store import read_config, read_metadata, run_facts
from varcli.config import TransformerConfig, TransformerTrainingConfig, transformer_recipe
from varcli.distributed import ProcessGroup
from varcli.errors import InputError
from varcli.files import write_atomically
from varcli.pipelines.train import Report, train_transformer
from varcli.report.load import METRICS_LOG, read_runs
from varcli.training import scaling
from varcli.training.scaling import FIGURES, JointLaw, PowerLaw, Trained

REPEATED = 4
"""Epochs after which repeated images teach clearly less than new ones (Muennighoff et al. 2023)."""

TITLES = {
    "loss": "cross-entropy, all scales",
    "loss_last": "cross-entropy, last scale",
    "error": "token error, all scales",
    "error_last": "token error, last scale",
}


# --- the ladder ------------------------------------------------------------------------------------


def train_ladder(
    data: Sequence[str | Path],
    tokenizer: str | Path,
    out: str | Path,
    *,
    depths: Sequence[int],
    epochs: Sequence[float],
    recipe: dict[str, Any] | None = None,
    token_cache: str | Path | None = None,
    holdout: int = 10,
    save_every: int = 500,
    device: str = "auto",
    dtype: str = "auto",
    workers: int | None = None,
    compiled: bool = False,
    group: ProcessGroup | None = None,
    report: Callable[[Path], Report] = lambda folder: lambda step, steps, figures: None,
    note: Callable[[str], None] = lambda line: None,
    quiet: bool = True,
) -> list[Path]:
    """Train a model of every depth for every number of epochs, each to the end of its own schedule.

    A stopped ladder resumes when this is called again. All runs share one cache of token maps.

    Args:
        data: images with labels.
        tokenizer: name or file of a tokenizer or model.
        out: folder of the runs; one is called d4-e2, of depth 4 and 2 epochs.
        depths: of the models, 64 × depth channels wide.
        epochs: passes over the images; each is a run of its own, since only an ended schedule counts.
        recipe: fields of `TransformerTrainingConfig` that differ from the published recipe.
        token_cache: folder where token maps are kept for these and other runs; None is `out`/tokens.
        holdout: the last images of each class, on which the figures are measured.
        save_every: steps that a killed run loses at most.
        device: auto, cpu, cuda or mps.
        dtype: fp32, bf16, or auto: bf16 where it is faster; a run that resumes keeps its own.
        workers: data-loading workers.
        compiled: compile each model with torch.compile first.
        group: the ranks that share each batch; None is this process alone.
        report: given a run's folder, returns what takes its figures as they come.
        note: takes remarks for the user.
        quiet: show no progress bar.

    Returns:
        The folders of the runs.

    Raises:
        VarError: as `train_transformer`.
    """
    folders = []
    for passes in sorted(epochs):
        for depth in sorted(depths):
            folder = Path(out) / f"d{depth}-e{passes:g}"
            training: TransformerTrainingConfig = replace(
                transformer_recipe(depth), **{**(recipe or {}), "epochs": passes}
            )
            train_transformer(
                data,
                tokenizer,
                folder,
                depth=depth,
                training=training,
                token_cache=token_cache or Path(out) / "tokens",
                holdout=holdout,
                save_every=save_every,
                device=device,
                dtype=dtype,
                workers=workers,
                compiled=compiled,
                group=group,
                report=report(folder),
                note=note,
                quiet=quiet,
            )
            folders.append(folder)
    return folders


# --- the laws --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingLaws:
    """Scaling laws fitted to runs."""

    runs: list[Trained]
    counted: str
    """What N counts: "blocks", as the paper, or "all" parameters."""
    joint: dict[str, JointLaw]
    """L(N, D) of each figure."""
    intervals: dict[str, dict[str, tuple[float, float]]]
    """95 % intervals of its constants."""
    parameters: dict[str, PowerLaw]
    """The paper's form in N, of the runs with most data."""
    compute: dict[str, PowerLaw]
    """The paper's form in C, of the runs that no other run beats for less compute."""
    notes: list[str]

    def facts(self) -> dict[str, Any]:
        """Everything as JSON holds it, the paper's constants beside ours."""
        runs = [
            {
                "name": run.name,
                "depth": run.config.depth,
                "parameters": count_parameters(run.config, self.counted),
                "images_seen": run.images_seen,
                "images": run.images,
                "tokens": run.tokens,
                "pflops": run.pflops,
                **run.figures,
            }
            for run in self.runs
        ]
        laws = {
            name: {
                "joint": asdict(self.joint[name]),
                "intervals": self.intervals.get(name, {}),
                "parameters": asdict(self.parameters[name]),
                "compute": asdict(self.compute[name]),
                "paper": {
                    kind: dict(zip(("beta", "alpha"), scaling.PAPER[kind][name], strict=True)) for kind in scaling.PAPER
                },
            }
            for name in self.joint
        }
        return {"counted": self.counted, "runs": runs, "laws": laws, "notes": self.notes}


def count_parameters(config: TransformerConfig, counted: str) -> int:
    """N: the blocks' parameters alone, or all."""
    return scaling.block_parameters(config) if counted == "blocks" else scaling.all_parameters(config)


def fit_scaling(folders: Sequence[str | Path], counted: str = "all", bootstrap: bool = True) -> ScalingLaws:
    """Fit scaling laws to finished training runs.

    Args:
        folders: of `var train transformer` runs on one tokenizer and data set, with held-out images.
        counted: what N counts: "all" parameters, or "blocks" alone as in the paper. In small models the class table,
            positions and head are as much as the blocks.
        bootstrap: also estimate intervals, which takes about a minute.

    Raises:
        InputError: a folder holds no finished run, the runs are too few or too alike, or of several tokenizers or data
            sets.
    """
    # `ladder/*` names the token maps beside the runs too.
    paths = [path for path in map(Path, folders) if (path / METRICS_LOG).exists() or not any(path.glob("tokens-*"))]
    logs = read_runs(paths)
    runs = [_trained(path, log.name) for path, log in zip(paths, logs, strict=True)]
    _check_comparable(runs, [log.settings for log in logs])
    notes = []
    repeated = [run.name for run in runs if run.images and run.images_seen > REPEATED * run.images]
    if repeated:
        notes.append(
            f"{len(repeated)} of {len(runs)} runs saw each image more than {REPEATED} times, {repeated[0]} among them: "
            "their D is more than new data would be"
        )
    n = [float(count_parameters(run.config, counted)) for run in runs]
    tokens = [run.tokens for run in runs]
    if len(set(tokens)) < 3:
        notes.append("fewer than three amounts of data: L(N, D) is fitted without its term in D")
    most = max(tokens)
    largest = [i for i, amount in enumerate(tokens) if amount > 0.99 * most]
    joint, ends, by_size, by_compute = {}, {}, {}, {}
    failed = None
    for name in FIGURES:
        values = [run.figures[name] for run in runs]
        try:
            law = scaling.fit_joint(n, tokens, values)
            # The paper's laws are of what can be reduced; its error has no irreducible part.
            floor = law.E if name.startswith("loss") else 0.0
            size = scaling.fit_power([n[i] / 1e9 for i in largest], [values[i] for i in largest], floor)
            best = scaling.frontier([(run.pflops, value) for run, value in zip(runs, values, strict=True)])
            cost = scaling.fit_power([x for x, _ in best], [y for _, y in best], floor)
        except InputError as error:  # of the token error, for example, which hardly changes in short runs
            notes.append(f"{TITLES[name]}: no law is fitted, since {error}")
            failed = error
            continue
        joint[name], by_size[name], by_compute[name] = law, size, cost
        if bootstrap:
            ends[name] = scaling.intervals(n, tokens, values)
        notes += [f"{TITLES[name]}: {line}" for line in undetermined(law, with_data=len(set(tokens)) >= 3)]
    if failed and not joint:
        raise failed
    return ScalingLaws(
        runs=runs,
        counted=counted,
        joint=joint,
        intervals=ends,
        parameters=by_size,
        compute=by_compute,
        notes=notes,
    )


def undetermined(law: JointLaw, *, with_data: bool) -> list[str]:
    """Say which terms of a law the runs do not determine."""
    found = []
    low, high = scaling.EXPONENTS
    terms = [("N", "α", law.alpha, law.A), ("D", "β", law.beta, law.B)]
    for quantity, symbol, exponent, factor in terms if with_data else terms[:1]:
        if factor == 0:
            found.append(f"does not fall with {quantity} in these runs, so {symbol} is 0")
        elif not 1.01 * low < exponent < 0.99 * high:
            found.append(f"{symbol} is at the end of its range, {low:g} to {high:g}: the runs do not determine it")
    return found


def _check_comparable(runs: Sequence[Trained], settings: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError if losses of the runs cannot be compared."""
    first = runs[0]
    for run, given in zip(runs, settings, strict=True):
        shapes = [(each.config.sides, each.config.codebook_size, each.config.codebook_width) for each in (first, run)]
        # A run without its state does not say which tokenizer it had.
        hashes = {each.get("tokenizer") for each in (settings[0], given)} - {None}
        if shapes[0] != shapes[1] or len(hashes) > 1:
            raise InputError(f"{run.name} was trained with another tokenizer than {first.name}: give runs of one")
        if run.classes != first.classes:
            raise InputError(f"{run.name} was trained on other classes than {first.name}: give runs of one data set")


def _trained(folder: Path, name: str) -> Trained:
    """A finished run, from its checkpoint."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise InputError(f"the run {folder} has no model.safetensors: a law is fitted to transformers")
    metadata, _ = read_metadata(path)
    config = read_config(path, metadata, TransformerConfig, "transformer_config")
    facts = run_facts(path, metadata)
    if facts.get("steps", facts.get("step")) != facts.get("step"):
        raise InputError(
            f"the run {folder} is at step {facts['step']} of {facts['steps']}: only an ended schedule counts"
        )
    if not {"loss", "loss_last", "accuracy", "accuracy_last"} <= facts.keys():
        raise InputError(f"the run {folder} has no held-out figures: train with --holdout")
    figures = {
        "loss": facts["loss"],
        "loss_last": facts["loss_last"],
        "error": 1 - facts["accuracy"],
        "error_last": 1 - facts["accuracy_last"],
    }
    return Trained(
        name=name,
        config=config,
        classes=metadata.get("classes", ""),
        images_seen=int(facts["images_seen"]),
        images=facts.get("images"),
        figures={key: float(value) for key, value in figures.items()},
    )


def predict(laws: ScalingLaws, depth: int, images_seen: int) -> dict[str, float]:
    """Predict the figures of a model of another depth after that many images."""
    config = replace(laws.runs[0].config, depth=depth, width=64 * depth)
    n = float(count_parameters(config, laws.counted))
    return {name: float(law.predict(n, float(images_seen * config.length))) for name, law in laws.joint.items()}


# --- the figure ------------------------------------------------------------------------------------


def draw(laws: ScalingLaws, path: Path) -> None:
    """Write the laws as a figure like the paper's 5 and 6, .png or .svg.

    Raises:
        RunError: the file cannot be written.
    """
    panels = []
    for name in ("loss_last", "loss", "error_last", "error"):
        if name in laws.joint:
            panels += [_panel(laws, name, "parameters"), _panel(laws, name, "compute")]
    if path.suffix.lower() == ".svg":
        write_atomically(path, charts.svg(*panels, name="scaling").encode())
    else:
        write_atomically(path, charts.png(*panels))


def _panel(laws: ScalingLaws, name: str, kind: str) -> charts.Lines:
    """One figure over N or C: the runs, by amount of data, and the paper's form fitted to the best of them."""
    law = (laws.parameters if kind == "parameters" else laws.compute)[name]
    reducible = name.startswith("loss")
    amounts = sorted({run.tokens for run in laws.runs})
    curves = []
    for color, amount in enumerate(amounts):
        points = [
            (
                count_parameters(run.config, laws.counted) / 1e9 if kind == "parameters" else run.pflops,
                run.figures[name] - law.floor,
            )
            for run in laws.runs
            if run.tokens == amount
        ]
        label = f"{amount:.3g} tokens" if kind == "parameters" else ""
        curves.append(charts.Curve(label=label, points=sorted(points), color=color, width=0, marked=True))
    xs = [x for curve in curves for x, _ in curve.points]
    line = np.geomspace(min(xs), max(xs), 50)
    text = f"({law.beta:.3g} X)^{law.alpha:.3f}, r = {law.correlation:.4f}"
    fitted = [(float(x), float(law.predict(x)) - law.floor) for x in line]
    curves.append(charts.Curve(label=text, points=fitted, color=len(amounts), marked=False))
    what = "N, billions of parameters" if kind == "parameters" else "C, PFlops of training"
    unit = f"nats above {law.floor:.3f}" if reducible else "share of tokens"
    return charts.Lines(title=TITLES[name], x_unit=f"X = {what}", y_unit=unit, curves=curves, x_log=True, y_log=True)
