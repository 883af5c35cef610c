"""Guidance by the coarser scales: the prior's frequencies, which tokens are replaced, and what strengths do."""

import math

import numpy as np
import pytest
import torch

from varcli.config import SampleConfig
from varcli.errors import ConfigError
from varcli.sampling.guidance import damaged, guided, prior


def transform(logits, side):
    """The orthonormal cosine transform of a map (side, side, V), summed as its definition says."""
    found = np.zeros((side, side, logits.shape[-1]))
    values = logits.view(side, side, -1).double().numpy()
    for u in range(side):
        for v in range(side):
            rows = [math.cos(math.pi * (2 * i + 1) * u / (2 * side)) for i in range(side)]
            columns = [math.cos(math.pi * (2 * i + 1) * v / (2 * side)) for i in range(side)]
            size = math.sqrt((1 if u else 0.5) * (1 if v else 0.5)) * 2 / side
            found[u, v] = size * np.einsum("i,j,ijv->v", rows, columns, values)
    return found


@pytest.mark.parametrize(("small", "side"), [(1, 2), (2, 3), (4, 6), (13, 16)])
def test_prior_keeps_the_frequencies_of_the_scale_before(small, side):
    torch.manual_seed(0)
    before = torch.randn(1, small * small, 5)
    found = transform(prior(before, side)[0], side)
    torch.testing.assert_close(
        torch.from_numpy(found[:small, :small]),
        torch.from_numpy(transform(before[0], small)) * side / small,
        rtol=1e-4,
        atol=1e-4,
    )
    linear = torch.nn.functional.interpolate(
        before[0].T.view(1, 5, small, small), size=(side, side), mode="bilinear", align_corners=False
    )
    interpolated = transform(linear.flatten(2)[0].T, side)
    above = torch.ones(side, side, dtype=torch.bool)
    above[:small, :small] = False
    torch.testing.assert_close(
        torch.from_numpy(found)[above], torch.from_numpy(interpolated)[above], rtol=1e-4, atol=1e-4
    )


def test_strength_moves_away_from_the_prior():
    before, logits = torch.randn(2, 4, 7), torch.randn(2, 9, 7)
    assert guided(logits, before, 0.0) is logits
    assert guided(logits, None, 0.5) is logits
    torch.testing.assert_close(guided(logits, before, 0.5) - logits, 0.5 * (logits - prior(before, 3)))


def test_scales_that_are_guided():
    assert SampleConfig().guided_scales.start == 0
    assert list(SampleConfig(cfg_scales="3-5").guided_scales) == [2, 3, 4]
    for wrong in ("5-3", "0-2", "3", "a-b", "3-"):
        with pytest.raises(ConfigError, match=r"--cfg-scales must be two numbers, such as 3-8"):
            SampleConfig(cfg_scales=wrong)


def test_what_is_off_is_not_told():
    assert SampleConfig().describe() == "cfg 1.5, top-k 900, top-p 0.96"
    told = SampleConfig(temperature=0.9, ssg=0.5, cfg_scales="2-4").describe()
    assert told == "cfg 1.5, top-k 900, top-p 0.96, temperature 0.9, ssg 0.5, cfg-scales 2-4"
    for wrong in ({"temperature": 0.0}, {"ssg": -1.0}):
        with pytest.raises(ConfigError):
            SampleConfig(**wrong)


# --- visual prefix guidance ------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "changed"), [(1, 0), (4, 2), (9, 4), (256, 128)])
def test_half_of_the_tokens_are_permuted(length, changed):
    input_BlC = torch.randn(3, length, 5)
    other_BlC = damaged(input_BlC)
    differs_Bl = (other_BlC != input_BlC).any(-1)
    assert differs_Bl.sum(1).tolist() == [changed] * 3
    assert torch.equal(differs_Bl[0], differs_Bl[2])
    assert torch.equal(other_BlC.sort(1).values, input_BlC.sort(1).values)


def test_the_share_is_an_argument():
    input_BlC = torch.randn(1, 16, 5)
    assert torch.equal(damaged(input_BlC, 0.0), input_BlC)
    assert (damaged(input_BlC, 1.0) != input_BlC).any(-1).all()


def test_strength_of_prefix_guidance_is_bounded_and_off_by_default():
    assert SampleConfig().vpg == 0 and SampleConfig().rows == 2
    assert SampleConfig(cfg=0, vpg=1).rows == 2 and SampleConfig(vpg=1).rows == 3
    with pytest.raises(ConfigError, match=r"--vpg must be between 0 \(off\) and 100 \(got -1\)"):
        SampleConfig(vpg=-1.0)
