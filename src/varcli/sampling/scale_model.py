"""The transformer during sampling: one batch of images, scale after scale.

Shapes: B images, R rows of the transformer's batch (B, and B more for each guidance: conditional, unconditional, those
of a damaged prefix), l tokens of one scale, D width, C codebook channels, V codebook rows.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from varcli.acceleration.devices import block_weight
from varcli.acceleration.dispatch import fastest_blocks
from varcli.config import SampleConfig, progress_ratio, spans
from varcli.models.transformer import Transformer, normalize
from varcli.sampling import guidance


class ScaleModel:
    """What is computed once per batch, the cache between scales, and the logits of each scale."""

    def __init__(
        self,
        transformer: Transformer,
        labels: Sequence[int] | Tensor,
        config: SampleConfig,
        sides: tuple[int, ...] | None = None,
    ) -> None:
        """Prepare for a batch.

        Args:
            transformer: that `dispatch.prepare` made ready.
            labels: index of each image's class in the class table, `config.null_class` for "no class"; as a tensor on
                the model's device, nothing here waits for the host.
            config: guidance.
            sides: of the scales that the cache has room for, of which it may leave out the last; None means the
                transformer's own.
        """
        model, weight = transformer, block_weight(transformer)
        self.transformer, self.config, self.count = model, config, len(labels)
        self.before_BlV: Tensor | None = None
        """The logits of the scale before, where they guide the next."""
        label_R = label_B = torch.as_tensor(labels, device=weight.device)
        if config.cfg > 0:
            label_R = torch.cat([label_R, torch.full_like(label_B, model.config.null_class)])
        if config.vpg > 0:
            label_R = torch.cat([label_R, label_B])
        self.class_RD = model.class_emb(label_R)
        self.blocks, cache = fastest_blocks(model)
        mixed = self.blocks is model and weight.dtype != torch.float32
        self.low_precision = torch.autocast(weight.device.type, weight.dtype, enabled=mixed, cache_enabled=False)
        with self.low_precision:
            self.modulations = [ada.float() for ada in self.blocks.modulations(self.class_RD)]
        final_R12D = model.head_nm.ada_lin(self.class_RD)
        self.final_scale, self.final_shift = final_R12D.unbind(2)
        shape = replace(model.config, sides=sides or model.config.sides)
        self.cache = cache(shape, len(self.class_RD), weight.device, weight.dtype)

    def logits(self, scale: int, input_BlC: Tensor | None) -> Tensor:
        """Return the guided logits (B, l, V) of a scale, in float32, after those of all scales before it."""
        logits_BlV: Tensor = self.transformer.head(self.guide(self.hidden(scale, input_BlC), scale))
        if self.config.ssg == 0:
            return logits_BlV
        before_BlV, self.before_BlV = self.before_BlV, logits_BlV
        return guidance.guided(logits_BlV, before_BlV, self.config.ssg)

    def take_over(self, other: "ScaleModel", inputs: Sequence[Tensor | None]) -> None:
        """Continue from another model, after running on the inputs of the scales that it sampled.

        It runs one scale after the other, as if it had sampled them: one pass over all would round differently.
        """
        for scale, input_BlC in enumerate(inputs):
            self.hidden(scale, input_BlC)
        self.before_BlV = other.before_BlV

    def hidden(self, scale: int, input_BlC: Tensor | None) -> Tensor:
        """Return the head's input for a scale, (R, l, D)."""
        self.cache.filled = spans(self.transformer.config.sides)[scale].start
        return self.normalized(self.through_blocks(self.entering(scale, input_BlC)))

    def entering(self, scale: int, input_BlC: Tensor | None) -> Tensor:
        """Return the residual stream of a scale before the blocks, (R, l, D)."""
        input_RlC = None
        if input_BlC is not None:
            input_RlC = input_BlC.repeat(len(self.class_RD) // self.count, 1, 1)
            if self.config.vpg > 0:
                input_RlC[-self.count :] = guidance.damaged(input_BlC)
        return self.transformer.scale_input(scale, self.class_RD, input_RlC)

    def through_blocks(self, x_RlD: Tensor) -> Tensor:
        """Return the residual stream after the blocks, (R, l, D), perhaps in the memory of what was given."""
        with self.low_precision:
            return self.blocks.step(x_RlD, self.modulations, self.cache)

    def normalized(self, x_RlD: Tensor) -> Tensor:
        """Return the head's input, (R, l, D)."""
        return normalize(x_RlD, self.final_scale, self.final_shift)

    def guide(self, h_RlD: Tensor, scale: int) -> Tensor:
        """Return (1 + t)·conditional - t·unconditional, (B, l, D), with t = cfg·k/(K-1).

        With prefix guidance, vpg·(conditional - damaged) is added.

        Differs: mixed before the head instead of after it, which is the same because the head is linear.
        """
        t = self.config.cfg * progress_ratio(scale, len(self.transformer.config.sides))
        t *= scale in self.config.guided_scales
        conditional_BlD = guided_BlD = h_RlD[: self.count]
        if t != 0:
            guided_BlD = (1 + t) * conditional_BlD - t * h_RlD[self.count : 2 * self.count]
        if self.config.vpg > 0:
            guided_BlD = guided_BlD + self.config.vpg * (conditional_BlD - h_RlD[-self.count :])
        return guided_BlD
