"""The moving average of weights: its first update, its half-life, and what it leaves alone."""

import pytest
import torch
from torch import nn

from diffdistill.training.ema import EMA, EMAConfig


def weights(value: float) -> nn.Module:
    module = nn.Linear(3, 2).double()
    nn.init.constant_(module.weight, value)
    nn.init.constant_(module.bias, -value)
    return module


def average_after(config: EMAConfig, updates: int, batch_images: int, first_images_seen: int) -> float:
    """Start at 0 and follow weights of 1."""
    ema = EMA(weights(0.0), config)
    for i in range(updates):
        ema.update(weights(1.0), images_seen=first_images_seen + i * batch_images, batch_images=batch_images)
    assert torch.equal(ema.module.bias, -ema.module.weight[:, 0])
    return ema.module.weight[0, 0].item()


def test_the_first_update_copies():
    ema, source = EMA(weights(0.25), EMAConfig()), weights(0.7)
    ema.update(source, images_seen=0, batch_images=128)
    assert torch.equal(ema.module.weight, source.weight)


def test_half_of_the_old_weights_is_left_after_the_half_life():
    config = EMAConfig(halflife_images=1000, ramp=0)
    assert average_after(config, 10, 100, 0) == pytest.approx(0.5, rel=1e-12)
    assert average_after(config, 20, 100, 0) == pytest.approx(0.75, rel=1e-12)


def test_the_half_life_does_not_depend_on_the_batch_size():
    config = EMAConfig(halflife_images=1000, ramp=0)
    assert average_after(config, 40, 25, 0) == pytest.approx(average_after(config, 1, 1000, 0), rel=1e-12)


def test_the_half_life_is_at_most_the_ramp_s_share_of_the_images_seen():
    config = EMAConfig(halflife_images=500_000, ramp=0.05)
    assert average_after(config, 1, 128, 20_000) == pytest.approx(1 - 0.5 ** (128 / 1000), rel=1e-12)


def test_the_ramp_ends_at_the_full_half_life():
    config = EMAConfig(halflife_images=1000, ramp=0.05)
    assert average_after(config, 1, 128, 10**6) == pytest.approx(1 - 0.5 ** (128 / 1000), rel=1e-12)


def test_the_average_is_frozen_and_owns_its_weights():
    source = weights(0.5)
    ema = EMA(source, EMAConfig())
    assert not ema.module.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert ema.module.weight.data_ptr() != source.weight.data_ptr()
    assert source.weight.requires_grad


def test_an_update_leaves_the_weights_that_it_follows_alone():
    ema, source = EMA(weights(0.0), EMAConfig(ramp=0)), weights(1.0)
    ema.update(source, images_seen=0, batch_images=100_000)
    assert torch.equal(source.weight, weights(1.0).weight)


def test_buffers_are_copied():
    source = nn.BatchNorm1d(2)
    ema = EMA(source, EMAConfig())
    source.running_mean.fill_(3.0)
    ema.update(source, images_seen=10**9, batch_images=1)
    assert torch.equal(ema.module.running_mean, source.running_mean)
