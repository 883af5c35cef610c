"""Visual prefix guidance: which tokens are replaced, and what its strength does."""

import pytest
import torch

from varcli.config import SampleConfig
from varcli.errors import ConfigError
from varcli.sampling.prefix_guidance import damaged


@pytest.mark.parametrize(("length", "changed"), [(1, 0), (4, 2), (9, 4), (256, 128)])
def test_half_of_the_tokens_change_places(length, changed):
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


def test_strength_is_bounded_and_off_by_default():
    assert SampleConfig().vpg == 0 and SampleConfig().rows == 2
    assert SampleConfig(cfg=0, vpg=1).rows == 2 and SampleConfig(vpg=1).rows == 3
    with pytest.raises(ConfigError, match=r"--vpg must be between 0 \(off\) and 100 \(got -1\)"):
        SampleConfig(vpg=-1.0)
