"""Training of the transformer on the token maps of a frozen tokenizer.

Shapes: B images, L tokens of all scales, l of one, C codebook channels, V codebook rows.
"""

import copy
import math
import random
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from varcli.acceleration.devices import memory_bytes
from varcli.checkpoints.store import save_model
from varcli.classes import ClassTable
from varcli.config import TransformerConfig, TransformerTrainingConfig, spans
from varcli.distributed import ProcessGroup
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer
from varcli.training import optim
from varcli.training.data import VALIDATION_BATCH, TokenCache, draws
from varcli.training.finetune import contrastive_loss, merged, other_labels
from varcli.training.loop import autocast
from varcli.training.metrics_log import Metrics, by_scale
from varcli.training.optim import initialize_transformer
from varcli.training.parallel import (
    Rows,
    data_parallel,
    gather,
    load_whole,
    shard,
    share_rows,
    without_averaging,
)

BETAS = (0.9, 0.95)
WITHOUT_DECAY = ("pos_start", "pos_1LC", "lvl_embed", "ada_gss", "scale_mul_1H11")
GAIN_BATCHES = 16
"""Validation batches, spread over the held-out images, that are computed with wrong labels too."""
FREQUENCY_IMAGES = 4096
"""Images, spread over the data, whose tokens are counted."""

Batch = tuple[Tensor, Tensor]


def build_transformer(config: TransformerConfig, training: TransformerTrainingConfig) -> Transformer:
    """A plain transformer with the initial weights of the recipe's seed."""
    torch.manual_seed(training.seed)
    model = Transformer(config)
    initialize_transformer(model, training.gamma_init)
    return model


def keep_block_inputs(model: Transformer) -> None:
    """Keep only the input of each block for the backward pass, which computes the rest again.

    The last block is left out: its backward pass follows at once, so nothing would be saved.

    Source: Chen et al. 2016, arXiv 1604.06174.
    """
    for block in list(model.blocks)[:-1]:
        # It draws the same random numbers again.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def token_weights(sides: Sequence[int], rule: str) -> Tensor:
    """Return the weight of each token in the loss, (L,), 1 on average.

    Args:
        sides: of the scales.
        rule: "mean" for every token alike, as in the paper, or "side" for 1/side, so that coarse scales, which
            have few tokens, weigh more (Infinity, arXiv 2412.04431).
    """
    weight_L = torch.cat([torch.full((side * side,), 1 / side if rule == "side" else 1.0) for side in sides])
    return weight_L / weight_L.mean()


def spans_within(sides: Sequence[int], length: int) -> list[slice]:
    """Return the spans of the first scales, whose tokens are `length` in all."""
    return [part for part in spans(sides) if part.stop <= length]


LOGITS_SHARE = 1 / 32
"""Part of a device's memory that the logits of a batch may fill; training needs about three times their memory."""


def tokens_at_once(rows: int, config: TransformerConfig, device: torch.device) -> int | None:
    """Return for how many tokens logits are computed at once; None is for all tokens of `rows` images.

    It depends on the size of the memory, not on what is free of it, so that a resumed run rounds as before.
    """
    most = (memory_bytes(device) or math.inf) * LOGITS_SHARE / (4 * config.codebook_size)
    return None if rows * config.length <= most else max(int(most), 1)


def token_losses(tokens_BL: Tensor, at_once: int | None, head: nn.Module, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's cross-entropy, and 1 where it is the likeliest, (B, L) each.

    Args:
        tokens_BL: the true tokens.
        at_once: for how many tokens logits are computed at once. The parts are computed again in the backward pass, and
            none is kept. None computes and keeps all.
        head: gives logits.
        x_BLD: what it takes.
    """

    def losses(x_ND: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor]:
        logits_NV = head(x_ND).float()
        loss_N = F.cross_entropy(logits_NV, token_N, reduction="none")
        return loss_N, (logits_NV.argmax(-1) == token_N).float()

    x_ND, token_N = x_BLD.flatten(0, 1), tokens_BL.flatten()
    if at_once is None:
        loss_N, hit_N = losses(x_ND, token_N)
    else:
        parts = zip(x_ND.split(at_once), token_N.split(at_once), strict=True)
        computed = [checkpoint(losses, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        loss_N, hit_N = (torch.cat(found) for found in zip(*computed, strict=True))
    return loss_N.view(tokens_BL.shape), hit_N.view(tokens_BL.shape)


def frequency_loss(tokens: TokenCache, held: TokenCache, config: TransformerConfig) -> float:
    """Return the cross-entropy, in nats per token, of held-out tokens under each scale's token frequencies in training.

    A model that has learned anything beyond these frequencies is below it.
    """
    some_BL, held_BL = (
        cache.batch([(i, 0) for i in range(0, len(cache), math.ceil(len(cache) / FREQUENCY_IMAGES))])[0]
        for cache in (tokens, held)
    )
    total = 0.0
    for part in spans(config.sides):
        count_V = 1 + torch.bincount(some_BL[:, part].flatten(), minlength=config.codebook_size)
        total -= float((count_V / count_V.sum()).log()[held_BL[:, part]].sum())
    return total / held_BL.numel()


class TransformerStage:
    """A transformer, its frozen tokenizer, its optimizer and loss."""

    def __init__(
        self,
        model: Transformer,
        training: TransformerTrainingConfig,
        tokenizer: Tokenizer,
        classes: ClassTable,
        *,
        bf16: bool,
        group: ProcessGroup | None = None,
        shard_on: torch.device | None = None,
        save_dtype: torch.dtype = torch.float32,
        tokens: TokenCache | None = None,
        held: TokenCache | None = None,
    ) -> None:
        """Take a model on its device, warm-started if at all.

        Args:
            model: the transformer to train.
            training: the recipe.
            tokenizer: makes the tokens; its weights stay as they are.
            classes: the model's class table.
            bf16: run the network in bf16 autocast.
            group: the ranks that share each batch; None is this process alone.
            shard_on: shard the model over the ranks, on this device; None keeps it whole on each.
            save_dtype: precision of the weights in the checkpoint.
            tokens: token maps of the training images; None only estimates.
            held: token maps of images held out for validation.
        """
        self.model, self.config, self.training, self.bf16 = model, model.config, training, bf16
        self.device = shard_on or model.head.weight.device
        self.classes, self.tokens, self.held, self.save_dtype = classes, tokens, held, save_dtype
        self.weight_L = token_weights(self.config.sides, training.scale_weight).to(self.device)
        self.tokenizer = tokenizer.to(self.device).eval().requires_grad_(False)
        self.group = group or ProcessGroup()
        self.reference = copy.deepcopy(model).eval().requires_grad_(False) if training.cca > 0 else None
        """The model before fine-tuning, where it is contrasted with."""
        rows = training.batch // training.accumulate // self.group.world_size * (2 if training.cca > 0 else 1)
        self.at_once = tokens_at_once(rows, self.config, self.device)
        self.average = optim.MovingAverage(self.model, training.ema)
        self.network: nn.Module = self.model
        if shard_on is not None:
            shard(self.model, self.group, shard_on, bf16=bf16)
            self.average.shard_like(self.model)
            self.average.model.to(shard_on)  # its buffers
        else:
            self.network = data_parallel(self.model, self.group, self.device)
        self.optimizer = optim.adamw(self.model, BETAS, exempt=WITHOUT_DECAY)

    def batches(self, steps: range) -> Generator[Batch, None, None]:
        """Yield tokens (B, L) and labels (B,) of this rank's rows of each step."""
        assert self.tokens is not None, "a stage without tokens only plans"
        for chosen in draws(len(self.tokens), self.training.batch, steps, self.training.seed, self.group):
            yield self.tokens.batch(chosen)

    def prepare(self, batch: Batch, step: int, steps: int) -> Sequence[Batch]:
        """Set learning rate and weight decay of the step."""
        training = self.training
        rate = training.lr * optim.linear_factor(step, steps, training.final_lr)
        decay = optim.weight_decay(step, steps, training.weight_decay, training.final_weight_decay)
        optim.set_rates(self.optimizer, rate, decay)
        self.model.train()
        tokens_BL, label_B = batch
        # The scales before the last are trained more often: they cost little, and decide what the image shows.
        if random.Random(f"{training.seed} scales {step}").random() < training.scale_drop:
            tokens_BL = tokens_BL[:, : spans(self.config.sides)[-1].start]
        return list(zip(tokens_BL.chunk(training.accumulate), label_B.chunk(training.accumulate), strict=True))

    def add_gradients(self, part: Batch, rows: Rows, last: bool) -> dict[str, Tensor]:
        """Add the gradients of a part of the batch, some of its labels dropped; returns its figures."""
        tokens_BL, label_B = part
        tokens_BL, label_B = tokens_BL.to(self.device), label_B.to(self.device)
        with without_averaging(self.network, last):
            if self.reference is None:
                label_B = self.model.drop_labels(label_B, rows.first, rows.total)
                share_rows(self.model, rows)
                loss_BL, hit_BL = self.predict(self.network, tokens_BL, label_B)
                figures, loss = self.figures(loss_BL, hit_BL), (loss_BL * self.weight_L[: tokens_BL.shape[1]]).mean()
            else:
                figures, loss = self.contrast(self.reference, tokens_BL, label_B, rows)
            (loss / self.training.accumulate).backward()
        return figures

    def contrast(
        self, reference: nn.Module, tokens_BL: Tensor, label_B: Tensor, rows: Rows
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the figures under the images' own labels, and the contrastive loss. Source: arXiv 2410.09347."""
        labels_2B = torch.stack([label_B, other_labels(label_B, self.config.class_count, rows)], 1).flatten()
        tokens_2BL = tokens_BL.repeat_interleave(2, 0)
        share_rows(self.model, Rows(2 * rows.first, 2 * rows.count, 2 * rows.total))
        loss_2BL, hit_2BL = self.predict(self.network, tokens_2BL, labels_2B)
        with torch.no_grad():
            before_2BL, _ = self.predict(reference, tokens_2BL, labels_2B)
        weight_L = self.weight_L[: tokens_BL.shape[1]]
        (own_BL, other_BL), (own_before_BL, other_before_BL) = (
            (loss[::2] * weight_L, loss[1::2] * weight_L) for loss in (loss_2BL, before_2BL)
        )
        lam, beta = self.training.cca, self.training.cca_beta
        loss = contrastive_loss(own_BL, other_BL, own_before_BL, other_before_BL, lam, beta)
        return self.figures(loss_2BL[::2], hit_2BL[::2]) | {"contrastive": loss}, loss

    def gradient_norm(self) -> Tensor:
        """The norm of all gradients before they are clipped."""
        largest = self.training.clip_grad or torch.inf
        return gather(torch.nn.utils.clip_grad_norm_(self.model.parameters(), largest))

    def apply_gradients(self, step: int, steps: int) -> None:
        """Let the optimizer and the moving average step."""
        self.optimizer.step()
        self.average.update(self.model, step)

    def clear_gradients(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad()

    def trial_loss(self, count: int) -> Tensor:
        """Return the loss of `count` random images, with its gradient."""
        tokens_BL = torch.randint(self.config.codebook_size, (count, self.config.length), device=self.device)
        label_B = torch.randint(self.config.class_count, (count,), device=self.device)
        self.model.train()
        if self.reference is not None:
            return self.contrast(self.reference, tokens_BL, label_B, Rows(0, count, count))[1]
        return self.predict(self.model, tokens_BL, label_B)[0].mean()

    def predict(self, model: nn.Module, tokens_BL: Tensor, label_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return each token's cross-entropy, and 1 where it is the likeliest, (B, L) each. Source: section 3.1.

        The tokens may be those of the first scales only.
        """
        parts = spans_within(self.config.sides, tokens_BL.shape[1])
        with torch.no_grad():
            teacher_BLC = self.tokenizer.quantize.teacher_input([tokens_BL[:, part] for part in parts])
        with autocast(self.device, self.bf16):
            losses: tuple[Tensor, Tensor] = model(label_B, teacher_BLC, partial(token_losses, tokens_BL, self.at_once))
        return losses

    def figures(self, loss_BL: Tensor, hit_BL: Tensor) -> dict[str, Tensor]:
        """Return cross-entropy and accuracy: over all tokens alike, over the last scale's, and of each scale."""
        found: dict[str, Tensor] = {}
        for name, value_BL in (("loss", loss_BL), ("accuracy", hit_BL)):
            found[name] = value_BL.mean()
            parts = spans_within(self.config.sides, value_BL.shape[1])
            scales = {f"{name}_scale_{k}": value_BL[:, part].mean() for k, part in enumerate(parts, 1)}
            if len(scales) == len(self.config.sides):
                found[f"{name}_last"] = scales[f"{name}_scale_{len(scales)}"]
            found |= scales
        return found

    def observe(self, step: int) -> dict[str, Tensor]:
        """Return the learning rate."""
        return {"learning_rate": optim.learning_rate(self.optimizer)}

    @torch.no_grad()
    def validate(self) -> Metrics:
        """Return the averaged weights' figures on held-out images, no label dropped. The ranks share the images.

        Among them are what the labels are worth, `label_gain`: the loss with another class's label minus the loss with
        the right one, in nats per token; and what the token frequencies alone would reach, `frequency_loss`.
        """
        if self.held is None or self.tokens is None:
            return {}
        sum_2L = torch.zeros(2, self.config.length)
        gains: list[float] = []
        batches = torch.arange(len(self.held)).split(VALIDATION_BATCH)
        for number, images in self.group.shard(enumerate(batches)):
            drawn = self.held.batch([(i, 0) for i in images.tolist()])
            tokens_BL, label_B = (part.to(self.device) for part in drawn)
            loss_BL, hit_BL = self.predict(self.average.model, tokens_BL, label_B)
            sum_2L += torch.stack([loss_BL, hit_BL]).sum(1).cpu()
            if number % math.ceil(len(batches) / GAIN_BATCHES) == 0:
                wrong_B = (label_B + 1) % self.config.class_count
                gain_BL = self.predict(self.average.model, tokens_BL, wrong_B)[0] - loss_BL
                gains += gain_BL.mean(1).tolist()
        found = self.group.gather((sum_2L, gains))
        if not self.group.is_main:
            return {}
        mean_2L = torch.stack([part_2L for part_2L, _ in found]).sum(0) / len(self.held)
        figures = by_scale(self.figures(*mean_2L.unsqueeze(1)))
        figures["label_gain"] = fmean(gain for _, some in found for gain in some)
        return figures | {"frequency_loss": frequency_loss(self.tokens, self.held, self.config)}

    def tensors(self) -> optim.Tensors:
        """Return the whole state."""
        found = optim.with_prefix("model", self.model.state_dict())
        found |= optim.with_prefix("average", self.average.model.state_dict())
        return found | optim.with_prefix("optimizer", optim.optimizer_tensors(self.optimizer, self.model))

    def load_tensors(self, tensors: optim.Tensors) -> None:
        """Set the state that `tensors` returned."""
        load_whole(self.model, optim.without_prefix("model", tensors))
        load_whole(self.average.model, optim.without_prefix("average", tensors))
        moments = optim.without_prefix("optimizer", tensors)
        optim.load_optimizer_tensors(self.optimizer, self.model, moments)

    def save(self, folder: Path, figures: Metrics, step: int) -> None:
        """Write the averaged transformer, adapters merged, with its tokenizer to model.safetensors."""
        facts = {"step": step, "images_seen": step * self.training.batch, **figures}
        facts["images"] = len(self.tokens) if self.tokens else 0
        file = folder / "model.safetensors"
        save_model(file, self.tokenizer, merged(self.average.model), self.classes, facts, self.save_dtype)
