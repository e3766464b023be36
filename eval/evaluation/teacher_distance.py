"""The distance of a student in memory to its teacher, for scripts that measure many students of one teacher."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.sampling import Sampler
from diffdistill.eval.features.extractors import AnyFeatures, Extractor, Pixels, load_extractor
from diffdistill.eval.images.generate import SampledImages
from diffdistill.eval.images.preparation import prepare
from diffdistill.eval.metrics.against import AboveFloor, EndPoints, distances_above_floor, end_points
from diffdistill.eval.metrics.moments import Summary
from diffdistill.eval.metrics.settings import Frechet
from diffdistill.eval.metrics.sides import MissingFeaturesError
from diffdistill.eval.protocols.protocol import Labels, Preparation, Protocol
from diffdistill.eval.records.record import ModelRecord
from diffdistill.models.spec import TrainedModel

BATCH = 256
IMAGES_ALONE = "a distance to a teacher is of images alone: there are no logits, captions or classes"


@dataclass(frozen=True)
class TensorFeatures:
    """Features in memory, as one side of a metric.  features: [N, d]."""

    features: Tensor

    @cached_property
    def summary(self) -> Summary:
        return Summary.of(self.features)

    def rows(self, max_samples: int | None = None) -> Tensor:
        return self.features[:max_samples]

    @property
    def logits(self) -> Tensor:
        raise MissingFeaturesError(IMAGES_ALONE)

    @property
    def texts(self) -> Tensor:
        raise MissingFeaturesError(IMAGES_ALONE)

    @property
    def conditions(self) -> Tensor:
        raise MissingFeaturesError(IMAGES_ALONE)


@dataclass(frozen=True)
class TeacherSamples:
    """A teacher's samples, made once, and the distance of students to them.

        teacher = TeacherSamples.of(load_model("runs/digits-teacher"), num_images=6000)
        made = teacher.images(student, sampler)     # of a Denoiser, such as trainer.student
        found = teacher.frechet(made)
        found.student                               # Frechet distance to the teacher: .value, and .low to .high at 95 %
        found.floor                                 # the same between two sets of the teacher's own samples
        found.excess                                # student less floor: at the teacher where its .low is not above 0
        teacher.end_points(made).same_noise         # RMS difference of pixels, noise by noise

    same_noise, independent: images [N, C, H, W], of the noises that students start from and of others, each of all
    classes in turn.  Image i of `same_noise` and of students has the noise of seed first_seed + i.
    """

    protocol: Protocol
    shape: tuple[int, ...]
    same_noise: Tensor
    independent: Tensor
    extractor: Extractor

    @staticmethod
    def of(
        teacher: TrainedModel, *, num_images: int = 6000, first_seed: int = 0, features: AnyFeatures | None = None
    ) -> "TeacherSamples":
        """Sample the teacher by its own sampler, 2 x num_images times.  features: default pixels.

        Raises UserError for a model that takes text.
        """
        spec, features = teacher.spec, features or Pixels()
        protocol = Protocol(
            name="teacher-distance",
            num_images=num_images,
            first_seed=first_seed,
            repeats=2,
            labels=Labels(policy="cyclic" if spec.num_classes else "none", num_classes=spec.num_classes),
            preparation=Preparation(quantiser="none"),
            metrics=(Frechet(features=features),),
        )
        source = _source(teacher.denoiser, spec.sampler, protocol, spec.image_shape)
        own, other = (_images(source, repeat) for repeat in range(2))
        return TeacherSamples(protocol, spec.image_shape, own, other, load_extractor(features))

    def images(self, student: Denoiser, sampler: Sampler) -> Tensor:
        """The student's [N, C, H, W], on the same noises and classes as `same_noise`."""
        return _images(_source(student, sampler, self.protocol, self.shape), 0)

    def frechet(self, made: Tensor, *, num_replicates: int = 50) -> AboveFloor:
        """The Frechet distance of a student's images to the teacher, its floor and the difference, with intervals."""
        metric = self.protocol.metrics[0]
        sides = [
            {metric.features.label: TensorFeatures(self._features(images))}
            for images in (made, self.same_noise, self.independent)
        ]
        (found,) = distances_above_floor([metric], *sides, num_replicates=num_replicates).values()
        return found

    def end_points(self, made: Tensor) -> EndPoints:
        """How far a student's images are from the teacher's of the same noise."""
        classes = self.protocol.labels.num_classes
        return end_points(made.flatten(1), self.same_noise.flatten(1), num_conditions=max(classes, 1))

    def _features(self, images: Tensor) -> Tensor:
        return torch.cat([self.extractor(part).features.cpu() for part in images.split(BATCH)])


def _source(denoiser: Denoiser, sampler: Sampler, protocol: Protocol, shape: tuple[int, ...]) -> SampledImages:
    model = ModelRecord(source="model")
    return SampledImages(denoiser=denoiser, sampler=sampler, protocol=protocol, image_shape=shape, model=model)


def _images(source: SampledImages, repeat: int) -> Tensor:
    protocol = source.protocol
    index = torch.arange(protocol.num_images).split(BATCH)
    return torch.cat([prepare(source.take(repeat, part).cpu(), protocol.preparation) for part in index])
