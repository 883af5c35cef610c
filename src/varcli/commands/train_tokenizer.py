"""`var train tokenizer`: images in, tokenizer.safetensors out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from varcli import console
from varcli.commands import training_options as shared
from varcli.commands.options import Device, Json, Quiet, parse_numbers
from varcli.config import TokenizerConfig, TokenizerTrainingConfig

if TYPE_CHECKING:
    import torch

    from varcli.models.lpips import LPIPS
    from varcli.training.tokenizer import TokenizerStage

SHAPE = TokenizerConfig()
SIDES, MULTIPLIERS = (",".join(map(str, numbers)) for numbers in (SHAPE.sides, SHAPE.multipliers))
SHOWN = 8
"""Images in a preview."""


def tokenizer(
    data: shared.Data,
    out: shared.RunFolder,
    sides: shared.SidesText = SIDES,
    codebook_size: Annotated[int, Option(help="Rows of the codebook.")] = SHAPE.codebook_size,
    codebook_width: Annotated[int, Option(help="Channels of a codebook row.")] = SHAPE.codebook_width,
    base_width: Annotated[int, Option(help="Channels at full resolution, a multiple of 32.")] = SHAPE.base_width,
    multipliers: Annotated[
        str, Option(metavar="1,2,…", help="Channels of each level as multiples; each level after the first halves.")
    ] = MULTIPLIERS,
    encoder_blocks: Annotated[int, Option(help="Residual blocks a level; the decoder has one more.")] = (
        SHAPE.encoder_blocks
    ),
    epochs: shared.Epochs = None,
    batch: shared.Batch = None,
    accumulate: shared.Accumulate = None,
    base_lr: shared.BaseLr = None,
    final_lr: shared.FinalLr = None,
    weight_decay: shared.WeightDecay = None,
    ema: shared.Ema = None,
    enlarge: shared.Enlarge = None,
    seed: shared.Seed = None,
    lpips: Annotated[
        float | None,
        Option(help="Weight of the perceptual distance; 0 needs no VGG weights.", show_default=shared.RECIPE),
    ] = None,
    lpips_weights: Annotated[
        Path | None,
        Option(metavar="DIR", help="Folder of the two weight files.", show_default="torch.hub's cache"),
    ] = None,
    gan: Annotated[
        float | None, Option(help="Weight of the adversarial loss; 0 is off.", show_default=shared.RECIPE)
    ] = None,
    gan_start: Annotated[
        float | None, Option(help="When it sets in, as a fraction of the training.", show_default=shared.RECIPE)
    ] = None,
    scale_drop: Annotated[
        float | None, Option(help="Probability that an update leaves out the last scales.", show_default=shared.RECIPE)
    ] = None,
    holdout: shared.Holdout = 0,
    validate_every: shared.ValidateEvery = 1000,
    save_every: shared.SaveEvery = 500,
    device: Device = "auto",
    dtype: shared.Precision = "auto",
    workers: shared.Workers = None,
    tensorboard: shared.TensorBoard = False,
    dry_run: shared.DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a tokenizer: images to token maps and back."""
    config = TokenizerConfig(
        sides=parse_numbers("--sides", sides),
        codebook_size=codebook_size,
        codebook_width=codebook_width,
        base_width=base_width,
        multipliers=parse_numbers("--multipliers", multipliers),
        encoder_blocks=encoder_blocks,
    )
    training = shared.changed(
        TokenizerTrainingConfig(), epochs=epochs, batch=batch, accumulate=accumulate, base_lr=base_lr,
        final_lr=final_lr, weight_decay=weight_decay, ema=ema, enlarge=enlarge, seed=seed, lpips=lpips, gan=gan,
        gan_start=gan_start, scale_drop=scale_drop,
    )  # fmt: skip
    from varcli.acceleration.devices import pick_device
    from varcli.images.dataset import open_images
    from varcli.training import estimate, optim
    from varcli.training.loop import Run
    from varcli.training.tokenizer import TokenizerStage

    place = pick_device(device)
    optim.make_deterministic(place)
    half = shared.trains_in_bf16(dtype, place, on_cpu=False)
    images, held = open_images(data, require_labels=True, read_headers=False).split(holdout)
    stage = TokenizerStage(
        config, training, images, held, place, half=half, workers=shared.worker_count(workers),
        warn=console.note,
    )  # fmt: skip
    if dry_run:
        shared.show_plan(estimate.estimate(stage, training, len(images)), training, as_json)
        return
    stage.perceptual = _perceptual(lpips_weights, place) if training.lpips > 0 else None
    steps = training.steps(len(images))
    run = Run(
        folder=out, steps=steps, batch=training.batch,
        identity=optim.identity(images.fingerprint(), place, half, model=config, training=training),
        validate_every=validate_every, save_every=save_every,
        preview=lambda folder, step: _preview(stage, folder, step),
        report=shared.reporter(out, steps, quiet, tensorboard),
    )  # fmt: skip
    shared.finish(stage, run, out / "tokenizer.safetensors", as_json)


def _perceptual(folder: Path | None, device: "torch.device") -> "LPIPS":
    import torch

    from varcli.models.lpips import LPIPS

    return LPIPS(folder or Path(torch.hub.get_dir()) / "checkpoints").to(device)


def _preview(stage: "TokenizerStage", folder: Path, step: int) -> None:
    """Write images, each above what the averaged tokenizer makes of it."""
    from varcli.sampling.sampler import decode, to_pixels

    pixels = stage.examples(SHOWN)
    model = stage.average.model
    made = decode(model, model.quantize.f_hats(model.encode(pixels))[-1])
    labels = ["image"] * len(pixels) + ["reconstruction"] * len(made)
    shared.write_sheet(folder, step, [*to_pixels(pixels), *made], labels, len(pixels))
