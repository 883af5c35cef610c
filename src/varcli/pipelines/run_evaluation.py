"""FID of a training run's checkpoints against its held-out images, as `var eval` measures it."""

from collections.abc import Callable
from pathlib import Path

import torch

from varcli.acceleration.dispatch import cuda_settings_restored
from varcli.distributed import ProcessGroup
from varcli.errors import UsageError
from varcli.evaluation import comparability
from varcli.evaluation.extractors import EXTRACTORS, NoFeatures
from varcli.evaluation.reconstruction import Reconstructions
from varcli.evaluation.statistics import EvalPlan
from varcli.images.dataset import ImageSet
from varcli.pipelines.eval_sources import EvalSource, Reconstructed
from varcli.pipelines.evaluate import DEFAULT_COUNT, Evaluator, samples
from varcli.pipelines.model import Model, pick_precision


class RunEvaluation:
    """Measures checkpoints by their samples or, of a tokenizer, by its reconstructions of the held-out images."""

    def __init__(
        self,
        held: ImageSet,
        side: int,
        *,
        tokenizer: bool,
        count: int | None,
        features: str,
        weights: Path | None,
        device: torch.device,
        group: ProcessGroup,
        note: Callable[[str], None],
    ) -> None:
        """Measure the reference, so that errors in it show before training; to be called by all ranks.

        Args:
            held: the held-out images.
            side: the model's image size in pixels, to which they are cropped and resized.
            tokenizer: whether a tokenizer is trained.
            count: images to sample, or to reconstruct; None is as many as are held out, 2000 at most.
            features: name of the feature extractor.
            weights: file of its weights; None downloads them at the first use.
            device: where images are sampled and features computed.
            group: the ranks that share the work.
            note: takes remarks for the user.

        Raises:
            UsageError: too few images are held out, fewer than to reconstruct, or there is no such extractor.
            VarError: the extractor's weights are not available, or the images cannot be read.
        """
        if len(held) < 2:
            raise UsageError(
                f"--eval-every measures against at least 2 held-out images: give --holdout (got {len(held)} held out)"
            )
        count = min(len(held), DEFAULT_COUNT) if count is None else count
        if tokenizer and count > len(held):
            raise UsageError(f"--eval-images must be at most the {len(held)} images that are held out (got {count})")
        names = sorted(EXTRACTORS.keys() - {NoFeatures.name})
        if features not in names:
            raise UsageError(f"--eval-features must be one of {', '.join(names)} (got {features})")
        self.tokenizer, self.device, self.group = tokenizer, device, group
        self.evaluator = Evaluator(features, weights, device, group, note, quiet=True)
        self.images = held.resized(side)
        if tokenizer:  # spread over the classes, by which they are ordered
            count = min(count, len(self.images))  # some may be unreadable
            self.images = self.images.subset(i * len(self.images) // count for i in range(count))
        self.plan = EvalPlan(count=count, metrics=("fid",))
        self.reference = self.evaluator.reference_of(self.images, "held-out images", frozenset())
        for line in comparability.few_images(count, None):
            note(f"--eval-every: {line}")

    def __call__(self, checkpoint: Path) -> dict[str, float]:
        """Return FID, or rFID, of a checkpoint that the main rank has written; to be called by all ranks.

        Raises:
            VarError: its figures are not finite, for example.
        """
        self.group.barrier()
        with cuda_settings_restored():  # training must continue as before
            model = Model(str(checkpoint), checkpoint, self.device, pick_precision("auto", None, self.device))
            images = self.reconstructions(model) if self.tokenizer else samples(model, self.plan.count, self.group)
            measured, _ = self.evaluator.measure(images, self.plan, "images", resumable=False)
        if not self.group.is_main:
            return {}
        figures = self.evaluator.figures(measured.statistics, self.reference)
        return {f"r{name}": value for name, value in figures.items()} if self.tokenizer else figures

    def reconstructions(self, model: Model) -> EvalSource:
        """The held-out images, encoded and decoded by the checkpoint's tokenizer."""
        config = model.tokenizer_config
        losses = Reconstructions(config.codebook_size, len(config.sides))
        return Reconstructed(self.images, [], model.tokenizer, losses, {"sha256": model.metadata["tokenizer_sha256"]})
