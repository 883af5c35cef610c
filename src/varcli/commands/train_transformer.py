"""`var train transformer`: images and a tokenizer in, model.safetensors out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from varcli import console
from varcli.commands import training_options as shared
from varcli.commands.options import Device, Json, Quiet
from varcli.config import PRESETS, TransformerConfig, transformer_recipe

if TYPE_CHECKING:
    from varcli.images.dataset import ImageSet
    from varcli.training.data import TokenCache
    from varcli.training.transformer import TransformerStage

SHOWN = 10
"""Classes in a preview, two images of each."""


def transformer(
    data: shared.Data,
    out: shared.RunFolder,
    tokenizer: Annotated[Path, Option(metavar="FILE", help="A tokenizer or model file; its weights stay as they are.")],
    depth: Annotated[int, Option(help="Number of blocks, the one dial of the published models.")] = 16,
    width: Annotated[int | None, Option(help="Channels, a multiple of 64.", show_default="64 × depth")] = None,
    shared_adaln: Annotated[bool, Option("--shared-adaln", help="One modulation for all blocks, as in d36.")] = False,
    epochs: shared.Epochs = None,
    batch: shared.Batch = None,
    accumulate: shared.Accumulate = None,
    base_lr: shared.BaseLr = None,
    final_lr: shared.FinalLr = None,
    weight_decay: shared.WeightDecay = None,
    final_weight_decay: Annotated[
        float | None, Option(help="Decoupled weight decay at the end.", show_default=shared.RECIPE)
    ] = None,
    gamma_init: Annotated[
        float | None, Option(help="Factor of the initial weights behind the gates.", show_default=shared.RECIPE)
    ] = None,
    ema: shared.Ema = None,
    enlarge: shared.Enlarge = None,
    crops: Annotated[
        int | None, Option(help="Cached crops an image: 1 is the centre, more are random.", show_default=shared.RECIPE)
    ] = None,
    seed: shared.Seed = None,
    holdout: shared.Holdout = 0,
    validate_every: shared.ValidateEvery = 1000,
    save_every: shared.SaveEvery = 500,
    device: Device = "auto",
    dtype: shared.Precision = "auto",
    store: shared.Store = "fp32",
    workers: shared.Workers = None,
    tensorboard: shared.TensorBoard = False,
    dry_run: shared.DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a transformer on the token maps of a tokenizer."""
    training = shared.changed(
        transformer_recipe(depth), epochs=epochs, batch=batch, accumulate=accumulate, base_lr=base_lr,
        final_lr=final_lr, weight_decay=weight_decay, final_weight_decay=final_weight_decay, gamma_init=gamma_init,
        ema=ema, enlarge=enlarge, crops=crops, seed=seed,
    )  # fmt: skip
    from varcli.acceleration.devices import DTYPES, pick_device
    from varcli.checkpoints.store import load_tokenizer, tokenizer_sha256
    from varcli.images.dataset import open_images
    from varcli.training import estimate, optim
    from varcli.training.loop import Run
    from varcli.training.transformer import TransformerStage

    place = pick_device(device)
    optim.make_deterministic(place)
    half = shared.trains_in_bf16(dtype, place, on_cpu=True)
    images, held = open_images(data, require_labels=True, read_headers=False).split(holdout)
    maps = load_tokenizer(tokenizer).to(place)
    config = TransformerConfig(
        depth=depth, width=64 * depth if width is None else width, sides=maps.config.sides,
        codebook_size=maps.config.codebook_size, codebook_width=maps.config.codebook_width,
        class_count=len(images.classes), shared_adaln=shared_adaln,
    )  # fmt: skip
    stage = TransformerStage(config, training, maps, images.classes, place, half=half, store=DTYPES[store])
    if dry_run:
        shared.show_plan(
            estimate.estimate(stage, training, len(images), estimate.expected_losses(depth)), training, as_json
        )
        return
    ahead = shared.worker_count(workers)
    stage.held = _tokens(stage, held, 1, out, ahead, quiet)
    stage.tokens = _tokens(stage, images, training.crops, out, ahead, quiet)
    steps = training.steps(len(images))
    run = Run(
        folder=out, steps=steps, batch=training.batch,
        identity=optim.identity(
            images.fingerprint(), place, half, model=config, training=training, tokenizer=tokenizer_sha256(maps)
        ),
        validate_every=validate_every, save_every=save_every,
        preview=lambda folder, step: _preview(stage, folder, step),
        report=shared.reporter(out, steps, quiet, tensorboard),
    )  # fmt: skip
    shared.finish(stage, run, out / "model.safetensors", as_json)


def _tokens(
    stage: "TransformerStage", images: "ImageSet", crops: int, folder: Path, workers: int, quiet: bool
) -> "TokenCache | None":
    """Return the token maps of images, from the run's folder or computed now; None of none."""
    from varcli.training.data import CacheSettings, open_cache

    if not len(images):
        return None
    training = stage.training
    settings = CacheSettings(enlarge=training.enlarge, crops=crops, seed=training.seed)
    with console.progress("token maps", crops * len(images), quiet) as advance:
        return open_cache(
            folder, stage.tokenizer, images, settings, stage.device, workers=workers, warn=console.note,
            progress=advance,
        )  # fmt: skip


def _preview(stage: "TransformerStage", folder: Path, step: int) -> None:
    """Write images of classes spread over the table, drawn with the averaged weights."""
    from varcli.sampling.sampler import decode, generate

    entries = stage.classes.entries
    shown = min(SHOWN, len(entries))
    rows = [i * len(entries) // shown for i in range(shown)]
    images, labels = [], []
    for seed in (0, 1):
        for row in rows:
            *_, last = generate(stage.tokenizer, stage.average.model, [row], [seed], PRESETS["looks"])
            images.append(decode(stage.tokenizer, last.f_hat)[0])
            labels.append(entries[row].name)
    shared.write_sheet(folder, step, images, labels, shown)
