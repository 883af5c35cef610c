"""PSNR, SSIM, LPIPS and the use of the codebook, held to values worked out by hand."""

import numpy as np
import pytest
import torch

from varcli.evaluation.reconstruction import Reconstructions, psnr, ssim


def images(count=3, seed=0, pixels=32):
    return np.random.RandomState(seed).randint(0, 256, (count, pixels, pixels, 3)).astype(np.uint8)


def signed(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_psnr_of_a_known_error():
    before = np.full((2, 4, 4, 3), 100, np.uint8)
    after = before.copy()
    after[0] += 5
    after[1, 0, 0, 0] += 12
    wanted = 10 * np.log10(255**2 / np.array([25, 144 / 48]))
    assert psnr(before, after) == pytest.approx(wanted)


def test_psnr_of_equal_images_is_finite_and_above_any_other():
    before = images()
    nearly = before.copy()
    nearly[:, 0, 0, 0] ^= 1
    assert np.isfinite(psnr(before, before)).all()
    assert (psnr(before, before) >= psnr(before, nearly)).all()


def test_ssim_is_the_formula_of_wang():
    """Its definition, window by window, in float64: Gaussian weights, K1 = 0.01, K2 = 0.03, mirrored edges."""
    before = images(1, 0, 16)
    after = (before + np.random.RandomState(1).randint(-40, 41, before.shape)).clip(0, 255).astype(np.uint8)
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weight = np.outer(line, line) / line.sum() ** 2
    mirrored = [np.pad(pixels[0] / 255, ((5, 5), (5, 5), (0, 0)), mode="reflect") for pixels in (before, after)]
    x, y = (np.lib.stride_tricks.sliding_window_view(pixels, (11, 11), axis=(0, 1)) for pixels in mirrored)

    def mean(values):
        return (weight * values).sum((-2, -1))

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    wanted = (2 * mx * my + 0.01**2) * (2 * cov + 0.03**2) / ((mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2))
    found = ssim(before, after)
    assert found.shape == (1,)
    assert found.item() == pytest.approx(wanted.mean(), abs=1e-5)


def test_batches_change_nothing_and_each_image_counts_once():
    before, after = images(5), images(5, seed=1)
    tokens = [torch.tensor([[0], [1], [1], [3], [0]]), torch.arange(20).view(5, 4) % 8]

    def measured(*cuts):
        figures = Reconstructions(8, 2, lambda a, b: (a - b).square().mean())
        for part in np.split(np.arange(5), cuts):
            figures.add(before[part], after[part], [idx[part] for idx in tokens])
        return figures.figures()

    whole = measured()
    assert whole["codebook_usage"] == [3 / 8, 1.0]
    assert whole["lpips"] == pytest.approx(((signed(before) - signed(after)) ** 2).mean().item())
    assert whole["psnr"] == pytest.approx(psnr(before, after).mean())
    for name, value in measured(1, 3).items():
        assert value == pytest.approx(whole[name], rel=1e-5)


def test_without_a_distance_there_is_no_lpips():
    figures = Reconstructions(4, 1)
    figures.add(images(), images(), [torch.zeros(3, 1, dtype=torch.long)])
    assert set(figures.figures()) == {"psnr", "ssim", "codebook_usage"}
    assert figures.figures()["ssim"] == pytest.approx(1)
