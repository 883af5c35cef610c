"""Quality of a tokenizer's reconstructions: PSNR, SSIM, LPIPS, and codebook usage.

Shapes: B images of P × P pixels, l tokens of one scale.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from varcli.distributed import ProcessGroup

Distance = Callable[[Tensor, Tensor], Tensor]
"""Mean perceptual distance of two batches (B, 3, P, P) in [-1, 1]."""


class Reconstructions:
    """Collects images with their reconstructions, batch by batch; each image counts the same."""

    def __init__(
        self,
        codebook_size: int,
        scales: int,
        distance: Distance | None = None,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - it does not change
    ) -> None:
        """Start without images; LPIPS needs a distance, which computes on a device."""
        self.distance, self.device = distance, device
        self.count = 0
        self.sums = dict.fromkeys(("psnr", "ssim", *(("lpips",) if distance else ())), 0.0)
        self.used = np.zeros((scales, codebook_size), bool)

    @torch.inference_mode()
    def add(self, before_BPP3: NDArray[np.uint8], after_BPP3: NDArray[np.uint8], tokens: Sequence[Tensor]) -> None:
        """Count a batch of images, their reconstructions and the token maps (B, l) between them."""
        self.count += len(before_BPP3)
        self.sums["psnr"] += psnr(before_BPP3, after_BPP3).sum()
        self.sums["ssim"] += ssim(before_BPP3, after_BPP3).sum().item()
        if self.distance:
            after_B3PP, before_B3PP = (_unit(pixels).to(self.device) * 2 - 1 for pixels in (after_BPP3, before_BPP3))
            distance = self.distance(after_B3PP, before_B3PP)
            self.sums["lpips"] += distance.item() * len(before_BPP3)
        for scale, idx_Bl in enumerate(tokens):
            self.used[scale, idx_Bl.cpu().numpy()] = True

    def join(self, group: ProcessGroup) -> None:
        """Add the sums of other ranks to those of the main rank; to be called by all."""
        others = group.gather((self.count, self.sums, self.used))
        for count, sums, used in others[1:]:
            self.count += count
            self.sums = {name: total + sums[name] for name, total in self.sums.items()}
            self.used |= used

    def figures(self) -> dict[str, float | list[float]]:
        """Return the mean PSNR in dB, SSIM, LPIPS where it is measured, and each scale's share of rows in use."""
        means: dict[str, float | list[float]] = {name: total / self.count for name, total in self.sums.items()}
        return means | {"codebook_usage": self.used.mean(1).tolist()}


def psnr(before_BPP3: NDArray[np.uint8], after_BPP3: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return each image's peak signal-to-noise ratio in dB, (B,); equal images count as one level off in one value.

    Differs: infinity would be the value of equal images, and of every mean that holds one.
    """
    squared_B = ((before_BPP3.astype(np.float64) - after_BPP3) ** 2).mean((1, 2, 3))
    ratio_B: NDArray[np.float64] = 255**2 / squared_B.clip(min=1 / before_BPP3[0].size)
    return 10 * np.log10(ratio_B)


def ssim(before_BPP3: NDArray[np.uint8], after_BPP3: NDArray[np.uint8]) -> Tensor:
    """Return each image's structural similarity, (B,).

    Source: Wang et al. 2004, over a Gaussian window of 11 × 11 pixels, by torchmetrics.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    found = structural_similarity_index_measure(_unit(after_BPP3), _unit(before_BPP3), data_range=1.0, reduction="none")
    return found if isinstance(found, Tensor) else found[0]


def _unit(pixels_BPP3: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels_BPP3).permute(0, 3, 1, 2).float() / 255
