"""Training of the tokenizer; the authors of VAR published no code for it.

‖im - im̂‖² + the quantizer's loss + λ_P · perceptual + λ_G · adversarial (paper, equation 5).

Shapes: B images of P × P pixels, C codebook channels, V codebook rows, S scales, l tokens of one scale.
"""

import itertools
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.checkpoints.store import save_tokenizer
from varcli.config import TokenizerConfig, TokenizerTrainingConfig
from varcli.distributed import ProcessGroup
from varcli.images.dataset import ImageSet
from varcli.models.tokenizer import Tokenizer, quantization_loss
from varcli.training import optim
from varcli.training.data import VALIDATION_BATCH, Batch, Crops, Unreadable, draws, loader, to_unit
from varcli.training.discriminator import PatchDiscriminator, adaptive_weight, augment, discriminator_loss
from varcli.training.loop import autocast
from varcli.training.metrics_log import Metrics
from varcli.training.optim import cosine_factor
from varcli.training.parallel import Rows, data_parallel, rows_of_all, sum_over_ranks, without_averaging

BETAS = (0.5, 0.9)
HIT_DECAY = 0.99
"""Decay per step of the record of codebook hits."""
RECORDED = round(1 / (1 - HIT_DECAY))
"""Steps that the record holds, about."""
REVIVE_EVERY = 100
"""Steps between searches for dead codebook rows."""
REVIVE_UNTIL = 0.9
"""Fraction of training after which rows are left alone, to settle."""
DEAD = 0.01
"""A row is dead when it is hit less often than this fraction of what even use would give."""

COLLAPSED = 0.005
"""A scale has collapsed when its perplexity is below this fraction of the largest possible; tiny64's worst has 0.02."""


def collapsed(perplexity: float, codebook_size: int, tokens: int) -> bool:
    """Whether a scale uses hardly any codebook rows.

    Args:
        perplexity: exp of the entropy of how often each row is used, as many rows as are in even use.
        codebook_size: rows in all.
        tokens: number of tokens that were counted; fewer than rows cannot use all rows.
    """
    return perplexity < max(FEWEST_ROWS, COLLAPSED * min(codebook_size, tokens))


FEWEST_ROWS = 1.5
"""Rows in use, below which any scale has collapsed."""

Perceptual = Callable[[Tensor, Tensor], Tensor]


def build_tokenizer(config: TokenizerConfig, seed: int) -> tuple[Tokenizer, PatchDiscriminator]:
    """A plain tokenizer and its discriminator, with the initial weights of a seed."""
    torch.manual_seed(seed)
    return Tokenizer(config), PatchDiscriminator()


class Reconstruction(nn.Module):
    """A tokenizer as training runs it: encoding and decoding, with a straight-through gradient."""

    def __init__(self, tokenizer: Tokenizer, bf16: bool, commitment: float) -> None:
        super().__init__()
        self.tokenizer, self.bf16, self.commitment = tokenizer, bf16, commitment

    def forward(self, image_B3PP: Tensor, scales: int | None) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Return pixels, the quantizer's loss, and each scale's tokens (B, l) and residuals (B, l, C)."""
        model, device = self.tokenizer, image_B3PP.device
        with autocast(device, self.bf16):
            f_BCHW = model.features(image_B3PP).float()
        quantized = model.quantize.quantize(f_BCHW, scales)
        straight_BCHW = f_BCHW + (quantized.f_hats[-1] - f_BCHW).detach()
        with autocast(device, self.bf16):
            decoded = model.decode_features(straight_BCHW).float()
        return decoded, quantization_loss(quantized, f_BCHW, self.commitment), quantized.tokens, quantized.residuals


class TokenizerStage:
    """A tokenizer, its discriminator, their optimizers and losses."""

    def __init__(
        self,
        model: Tokenizer,
        discriminator: PatchDiscriminator,
        training: TokenizerTrainingConfig,
        images: ImageSet,
        held: ImageSet,
        *,
        bf16: bool,
        group: ProcessGroup | None = None,
        warm: bool = False,
        workers: int = 0,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Take models on their device, warm-started if at all; with several ranks they are wrapped here.

        Args:
            model: the tokenizer to train.
            discriminator: learns to tell its reconstructions from images.
            training: the recipe.
            images: training images.
            held: images held out for validation.
            bf16: run the networks in bf16 autocast.
            group: the ranks that share each batch; None is this process alone.
            warm: the model's weights, its codebook among them, come from a checkpoint.
            workers: data-loading workers.
            warn: called with a line for each image that cannot be read, and each scale that collapses.
        """
        self.config, self.training, self.bf16 = model.config, training, bf16
        self.device = model.quant_conv.weight.device
        self.images, self.held, self.workers = images, held, workers
        self.perceptual: Perceptual | None = None
        self.warm = warm
        self.unreadable = Unreadable(len(images), warn)
        self.warn = warn
        self.collapsed: set[int] = set()
        """Numbers of the scales, from 1, that were reported as collapsed."""
        self.adversarial = False
        self.scales: int | None = None
        self.quantized: list[tuple[list[Tensor], list[Tensor]]] = []
        """Tokens (B, l) and residuals (B, l, C) of each scale, for each part of the step's batch."""
        self.model = model.to(memory_format=torch.channels_last)
        self.average = optim.MovingAverage(self.model, training.ema)
        self.optimizer = optim.adamw(self.model, BETAS, exempt=("quantize.embedding",))
        self.discriminator = discriminator.to(memory_format=torch.channels_last)
        self.discriminator_optimizer = optim.adamw(self.discriminator, BETAS)
        self.group = group or ProcessGroup()
        # A step that leaves out scales uses no φ of theirs.
        reconstruction = Reconstruction(self.model, bf16, training.commitment)
        self.reconstruct = data_parallel(reconstruction, self.group, self.device, unused=True)
        self.judge = data_parallel(self.discriminator, self.group, self.device)

    def batches(self, steps: range) -> Generator[Batch, None, None]:
        """Yield images as (B, 3, P, P) uint8, with the names of unreadable ones."""
        training = self.training
        crops = Crops(self.images, self.config.pixels, training.enlarge, training.seed, flip=training.flip)
        chosen = draws(len(self.images), training.batch, steps, training.seed, self.group)
        yield from loader(crops, chosen, self.workers)

    def prepare(self, batch: Batch, step: int, steps: int) -> Sequence[Tensor]:
        """Set learning rates, whether the discriminator takes part, and how many scales the step uses."""
        training = self.training
        pixels, unreadable = batch
        self.unreadable.add(itertools.chain(*unreadable))
        parts = pixels.chunk(training.accumulate)
        if step == 0 and not self.warm:
            self.begin_codebook(parts)
        rate = training.lr * cosine_factor(step, steps, training.final_lr)
        for optimizer in (self.optimizer, self.discriminator_optimizer):
            optim.set_rates(optimizer, rate, training.weight_decay)
        self.adversarial = training.gan > 0 and step >= training.gan_start * steps
        self.scales = self.draw_scales(step)
        return parts

    def trial_loss(self, count: int) -> Tensor:
        """Return the reconstruction loss of `count` random images, with its gradient."""
        pixels = torch.randint(256, (count, 3, self.config.pixels, self.config.pixels), dtype=torch.uint8)
        image = to_unit(pixels, self.device)
        decoded, quantization, _, _ = self.reconstruct(image, None)
        return F.mse_loss(decoded, image) + quantization

    def gradient_norm(self) -> Tensor:
        """The norm of all gradients, the discriminator's included, before those of the tokenizer are clipped."""
        norm = torch.nn.utils.get_total_norm(gradients(self.model) + gradients(self.discriminator))
        if self.training.clip_grad:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip_grad)
        return norm

    def apply_gradients(self, step: int, steps: int) -> None:
        """Let the optimizers and the moving average step, and revive dead codebook rows now and then."""
        self.optimizer.step()
        if self.adversarial:
            self.discriminator_optimizer.step()
        self.average.update(self.model, step)
        self.note_hits()
        learning = self.model.quantize.embedding.weight.requires_grad
        if learning and step % REVIVE_EVERY == REVIVE_EVERY - 1 and step < REVIVE_UNTIL * steps:
            self.revive_codes()

    def clear_gradients(self) -> None:
        """Forget the gradients of both networks, and the step's tokens."""
        self.quantized = []
        self.optimizer.zero_grad()
        self.discriminator_optimizer.zero_grad()

    def draw_scales(self, step: int) -> int | None:
        """How many scales a step uses: all (None), or fewer with the probability `scale_drop`."""
        generator = random.Random(f"{self.training.seed} scales {step}")
        if generator.random() >= self.training.scale_drop:
            return None
        return generator.randint(1, max(len(self.config.sides) - 1, 1))

    def add_gradients(self, part: Tensor, rows: Rows, last: bool) -> dict[str, Tensor]:
        """Add the gradients of a part of the batch (B, 3, P, P) uint8; returns its figures.

        Source: equation 5.
        """
        image = to_unit(part, self.device)
        with without_averaging(self.reconstruct, last):
            decoded, quantization, tokens, residuals = self.reconstruct(image, self.scales)
            # Each loss is differentiated with respect to the pixels once: the adaptive weight needs these gradients,
            # and one backward pass takes their sum through the decoder.
            pixels_B3PP = decoded.detach().requires_grad_()
            squared = F.mse_loss(pixels_B3PP, image)
            metrics = {"squared_error": squared, "quantization": quantization}
            pull = squared
            if self.perceptual is not None:
                with autocast(self.device, self.bf16):
                    metrics["perceptual"] = self.perceptual(pixels_B3PP, image)
                pull = squared + self.training.perceptual_weight * metrics["perceptual"]
            (gradient_B3PP,) = torch.autograd.grad(pull, pixels_B3PP)
            loss = pull + quantization
            if self.adversarial:
                self.discriminator.requires_grad_(False)
                push = -self.discriminator(augment(pixels_B3PP, rows)).mean()
                self.discriminator.requires_grad_(True)
                (push_B3PP,) = torch.autograd.grad(push, pixels_B3PP)
                last_layer = self.model.decoder.conv_out.weight
                weight = self.training.gan * adaptive_weight(decoded, last_layer, gradient_B3PP, push_B3PP, self.group)
                metrics["adversarial"] = push
                loss = loss + weight * push
                gradient_B3PP = gradient_B3PP + weight * push_B3PP
            share = 1 / self.training.accumulate
            pairs = [(decoded, share * gradient_B3PP), (quantization, quantization.new_tensor(share))]
            # One of them needs no gradient where all weights that it depends on are frozen.
            outputs, gradients = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
            torch.autograd.backward(outputs, gradients)
        if self.adversarial:
            with without_averaging(self.judge, last):
                metrics["adversary"] = self.add_discriminator_gradients(image, decoded.detach(), rows)
        self.quantized.append((tokens, residuals))
        return metrics | {"loss": loss}

    def add_discriminator_gradients(self, image: Tensor, decoded: Tensor, rows: Rows) -> Tensor:
        """Add the discriminator's gradients and return its loss."""
        loss = discriminator_loss(self.judge(augment(image, rows)), self.judge(augment(decoded, rows)))
        (loss / self.training.accumulate).backward()
        return loss

    @torch.no_grad()
    def begin_codebook(self, parts: Sequence[Tensor]) -> None:
        """Draw the first codebook from the features of the first images, so that no row starts dead."""
        features = torch.cat([self.model.features(to_unit(pixels, self.device)) for pixels in parts])
        features = rows_of_all(features, self.group)
        rows = features.permute(0, 2, 3, 1).flatten(0, 2)
        weight = self.model.quantize.embedding.weight
        chosen = torch.randint(len(rows), (len(weight),), device=rows.device)
        # Later scales quantize what earlier ones left over, so rows of every size are of use.
        weight.copy_(rows[chosen] * torch.rand(len(weight), 1, device=rows.device))

    @torch.no_grad()
    def note_hits(self) -> None:
        """Update the record of hits per scale and row with the step's tokens, of all parts and ranks."""
        hits_SV = self.model.quantize.ema_vocab_hit_SV
        scales = zip(*(tokens for tokens, _ in self.quantized), strict=True)
        counts_SV = torch.stack(
            [torch.bincount(torch.cat(parts).flatten(), minlength=hits_SV.shape[1]) for parts in scales]
        )
        counts_SV = sum_over_ranks(counts_SV, self.group).to(hits_SV.dtype)
        hits_SV[: len(counts_SV)].lerp_(counts_SV, 1 - HIT_DECAY)

    @torch.no_grad()
    def observe(self, step: int) -> dict[str, Tensor]:
        """Return the learning rate, and each scale's use of the codebook over the last steps (S,).

        A scale that collapses is reported, once.
        """
        hits_SV = self.model.quantize.ema_vocab_hit_SV
        share_SV = hits_SV / hits_SV.sum(1, keepdim=True).clamp(min=1e-12)
        perplexity_S = torch.special.entr(share_SV).sum(1).exp()
        usage_S = (share_SV > DEAD / hits_SV.shape[1]).float().mean(1)
        for scale, (side, perplexity) in enumerate(zip(self.config.sides, perplexity_S.tolist(), strict=True), 1):
            tokens = RECORDED * self.training.batch * side * side
            bad = step >= RECORDED and collapsed(perplexity, self.config.codebook_size, tokens)
            if bad and scale not in self.collapsed:
                self.collapsed.add(scale)
                self.warn(
                    f"scale {scale} has collapsed: perplexity {perplexity:.1f} of {self.config.codebook_size} codebook "
                    "rows; try a lower --base-lr, a higher --scale-drop, or a smaller --codebook-size"
                )
        return {
            "learning_rate": optim.learning_rate(self.optimizer),
            "codebook_usage": usage_S,
            "codebook_perplexity": perplexity_S,
        }

    @torch.no_grad()
    def revive_codes(self) -> None:
        """Replace unused codebook rows by residuals of the step's images."""
        hits_V = self.model.quantize.ema_vocab_hit_SV.sum(0)
        dead = (hits_V < DEAD * hits_V.mean()).nonzero().flatten()
        weight = self.model.quantize.embedding.weight
        scales = zip(*(residuals for _, residuals in self.quantized), strict=True)
        residuals = torch.cat([rows_of_all(torch.cat(parts), self.group).flatten(0, 1) for parts in scales])
        chosen = torch.randint(len(residuals), (len(dead),), device=dead.device)
        weight[dead] = residuals[chosen].to(weight.dtype)
        self.average.model.quantize.embedding.weight[dead] = weight[dead]  # an average with dead rows helps nobody
        for key in ("exp_avg", "exp_avg_sq"):
            self.optimizer.state[weight][key][dead] = 0

    def examples(self, count: int) -> Tensor:
        """Return images in [-1, 1] to show, spread over the held-out ones, or the training ones if there are none."""
        images = self.held if len(self.held) else self.images
        count = min(count, len(images))
        crops = Crops(images, self.config.pixels, self.training.enlarge, None)
        chosen = [(i * len(images) // count, 0) for i in range(count)]
        return to_unit(torch.stack([crops[draw][0] for draw in chosen]), self.device)

    @torch.no_grad()
    def validate(self) -> Metrics:
        """Return PSNR in dB, and the part of the codebook in use at each scale, on the held-out images.

        The ranks share the images.
        """
        model = self.average.model
        used_SV = torch.zeros_like(model.quantize.ema_vocab_hit_SV, dtype=torch.bool)
        psnr: list[float] = []
        for pixels, _ in self.held_out_batches():
            image = to_unit(pixels, self.device)
            tokens = model.encode(image)
            for scale, idx_Bl in enumerate(tokens):
                used_SV[scale, idx_Bl.flatten()] = True
            error_B = (model.decode(tokens) - image).square().mean((1, 2, 3))
            psnr += (10 * torch.log10(4 / error_B.clamp(min=1e-10))).tolist()
        found = self.group.gather((psnr, used_SV.cpu()))
        if not self.group.is_main or not self.held:
            return {}
        usage = torch.stack([used_SV for _, used_SV in found]).any(0).float().mean(1).tolist()
        figures = {"psnr": fmean(value for some, _ in found for value in some)}
        return figures | {f"codebook_usage_{k + 1}": value for k, value in enumerate(usage)}

    def held_out_batches(self) -> Iterator[Batch]:
        """Yield this rank's share of the held-out images, cropped at the centre."""
        crops = Crops(self.held, self.config.pixels, self.training.enlarge, None)
        numbers = [(i, 0) for i in range(len(self.held))]
        batches = [numbers[i : i + VALIDATION_BATCH] for i in range(0, len(numbers), VALIDATION_BATCH)]
        yield from loader(crops, list(self.group.shard(batches)), workers=0)

    def tensors(self) -> optim.Tensors:
        """Return the whole state."""
        parts: dict[str, nn.Module] = {
            "model": self.model,
            "average": self.average.model,
            "adversary": self.discriminator,
        }
        found: optim.Tensors = {}
        for prefix, module in parts.items():
            found |= optim.with_prefix(prefix, module.state_dict())
        found |= optim.with_prefix("optimizer", optim.optimizer_tensors(self.optimizer, self.model))
        moments = optim.optimizer_tensors(self.discriminator_optimizer, self.discriminator)
        return found | optim.with_prefix("adversary_optimizer", moments)

    def load_tensors(self, tensors: optim.Tensors) -> None:
        """Set the state that `tensors` returned."""
        self.model.load_state_dict(optim.without_prefix("model", tensors))
        self.average.model.load_state_dict(optim.without_prefix("average", tensors))
        self.discriminator.load_state_dict(optim.without_prefix("adversary", tensors))
        moments = optim.without_prefix("optimizer", tensors)
        optim.load_optimizer_tensors(self.optimizer, self.model, moments)
        moments = optim.without_prefix("adversary_optimizer", tensors)
        optim.load_optimizer_tensors(self.discriminator_optimizer, self.discriminator, moments)

    def save(self, folder: Path, figures: Metrics, step: int) -> None:
        """Write the averaged tokenizer, with the record of codebook hits, to tokenizer.safetensors."""
        self.average.model.quantize.ema_vocab_hit_SV.copy_(self.model.quantize.ema_vocab_hit_SV)
        facts = {"step": step, "images_seen": step * self.training.batch, **figures}
        save_tokenizer(folder / "tokenizer.safetensors", self.average.model, facts)


def gradients(model: nn.Module) -> list[Tensor]:
    """Return the gradients of all weights that have one."""
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
