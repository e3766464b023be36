"""Images as parameters: which one noise picks, that each learns for itself, and what it refuses."""

import pytest
import torch
from support.closed_forms import random

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.networks.image_table import ImageTable, ImageTableConfig, particle_of
from diffdistill.settings.schema import UserError

SHAPE = (1, 2, 2)


def table(particles: int, num_classes: int = 3) -> ImageTable:
    return ImageTableConfig(particles=particles).build(SHAPE, num_classes, 0.0)


def test_noise_picks_each_particle_as_often_and_on_any_scale() -> None:
    noise = random(20000, *SHAPE)
    found = particle_of(noise, 5)
    share = torch.bincount(found, minlength=5) / len(noise)
    assert (share - 0.2).abs().max() < 0.012  # four standard deviations
    assert torch.equal(particle_of(80 * noise, 5), found)
    assert not particle_of(noise, 1).any()


def test_an_image_is_that_of_its_class_and_particle_whatever_the_time() -> None:
    net, noise = table(4), random(6, *SHAPE).float()
    label = torch.tensor([0, 1, 2, 0, 1, 2])
    made = net(noise, torch.rand(6), Cond(label=label))
    assert torch.equal(made, net.images[label, particle_of(noise, 4)])
    assert torch.equal(made, net(3 * noise, torch.zeros(6), Cond(label=label)))
    assert table(2, 0)(noise, torch.zeros(6), NO_COND).shape == noise.shape


def test_only_what_was_picked_learns() -> None:
    net, noise = table(4), random(1, *SHAPE).float()
    net(noise, torch.zeros(1), Cond(label=torch.tensor([1]))).sum().backward()
    assert net.images.grad is not None
    picked = net.images.grad.flatten(2).abs().sum(2).nonzero().tolist()
    assert picked == [[1, int(particle_of(noise, 4))]]


def test_one_number_has_one_particle_and_a_table_no_features() -> None:
    with pytest.raises(UserError, match="one particle"):
        ImageTableConfig(particles=2).build((1, 1, 1), 0, 0.0)
    with pytest.raises(ValueError, match="no features"):
        table(1).features(random(1, *SHAPE), torch.zeros(1), NO_COND)
