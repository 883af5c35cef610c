"""Convolutional layers: what is done faster comes out the same."""

import pytest
import torch
import torch.nn.functional as F

from varcli.models.autoencoder import Upsample


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 1)])
def test_four_small_convolutions_double_a_map_as_one_large_does(size):
    torch.manual_seed(0)
    layer, x_BCHW = Upsample(8), torch.randn(2, 8, *size)
    with torch.no_grad():
        wanted = layer.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
        assert torch.equal(layer(x_BCHW), wanted)
        layer.split()
        assert len(layer.kernels) == 4
        torch.testing.assert_close(layer(x_BCHW), wanted, rtol=1e-5, atol=1e-6)


def test_in_16_bits_their_weights_are_summed_in_32():
    torch.manual_seed(0)
    layer = Upsample(8).to(torch.bfloat16)
    x_BCHW = torch.randn(1, 8, 4, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = F.conv2d(
            F.interpolate(x_BCHW.double(), scale_factor=2.0, mode="nearest"),
            layer.conv.weight.double(),
            layer.conv.bias.double(),
            padding=1,
        )
        plain = (layer(x_BCHW) - exact).abs().max()
        layer.split()
        assert (layer(x_BCHW) - exact).abs().max() < 2 * plain
