"""A protocol's images from a model: each by its own seed, its label by the protocol's policy."""

import pytest
import torch
from torch import Tensor

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.sampling import FreshNoise
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.eval.features.extractors import Pixels
from diffdistill.eval.images.generate import SampledImages, labels_of
from diffdistill.eval.metrics.settings import Frechet
from diffdistill.eval.protocols.protocol import Labels, Noise, Protocol
from diffdistill.eval.records.record import ModelRecord
from diffdistill.networks.analytic import mixture_denoiser
from diffdistill.networks.mlp import MLPConfig

SHAPE = (1, 2, 2)
METRICS = (Frechet(features=Pixels()),)


class Echo:
    """A sampler whose image is its noise plus the noise of a later step; keeps the labels."""

    num_evaluations = 1

    def __init__(self) -> None:
        self.labels: list[Tensor | None] = []

    def __call__(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        cond: Cond = NO_COND,
        *,
        guidance: float = 1.0,
        fresh_noise: FreshNoise | None = None,
    ) -> Tensor:
        assert fresh_noise is not None
        self.labels.append(cond.label)
        return noise + 10 * fresh_noise(2)


def source(protocol: Protocol, denoiser: Denoiser, sampler: Echo) -> SampledImages:
    return SampledImages(
        denoiser=denoiser,
        sampler=sampler,  # type: ignore[arg-type]
        protocol=protocol,
        image_shape=SHAPE,
        model=ModelRecord(source="a model"),
    )


def protocol(labels: Labels, **changes: object) -> Protocol:
    settings = {"name": "p", "num_images": 20, "repeats": 2, "first_seed": 5, "labels": labels, "metrics": METRICS}
    return Protocol(**(settings | changes))  # type: ignore[arg-type]


def conditional(num_classes: int = 4) -> Denoiser:
    return Denoiser(MLPConfig(width=8, blocks=1).build(SHAPE, num_classes, 0.1), EDM(), "edm")


def unconditional() -> Denoiser:
    return mixture_denoiser(EDM(), torch.ones(1), torch.zeros(1, 4), torch.ones(1))


def test_an_image_is_made_from_its_own_seed_and_names() -> None:
    known = protocol(Labels(policy="none"), noise=Noise(step=3, latent="z", fresh="later"))
    made = source(known, unconditional(), Echo()).take(1, torch.tensor([7, 2]))
    rng = StepRandom(0, 3, torch.tensor([5 + 20 + 7, 5 + 20 + 2]))
    assert torch.equal(made, rng.normal("z", SHAPE) + 10 * rng.normal("later 2", SHAPE))


def test_random_labels_are_of_the_seed_alone_and_even() -> None:
    labels = Labels(policy="random", num_classes=4)

    def drawn(seeds: Tensor) -> Tensor:
        found = labels_of(labels, seeds, 10**6, StepRandom(0, 0, seeds))
        assert found is not None
        return found

    everything = drawn(torch.arange(4000))
    assert torch.equal(torch.cat([drawn(part) for part in torch.arange(4000).split(7)]), everything)
    assert (everything.bincount() - 1000).abs().max() < 4 * 1000**0.5


@pytest.mark.parametrize(
    ("policy", "expected"), [("cyclic", [0, 1, 2, 3, 0]), ("class_major", [0, 0, 0, 0, 0]), ("none", None)]
)
def test_labels_follow_the_policy(policy: str, expected: list[int] | None) -> None:
    labels = Labels(policy=policy, num_classes=0 if expected is None else 4)  # type: ignore[arg-type]
    found = labels_of(labels, torch.arange(5), 20, StepRandom(0, 0, torch.arange(5)))
    assert (None if found is None else found.tolist()) == expected


def test_a_model_without_classes_is_given_none() -> None:
    sampler = Echo()
    source(protocol(Labels(policy="cyclic", num_classes=10)), unconditional(), sampler).take(0, torch.arange(3))
    assert sampler.labels == [None]


def test_labels_start_anew_in_each_repeat() -> None:
    sampler = Echo()
    images = source(protocol(Labels(policy="cyclic", num_classes=4)), conditional(), sampler)
    images.take(1, torch.arange(6))
    assert sampler.labels[0] is not None
    assert sampler.labels[0].tolist() == [0, 1, 2, 3, 0, 1]
