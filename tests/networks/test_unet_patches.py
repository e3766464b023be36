"""A U-Net that sees squares of pixels as channels."""

import re

import pytest
import torch
import torch.nn.functional as F

from diffdistill.diffusion.cond import Cond
from diffdistill.networks.unet import UNetConfig
from diffdistill.settings.schema import UserError


def test_patches_are_channels_of_the_same_network():
    torch.manual_seed(0)
    patched = UNetConfig(channels=(8, 16), patch=2).build((3, 8, 12), 5, 0.1)
    plain = UNetConfig(channels=(8, 16)).build((12, 4, 6), 5, 0.1)
    torch.nn.init.normal_(plain.last_layer.weight)
    patched.load_state_dict(plain.state_dict())
    x, times, cond = torch.randn(2, 3, 8, 12), torch.rand(2), Cond(label=torch.tensor([1, 5]))
    squares = torch.stack([x[:, c, i::2, j::2] for c in range(3) for i in range(2) for j in range(2)], 1)
    made, features = patched.forward_with_features(x, times, cond)
    wanted, seen = plain.forward_with_features(squares, times, cond)
    for number, (c, i, j) in enumerate((c, i, j) for c in range(3) for i in range(2) for j in range(2)):
        assert torch.equal(made[:, c, i::2, j::2], wanted[:, number])
    assert all(torch.equal(a, b) for a, b in zip(features, seen, strict=True))
    assert torch.equal(patched(x, times, cond), made)


def test_images_that_patches_do_not_fill_are_refused():
    message = (
        "network.channels: 2 resolutions of patches of 2 pixels need image sides that are multiples of 4; "
        "the images are 8 x 6"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        UNetConfig(channels=(8, 16), patch=2).build((1, 8, 6), 0, 0.0)


def test_without_patches_pixels_go_through_as_they_are():
    x = torch.randn(1, 1, 4, 4)
    assert torch.equal(F.pixel_shuffle(F.pixel_unshuffle(x, 1), 1), x)
    assert UNetConfig(channels=(8, 16)).build((1, 4, 4), 0, 0.0).resolution_multiple == 2
    assert UNetConfig(channels=(8, 16), patch=2).build((1, 4, 4), 0, 0.0).resolution_multiple == 4
