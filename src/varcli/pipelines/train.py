"""`varcli.train_tokenizer` and `varcli.train_transformer`: from images to a checkpoint, resumable."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from varcli.acceleration.devices import DTYPES, pick_device, trains_in_bf16
from varcli.acceleration.dispatch import compile_networks, prepare_training
from varcli.acceleration.flex_attention import check_flex_attention
from varcli.checkpoints.registry import resolve_checkpoint
from varcli.checkpoints.store import (
    Checkpoint,
    load_model,
    load_tokenizer,
    read_config,
    read_metadata,
    tokenizer_sha256,
)
from varcli.classes import ClassTable
from varcli.config import (
    PRESETS,
    TokenizerConfig,
    TokenizerTrainingConfig,
    TrainingConfig,
    TransformerConfig,
    TransformerTrainingConfig,
    transformer_recipe,
)
from varcli.console import counted, progress
from varcli.distributed import ProcessGroup, cores
from varcli.errors import InputError, UsageError
from varcli.files import write_atomically
from varcli.images.contact_sheet import contact_sheet
from varcli.images.dataset import ImageSet, open_images
from varcli.images.provenance import png_bytes
from varcli.models.perceptual import perceptual_distance
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer
from varcli.pipelines.watch import check_packages, watched
from varcli.sampling.sampler import Pixels, decode, generate, to_pixels
from varcli.training import optim, status
from varcli.training.data import (
    ENCODE_BATCH,
    CacheSettings,
    TokenCache,
    cache_facts,
    cache_path,
    list_caches,
    open_cache,
)
from varcli.training.discriminator import SMALLEST_PATCH, PatchDiscriminator
from varcli.training.estimate import TrainingEstimate, check_memory, estimate, expected_losses_at
from varcli.training.finetune import adapt, merged, tokens_in_common, warm_start
from varcli.training.loop import Run, begun_in_bf16, check_ranks, check_run, make_folder, train
from varcli.training.metrics_log import Metrics
from varcli.training.parallel import check_batch
from varcli.training.tokenizer import TokenizerStage, build_tokenizer
from varcli.training.transformer import TransformerStage, build_transformer, keep_block_inputs

PREVIEW_IMAGES = 8
"""Images in a tokenizer's preview."""

PREVIEW_CLASSES = 10
"""Classes in a transformer's preview, two images of each."""

Report = Callable[[int, int, Metrics], None]
"""Called with the step, the steps in all, and figures."""


def train_tokenizer(
    data: Sequence[str | Path],
    out: str | Path,
    *,
    config: TokenizerConfig | None = None,
    training: TokenizerTrainingConfig | None = None,
    init: str | Path | None = None,
    lpips_weights: Path | None = None,
    holdout: int = 0,
    validate_every: int = 1000,
    save_every: int = 500,
    eval_every: int = 0,
    eval_images: int | None = None,
    eval_features: str = "inception-v3-compat",
    eval_weights: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    workers: int | None = None,
    compiled: bool = False,
    tensorboard: bool = False,
    wandb: str | None = None,
    group: ProcessGroup | None = None,
    report: Report = lambda step, steps, figures: None,
    note: Callable[[str], None] = lambda line: None,
    quiet: bool = True,
) -> Metrics:
    """Train a tokenizer (paper, section 3.2); a stopped run resumes when called again.

    Args:
        data: images with labels: folders of class folders, zips, tar shards or .npz files.
        out: folder of the run; tokenizer.safetensors in it is the checkpoint.
        config: shape of the tokenizer; None is that of `init`, or the released one. With another shape than `init`'s,
            the weights of its encoder and decoder that have the same names and shapes are kept.
        training: the recipe; None is the default.
        init: name or file of a tokenizer or model whose weights training begins with; None is random weights.
        lpips_weights: folder of the weight files of LPIPS or ResNet-50; None is torch.hub's cache.
        holdout: the last images of each class kept for validation.
        validate_every: steps between validations, checkpoints and preview images.
        save_every: steps that a killed run loses at most.
        eval_every: steps between measurements of rFID of the held-out images; 0 is never.
        eval_images: images to measure; None is as many as are held out, 2000 at most.
        eval_features: the extractor: "inception-v3-compat", "dinov2" or "efficientnet-lite0".
        eval_weights: file of the extractor's weights; None downloads them at the first use.
        device: auto, cpu, cuda or mps.
        dtype: fp32, bf16, or auto: bf16 where it is faster; a run that resumes keeps its own.
        workers: data-loading workers; None is one less than cores, 8 at most.
        compiled: compile the networks with torch.compile first, which takes minutes; steps are faster then.
        tensorboard: also write figures for TensorBoard.
        wandb: project of Weights & Biases that gets the figures too; None is none.
        group: the ranks that share each batch; None is this process alone.
        report: called with figures as they come.
        note: takes remarks for the user.
        quiet: show no progress bar.

    Returns:
        The last figures.

    Raises:
        VarError: images or weights cannot be used, the folder holds another run or a checkpoint that would be
            replaced, or the loss is not finite.
    """
    check_packages(tensorboard, wandb)
    training = training or TokenizerTrainingConfig()
    begun = None if init is None else load_tokenizer(resolve_checkpoint(str(init)))
    group = group or ProcessGroup()
    where, bf16 = _device_and_bf16(device, dtype, out)
    everything = _images(data)
    images, held = everything.split(holdout)
    check_batch(training.batch, training.accumulate, group)
    model, discriminator = _plain_tokenizer(config, training, begun, note)
    stage = TokenizerStage(
        model.to(where),
        discriminator.to(where),
        training,
        images,
        held,
        bf16=bf16,
        group=group,
        warm=begun is not None and begun.config == model.config,
        workers=_worker_count(workers, training.batch * 3 * model.config.pixels**2, note),
        warn=note,
    )
    if training.perceptual != "none" and training.perceptual_weight > 0:
        folder = lpips_weights or Path(torch.hub.get_dir()) / "checkpoints"
        distance = perceptual_distance(training.perceptual, folder).to(stage.device)
        stage.perceptual = distance.to(memory_format=torch.channels_last)
    prepare_training(stage.model, stage.device, bf16=bf16)
    identity = optim.identity(
        images.fingerprint(),
        stage.device,
        stage.bf16,
        model=stage.config,
        training=training,
        init=begun and tokenizer_sha256(begun),
    )
    steps = training.steps(len(images))
    run = Run(
        folder=Path(out),
        steps=steps,
        batch=training.batch,
        identity=identity,
        images=_counts(images),
        copies=_copies(images, note) if group.is_main else 0.0,
        validate_every=validate_every,
        save_every=save_every,
        eval_every=eval_every,
        preview=lambda folder, step: _preview_reconstructions(stage, folder, step),
        note=note,
    )
    check_ranks(run, check_run(run), group)
    if eval_every:
        from varcli.pipelines.run_evaluation import RunEvaluation

        evaluation = RunEvaluation(
            held,
            stage.config.pixels,
            tokenizer=True,
            count=eval_images,
            features=eval_features,
            weights=eval_weights,
            device=stage.device,
            group=group,
            note=note,
        )
        run = replace(run, evaluate=lambda: evaluation(run.folder / "tokenizer.safetensors"))
    if group.world_size == 1:
        check_memory(stage, training)
    make_folder(run.folder)
    _tell(everything.account, training, len(images), note)
    if compiled:
        compile_networks(stage.model, stage.device, stage.perceptual)
    with watched(run, report, tensorboard, wandb, quiet or not group.is_main) as run:
        return train(stage, run)


def estimate_tokenizer(
    data: Sequence[str | Path],
    *,
    config: TokenizerConfig | None = None,
    training: TokenizerTrainingConfig | None = None,
    init: str | Path | None = None,
    holdout: int = 0,
    out: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    note: Callable[[str], None] = lambda line: None,
) -> TrainingEstimate:
    """What training a tokenizer will take; arguments as for `train_tokenizer`."""
    training = training or TokenizerTrainingConfig()
    begun = None if init is None else load_tokenizer(resolve_checkpoint(str(init)))
    where, bf16 = _device_and_bf16(device, dtype, out)
    everything = _images(data)
    images, held = everything.split(holdout)
    check_batch(training.batch, training.accumulate, ProcessGroup())
    model, discriminator = _plain_tokenizer(config, training, begun, note)
    stage = TokenizerStage(model.to(where), discriminator.to(where), training, images, held, bf16=bf16)
    prepare_training(stage.model, stage.device, bf16=bf16)
    _tell(everything.account, training, len(images), note)
    return estimate(stage, training, len(images))


def tokenizer_shape(init: str | Path, **changes: Any) -> TokenizerConfig:
    """Return the shape of the tokenizer or model `init`, with changes.

    Raises:
        UsageError: there is no such shape.
        CheckpointError: there is no such tokenizer.
    """
    path = resolve_checkpoint(str(init))
    return replace(read_config(path, read_metadata(path)[0], TokenizerConfig, "tokenizer_config"), **changes)


def _plain_tokenizer(
    config: TokenizerConfig | None,
    training: TokenizerTrainingConfig,
    begun: Tokenizer | None,
    note: Callable[[str], None],
) -> tuple[Tokenizer, PatchDiscriminator]:
    """A tokenizer with its first weights, and its discriminator.

    Of weights of another shape to begin with, it takes those of the encoder and the decoder whose names and shapes are
    the same. The quantizer then starts from random weights, since it gets other feature maps.

    Raises:
        UsageError: images are too small for the discriminator, or it is used and the decoder's last layer is frozen.
    """
    config = config or (begun.config if begun else TokenizerConfig())
    if training.gan > 0 and config.pixels < SMALLEST_PATCH:
        raise UsageError(
            f"--gan must be 0 for images of fewer than {SMALLEST_PATCH} pixels per side: the discriminator judges "
            f"patches of that size (got {training.gan:g} and {config.pixels} pixels)"
        )
    model, discriminator = build_tokenizer(config, training.seed)
    if begun is not None and config == begun.config:
        model.load_state_dict(begun.state_dict())
    elif begun is not None:
        own, given = model.state_dict(), begun.state_dict()
        names = [name for name in own.keys() & given.keys() if name.startswith(("encoder.", "decoder."))]
        kept = {name: given[name] for name in names if given[name].shape == own[name].shape}
        model.load_state_dict(own | kept)
        note(
            f"{len(kept)} of {len(own)} tensors are those of --init; the quantizer and tensors of another "
            "shape start from random weights"
        )
    optim.freeze(model, training.freeze)
    if training.gan > 0 and not model.decoder.conv_out.weight.requires_grad:
        raise UsageError(
            f"--gan must be 0 where --freeze leaves out the decoder's last layer (got {training.gan:g}): "
            "the weight of the adversarial loss is that layer's gradient"
        )
    return model, discriminator


def train_transformer(
    data: Sequence[str | Path],
    tokenizer: str | Path | None,
    out: str | Path,
    *,
    depth: int | None = None,
    width: int | None = None,
    shared_adaln: bool = False,
    training: TransformerTrainingConfig | None = None,
    init: str | Path | None = None,
    token_cache: str | Path | None = None,
    holdout: int = 0,
    validate_every: int = 1000,
    save_every: int = 500,
    eval_every: int = 0,
    eval_images: int | None = None,
    eval_features: str = "inception-v3-compat",
    eval_weights: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    save_dtype: str = "fp32",
    workers: int | None = None,
    compiled: bool = False,
    flex_attention: bool = False,
    checkpoint_activations: bool = False,
    shard: bool = False,
    tensorboard: bool = False,
    wandb: str | None = None,
    group: ProcessGroup | None = None,
    report: Report = lambda step, steps, figures: None,
    note: Callable[[str], None] = lambda line: None,
    quiet: bool = True,
) -> Metrics:
    """Train a transformer on the token maps of a tokenizer (paper, section 3.1); a stopped run resumes.

    Args:
        data: images with labels: folders of class folders, zips, tar shards or .npz files.
        tokenizer: name or file of a tokenizer or model, whose weights stay as they are; None is that of `init`.
        out: folder of the run; model.safetensors in it is the checkpoint.
        depth: number of blocks, the one dial of the published models; None is that of `init`, or 16.
        width: channels, a multiple of 64; None is that of `init`, or 64 × depth.
        shared_adaln: one modulation for all blocks, as in d36.
        training: the recipe; None is the published one of the nearest depth.
        init: name or file of a model to fine-tune; None is random weights. Its classes that the images have too keep
            their rows, other classes begin at the mean; embeddings are interpolated to other sides.
        token_cache: folder where token maps are kept for this run and others; None is the run's own.
        holdout: the last images of each class kept for validation.
        validate_every: steps between validations, checkpoints and preview images.
        save_every: steps that a killed run loses at most.
        eval_every: steps between measurements of FID of samples against the held-out images; 0 is never.
        eval_images: images to measure; None is as many as are held out, 2000 at most.
        eval_features: the extractor: "inception-v3-compat", "dinov2" or "efficientnet-lite0".
        eval_weights: file of the extractor's weights; None downloads them at the first use.
        device: auto, cpu, cuda or mps.
        dtype: fp32, bf16, or auto: bf16 where it is faster; a run that resumes keeps its own.
        save_dtype: precision of the weights in the checkpoint: fp32, bf16 or fp16.
        workers: data-loading workers; None is one less than cores, 8 at most.
        compiled: compile the networks with torch.compile first, which takes minutes; steps are faster then.
        flex_attention: compute attention by FlexAttention, which skips what is masked; for GPUs.
        checkpoint_activations: keep each block's input alone for the backward pass, to save memory for time.
        shard: have the ranks share weights, gradients and optimizer state, for models that do not fit on one.
        tensorboard: also write figures for TensorBoard.
        wandb: project of Weights & Biases that gets the figures too; None is none.
        group: the ranks that share each batch; None is this process alone.
        report: called with figures as they come.
        note: takes remarks for the user.
        quiet: show no progress bars.

    Returns:
        The last figures.

    Raises:
        VarError: images or the tokenizer cannot be used, the folder holds another run, or the loss is not finite.
    """
    check_packages(tensorboard, wandb)
    training = training or default_recipe(depth, init)
    group = group or ProcessGroup()
    begun = _model_to_tune(init, depth, width, shared_adaln, training.cca > 0)
    if shard and group.world_size == 1:
        raise UsageError("--shard needs several processes: --nproc 2 or more, or torchrun")
    if shard and training.cca > 0:
        raise UsageError("--shard cannot share the second model of --cca: leave one of them out")
    where, bf16 = _device_and_bf16(device, dtype, out)
    if flex_attention:
        check_flex_attention(where)
    everything = _images(data)
    images, held = everything.split(holdout)
    check_batch(training.batch, training.accumulate, group)
    frozen, model = _plain_transformer(tokenizer, begun, images.classes, training, depth, width, shared_adaln, note)
    stage = TransformerStage(
        model if shard else model.to(where),  # a model to be sharded may not fit
        training,
        frozen.to(where),
        images.classes,
        bf16=bf16,
        group=group,
        shard_on=where if shard else None,
        save_dtype=DTYPES[save_dtype],
    )
    sha256 = tokenizer_sha256(stage.tokenizer)
    identity = optim.identity(
        images.fingerprint(),
        stage.device,
        stage.bf16,
        model=stage.config,
        training=training,
        tokenizer=sha256,
        init=begun.sha256 if begun else None,
    )
    steps = training.steps(len(images))
    run = Run(
        folder=Path(out),
        steps=steps,
        batch=training.batch,
        identity=identity,
        images=_counts(images),
        copies=_copies(images, note) if group.is_main else 0.0,
        validate_every=validate_every,
        save_every=save_every,
        eval_every=eval_every,
        preview=lambda folder, step: _preview_samples(stage, folder, step),
        note=note,
    )
    check_ranks(run, check_run(run), group)
    if eval_every:
        from varcli.pipelines.run_evaluation import RunEvaluation

        evaluation = RunEvaluation(
            held,
            stage.tokenizer.config.pixels,
            tokenizer=False,
            count=eval_images,
            features=eval_features,
            weights=eval_weights,
            device=stage.device,
            group=group,
            note=note,
        )
        run = replace(run, evaluate=lambda: evaluation(run.folder / "model.safetensors"))
    prepare_training(stage.model, stage.device, bf16=bf16, flex_attention=flex_attention)
    if checkpoint_activations:
        keep_block_inputs(stage.model)
    if group.world_size == 1:
        check_memory(stage, training)
    make_folder(run.folder)
    _tell(everything.account, training, len(images), note)
    ahead = _worker_count(workers, ENCODE_BATCH * 3 * stage.tokenizer.config.pixels**2, note)
    if compiled:
        compile_networks(stage.model, stage.device)
    cache = Path(token_cache or out)
    stage.held, stage.tokens = _token_caches(
        images, held, stage.tokenizer, training, cache, stage.device, ahead, group, note, quiet
    )
    with watched(run, report, tensorboard, wandb, quiet or not group.is_main) as run:
        return train(stage, run)


def encode_data(
    data: Sequence[str | Path],
    tokenizer: str | Path,
    out: str | Path,
    *,
    training: TransformerTrainingConfig | None = None,
    holdout: int = 0,
    device: str = "auto",
    workers: int | None = None,
    note: Callable[[str], None] = lambda line: None,
    quiet: bool = True,
) -> None:
    """Write the token maps that transformers are trained on to a folder, for `train_transformer`'s `token_cache`.

    Existing tokens are not computed again, and a stopped pass resumes.

    Args:
        data: images with labels: folders of class folders, zips, tar shards or .npz files.
        tokenizer: name or file of a tokenizer or model.
        out: the folder, which may hold the tokens of other data and settings too.
        training: the recipe, of which crops, flip, enlarge and seed shape the tokens.
        holdout: the last images of each class, kept for validation.
        device: auto, cpu, cuda or mps; tokens of one kind of device are not used on another.
        workers: data-loading workers; None is one less than cores, 8 at most.
        note: takes remarks for the user.
        quiet: show no progress bar.

    Raises:
        VarError: images or the tokenizer cannot be used, or the folder cannot be written.
    """
    where = pick_device(device)
    optim.make_deterministic(where)
    everything = _images(data)
    images, held = everything.split(holdout)
    model = load_tokenizer(resolve_checkpoint(str(tokenizer))).to(where).eval()
    for line in everything.account:
        note(f"data: {line}")
    make_folder(Path(out))
    training = training or TransformerTrainingConfig()
    ahead = _worker_count(workers, ENCODE_BATCH * 3 * model.config.pixels**2, note)
    _token_caches(images, held, model, training, Path(out), where, ahead, ProcessGroup(), note, quiet)


def estimate_transformer(
    data: Sequence[str | Path],
    tokenizer: str | Path | None,
    *,
    depth: int | None = None,
    width: int | None = None,
    shared_adaln: bool = False,
    training: TransformerTrainingConfig | None = None,
    init: str | Path | None = None,
    flex_attention: bool = False,
    checkpoint_activations: bool = False,
    holdout: int = 0,
    out: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    note: Callable[[str], None] = lambda line: None,
) -> TrainingEstimate:
    """What training a transformer will take; arguments as for `train_transformer`."""
    training = training or default_recipe(depth, init)
    begun = _model_to_tune(init, depth, width, shared_adaln, training.cca > 0)
    where, bf16 = _device_and_bf16(device, dtype, out)
    if flex_attention:
        check_flex_attention(where)
    everything = _images(data)
    images, _ = everything.split(holdout)
    check_batch(training.batch, training.accumulate, ProcessGroup())
    frozen, model = _plain_transformer(tokenizer, begun, images.classes, training, depth, width, shared_adaln, note)
    stage = TransformerStage(model.to(where), training, frozen.to(where), images.classes, bf16=bf16)
    prepare_training(stage.model, stage.device, bf16=bf16, flex_attention=flex_attention)
    if checkpoint_activations:
        keep_block_inputs(stage.model)
    _tell(everything.account, training, len(images), note)
    expected = None if begun else expected_losses_at(stage.config)  # they are of training from scratch
    return estimate(stage, training, len(images), expected, frozen_copies=int(training.cca > 0))


def default_recipe(depth: int | None = None, init: str | Path | None = None) -> TransformerTrainingConfig:
    """The published recipe of the nearest depth: of the model to fine-tune, or the depth given, or 16.

    Raises:
        CheckpointError: there is no model `init`.
    """
    if init is not None:
        path = resolve_checkpoint(str(init))
        depth = read_config(path, read_metadata(path)[0], TransformerConfig, "transformer_config").depth
    return transformer_recipe(depth or 16)


def _model_to_tune(
    init: str | Path | None, depth: int | None, width: int | None, shared_adaln: bool, contrastive: bool
) -> Checkpoint | None:
    """The model to fine-tune, None if weights are to be random.

    Raises:
        UsageError: its shape is given too, or there is none to contrast with.
        CheckpointError: there is no such model.
    """
    if init is None:
        if contrastive:
            raise UsageError("--cca contrasts with a trained model: give it with --init")
        return None
    if depth is not None or width is not None or shared_adaln:
        raise UsageError(f"--init {init} has its own depth, width and modulation: leave those options out")
    return load_model(resolve_checkpoint(str(init)))


def _plain_transformer(
    tokenizer: str | Path | None,
    begun: Checkpoint | None,
    classes: ClassTable,
    training: TransformerTrainingConfig,
    depth: int | None,
    width: int | None,
    shared_adaln: bool,
    note: Callable[[str], None],
) -> tuple[Tokenizer, Transformer]:
    """The tokenizer whose tokens are learned, and a transformer with its first weights.

    Raises:
        UsageError: no tokenizer is given, `training.cca` contrasts classes and there is only one, or
            `training.scale_drop` leaves out the only scale.
        CheckpointError: its file cannot be used.
        InputError: the weights to begin with do not fit it, or were trained on another tokenizer's tokens.
    """
    if tokenizer is not None:
        trained = load_tokenizer(resolve_checkpoint(str(tokenizer)))
    elif begun is not None:
        trained = begun.tokenizer
    else:
        raise UsageError("--tokenizer is needed: the tokenizer whose tokens the transformer learns")
    if training.scale_drop > 0 and len(trained.config.sides) == 1:
        raise UsageError("--scale-drop leaves out the last scale, and this tokenizer has one scale only")
    if training.cca > 0 and len(classes) < 2:
        raise UsageError(f"--cca contrasts classes: the images must be of two or more (got {len(classes)})")
    if begun is not None and (share := tokens_in_common(begun.tokenizer, trained)) < 0.5:
        raise InputError(
            f"--init {begun.path} was trained on another tokenizer's tokens ({share:.0%} of them mean the same to "
            f"--tokenizer {tokenizer}); leave out one of the two options"
        )
    depth = depth or 16
    shape = begun.transformer.config if begun else None
    config = TransformerConfig(
        depth=shape.depth if shape else depth,
        width=shape.width if shape else 64 * depth if width is None else width,
        sides=trained.config.sides,
        codebook_size=trained.config.codebook_size,
        codebook_width=trained.config.codebook_width,
        class_count=len(classes),
        shared_adaln=shape.shared_adaln if shape else shared_adaln,
    )
    model = build_transformer(config, training)
    if begun is not None:
        kept = warm_start(model, classes, begun.transformer, begun.classes)
        others = "" if kept == len(classes) else "; the others begin at the mean of all"
        note(f"{kept} of {len(classes)} classes are known to the model{others}")
    elif training.adapter:
        note(f"--adapter {training.adapter} without --init: all other weights keep their random values")
    adapt(model, training.adapter)
    optim.freeze(model, training.freeze)
    return trained, model


# --- what both stages take -------------------------------------------------------------------------


def _device_and_bf16(device: str, dtype: str, out: str | Path | None) -> tuple[torch.device, bool]:
    """The device to train on, and whether in bf16; with "auto" a run in the folder `out` keeps its precision."""
    where = pick_device(device)
    optim.make_deterministic(where)
    if dtype != "auto":
        return where, dtype == "bf16"
    begun = None if out is None else begun_in_bf16(Path(out))
    return where, trains_in_bf16(where) if begun is None else begun


def _images(data: Sequence[str | Path]) -> ImageSet:
    return open_images([Path(path) for path in data], require_labels=True, read_headers=False)


FEW_STEPS = 200
"""Runs of fewer steps are hardly more than a warm-up."""


def _tell(account: Sequence[str], training: TrainingConfig, images: int, note: Callable[[str], None]) -> None:
    """Note what was found in the data and left out, and whether the recipe is for far more images."""
    for line in account:
        note(f"data: {line}")
    if images == 1:
        note("data: of a single image the model learns nothing but that image")
    steps = training.steps(images)
    if steps >= FEW_STEPS and training.batch <= images:
        return
    smaller = replace(training, batch=max(1, min(64, images // 8)), accumulate=1)
    advice = f"--batch-size {smaller.batch} makes {smaller.steps(images)}"
    if smaller.batch > training.batch / 2:  # hardly smaller
        advice = f"--epochs {training.epochs * 10:g} makes {10 * steps}"
    note(
        f"only {counted(steps, 'step')} to learn from: {counted(training.epochs, 'epoch')} of "
        f"{counted(images, 'image')} in batches of {training.batch}; {advice}"
    )


def _copies(images: ImageSet, note: Callable[[str], None]) -> float:
    """The part of the images that are exact duplicates of others; more than a few are reported."""
    copies = images.copies()
    if copies > status.MOST_COPIES:
        note(f"data: {copies:.0%} of the training images are exact duplicates of others; leave them out")
    return copies


def _counts(images: ImageSet) -> dict[str, int]:
    """Number of images per class, by the class's folder."""
    return dict(zip((entry.wnid for entry in images.classes.entries), images.class_counts(), strict=True))


SHARED_MEMORY = Path("/dev/shm")
"""Where worker processes on Linux put the images they hand over; containers often give it 64 MB."""


def _worker_count(workers: int | None, batch_bytes: int, note: Callable[[str], None]) -> int:
    """Number of data-loading workers: as requested, or as many as shared memory has room for."""
    wanted = min(8, cores() - 1) if workers is None else workers
    if not wanted or not SHARED_MEMORY.is_dir():
        return wanted
    free = shutil.disk_usage(SHARED_MEMORY).free if os.access(SHARED_MEMORY, os.W_OK) else 0
    fitting = free // (_BATCHES_PER_WORKER * batch_bytes)
    if fitting < wanted:
        note(f"{fitting} processes read images ahead instead of {wanted}: {SHARED_MEMORY} has {free >> 20} MiB free")
    return min(wanted, fitting)


_BATCHES_PER_WORKER = 3
"""Two that a worker reads ahead, and one on its way."""


def _token_caches(
    images: ImageSet,
    held: ImageSet,
    tokenizer: Tokenizer,
    training: TransformerTrainingConfig,
    folder: Path,
    device: torch.device,
    workers: int,
    group: ProcessGroup,
    note: Callable[[str], None],
    quiet: bool,
) -> tuple[TokenCache | None, TokenCache]:
    """Token maps of held-out and training images, from a folder or computed now; None of no held-out images."""
    flip, seed, enlarge = training.flip and training.crops > 1, training.seed, training.enlarge
    crops = CacheSettings(enlarge=enlarge, crops=training.crops, seed=seed, flip=flip)
    wanted = [(held, CacheSettings(enlarge=enlarge, crops=1, seed=seed))] if len(held) else []
    wanted.append((images, crops))
    there = list_caches(folder)
    if there and not cache_path(folder, tokenizer, images, crops, device).exists():
        note(f"{folder} has no token maps of {cache_facts(tokenizer, images, crops, device)}; they are computed now")
        for facts in there:
            note(f"{folder} has token maps of {facts}")
    if not group.is_main:
        group.barrier()  # the main rank has computed what was lacking
    found = []
    for each, settings in wanted:
        with progress("token maps", settings.crops * len(each), quiet) as advance:
            found.append(
                open_cache(folder, tokenizer, each, settings, device, workers=workers, warn=note, progress=advance)
            )
    if group.is_main:
        group.barrier()
    return (found[0] if len(held) else None), found[-1]


def _preview_reconstructions(stage: TokenizerStage, folder: Path, step: int) -> None:
    """Write images, each above what the averaged tokenizer makes of it."""
    pixels = stage.examples(PREVIEW_IMAGES)
    model = stage.average.model
    decoded = decode(model, model.quantize.f_hats(model.encode(pixels))[-1])
    labels = ["image"] * len(pixels) + ["reconstruction"] * len(decoded)
    _write_sheet(folder, step, [*to_pixels(pixels), *decoded], labels, len(pixels))


def _preview_samples(stage: TransformerStage, folder: Path, step: int) -> None:
    """Write images of classes spread over the table, sampled with the averaged weights."""
    entries = stage.classes.entries
    shown = min(PREVIEW_CLASSES, len(entries))
    images, names = [], []
    model = merged(stage.average.model)
    for seed in (0, 1):
        for label in (i * len(entries) // shown for i in range(shown)):
            *_, last = generate(stage.tokenizer, model, [label], [seed], PRESETS["looks"])
            images.append(decode(stage.tokenizer, last.f_hat)[0])
            names.append(entries[label].name)
    _write_sheet(folder, step, images, names, shown)


def _write_sheet(folder: Path, step: int, images: Sequence[Pixels], labels: Sequence[str], columns: int) -> None:
    write_atomically(folder / f"{step:07d}.png", png_bytes(contact_sheet(images, labels, columns)))
