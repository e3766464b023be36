"""A protocol's images from a model: noise and labels by each image's own seed, whatever the batches and processes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.data.classes import numbers_among, told_classes
from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser, device_of
from diffdistill.diffusion.guidance.check import check_guidance
from diffdistill.diffusion.guidance.policies import AnyPolicy
from diffdistill.diffusion.sampling import Sampler
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.threads import sampling_threads, threads
from diffdistill.eval.images.encoder_and_vae import EncoderAndVAE, WholeSampler
from diffdistill.eval.protocols.protocol import Labels, Protocol
from diffdistill.eval.records.record import Cost, ModelRecord, SamplerRecord
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import dump


@dataclass(frozen=True, kw_only=True)
class SampledImages:
    """The images that `denoiser` makes by `protocol`. `take` gives them by number.

    own_sampler: what is called where an exported folder's own code samples; `sampler` then only describes it.
    image_shape: [C, H, W] of what the network makes.  around: what stands between that and images, and before it.
    model: what a record says of it; its sha256 is of the weights.  classes: that it was trained on; empty for all.
    class_names: of its classes, and wanted: of those that the protocol draws, each by number; they are matched.
    method, seed, cost: of the training.
    Raises UserError if the protocol asks for what the model is not: other images, other classes, captions, guidance.
    """

    denoiser: Denoiser
    sampler: Sampler
    protocol: Protocol
    image_shape: tuple[int, ...]
    model: ModelRecord
    own_sampler: Sampler | None = None
    around: EncoderAndVAE | None = None
    guidance: float | AnyPolicy = 1.0
    method: str | None = None
    seed: int | None = None
    cost: Cost | None = None
    classes: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()
    wanted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where, protocol, net = self.model.source, self.protocol, self.denoiser.net
        if protocol.labels.policy == "captions" and (self.around is None or self.around.encode is None):
            raise UserError(f"{where}: {protocol.name} has captions, which this model does not take")
        made = self.around.image_shape(self.image_shape) if self.around else self.image_shape
        if protocol.image_shape not in (None, made):
            raise UserError(f"{where}: makes {show(made)} images; {protocol.name} is for {show(protocol.image_shape)}")
        classes = protocol.labels.num_classes
        if classes and self._drawn is None and net.num_classes not in (0, classes):
            raise UserError(f"{where}: knows {net.num_classes} classes; {protocol.name} is for {classes}")
        if not classes and net.num_classes:
            raise UserError(f"{where}: knows {net.num_classes} classes, but {protocol.name} names no labels")
        check_guidance(self.denoiser, "--guidance", self.guidance)

    @property
    def notes(self) -> str:
        """What the record should say: how classes were matched, and those that the model was not trained on."""
        count, drawn = self.protocol.labels.num_classes, self._drawn
        if not count or not self.denoiser.net.num_classes:
            return ""
        numbers = range(count) if drawn is None else drawn
        notes = []
        if self._is_renumbered:
            told = told_classes(numbers, self.class_names)
            notes.append(f"classes are drawn by the names that {self.protocol.name}'s reference has: {told}")
        elif drawn is None and self.class_names:
            told = told_classes(numbers, self.class_names)
            notes.append(f"{self.protocol.name} and its reference name no classes, which are taken to be {told}")
        elif drawn is None and self.wanted:
            told = told_classes(numbers, self.wanted)
            notes.append(f"the model holds no names of its classes, which are taken to be {told}")
        unknown = sorted(set(numbers) - set(self.classes)) if self.classes else []
        if unknown:
            what = f"was not trained on {len(unknown):,} of the classes that {self.protocol.name} draws"
            notes.append(f"{what}: {told_classes(unknown, self.class_names)}")
        return "; ".join(f"{self.model.source}: {note}" for note in notes)

    @cached_property
    def _drawn(self) -> tuple[int, ...] | None:
        """The model's number of each of the protocol's classes; None where one side has no names."""
        known = self.denoiser.net.num_classes
        if not self.wanted or not known or not self.protocol.labels.num_classes:
            return None
        are_numbers = all(name.isdecimal() and int(name) < known for name in self.wanted)
        if are_numbers and not set(self.wanted) <= set(self.class_names):
            return tuple(map(int, self.wanted))
        if not self.class_names:
            return None
        origin = f"{self.model.source}: {self.protocol.name} draws the classes of its reference"
        return numbers_among(self.wanted, self.class_names, origin=origin, whose="the model")

    @property
    def _is_renumbered(self) -> bool:
        return self._drawn is not None and self._drawn != tuple(range(len(self._drawn)))

    @property
    def sampler_record(self) -> SamplerRecord:
        """What a record says of the sampler."""
        settings = dump(self.sampler)
        name = settings.pop("name")
        scale = self.guidance if isinstance(self.guidance, (int, float)) else None
        if scale is None:
            settings["guidance_policy"] = dump(self.guidance)
        if self._is_renumbered:
            settings["classes"] = list(self._drawn or ())
        return SamplerRecord(name=name, num_evaluations=self.sampler.num_evaluations, guidance=scale, settings=settings)

    @property
    def whole_sampler(self) -> Sampler:
        """The sampler with what stands around the network: what its user waits for."""
        sampler = self.own_sampler or self.sampler
        return WholeSampler(sampler, self.around) if self.around else sampler

    @property
    def key(self) -> Mapping[str, Any]:
        """All that decides the images, beside the protocol."""
        around = self.model.around_sha256
        return {"weights": self.model.sha256, **around, "sampler": dump(self.sampler_record), "dtype": "float32"}

    @torch.inference_mode()
    def take(self, repeat: int, index: Tensor) -> Tensor:
        """Images in [-1, 1], [B, C, H, W], on the network's device.

        repeat: which range of seeds; index: [B], the images' numbers in it.
        """
        protocol, device = self.protocol, device_of(self.denoiser)
        rng = StepRandom(0, protocol.noise.step, protocol.seed_ranges[repeat][0] + index)

        def normal(name: str) -> Tensor:
            return rng.normal(name, self.image_shape).to(device)

        with eval_mode(self.denoiser), threads(sampling_threads(self.denoiser, self.image_shape)):
            made = (self.own_sampler or self.sampler)(
                self.denoiser,
                normal(protocol.noise.latent),
                self._cond(rng, index),
                guidance=self.guidance,
                fresh_noise=lambda step: normal(f"{protocol.noise.fresh} {step}"),
            )
        return self.around.images(made) if self.around else made

    def _cond(self, rng: StepRandom, index: Tensor) -> Cond:
        if self.around and self.around.encode:
            return self.around.encode(index)
        labels = labels_of(self.protocol.labels, index, self.protocol.num_images, rng)
        if labels is None:
            return NO_COND
        labels = labels if self._drawn is None else torch.tensor(self._drawn)[labels]
        return self.denoiser.class_cond(labels.to(device_of(self.denoiser)))


def labels_of(labels: Labels, index: Tensor, num_images: int, rng: StepRandom) -> Tensor | None:
    """The classes [B] of the images `index` of a repeat, or None where there are none.  rng: their own draws."""
    classes = labels.num_classes
    if labels.policy == "class_major":
        return index // (num_images // classes)
    if labels.policy == "cyclic":
        return index % classes
    return rng.integers("label", classes) if labels.policy == "random" else None


def show(shape: tuple[int, ...]) -> str:
    """As in 3 x 32 x 32."""
    return " x ".join(map(str, shape))


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Without dropout, and afterwards every part in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
