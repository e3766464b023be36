"""For the tests of evaluation: images without a network, features that no batch changes, a reference in memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.diffusion.step_random import StepRandom
from diffdistill.eval.evaluation.extract import Bench
from diffdistill.eval.evaluation.workers import Workers
from diffdistill.eval.features.extractors import Extractor, Registered, register
from diffdistill.eval.metrics.moments import Summary
from diffdistill.eval.metrics.settings import (
    AnyMetric,
    Diversity,
    Frechet,
    InceptionScore,
    KernelDistance,
    PrecisionRecall,
)
from diffdistill.eval.protocols.protocol import Labels, Preparation, Protocol
from diffdistill.eval.records.record import Cost, ModelRecord, SamplerRecord

SHAPE = (1, 4, 4)


@dataclass
class NoiseImages:
    """A source whose image is its own noise, scaled.  calls: the batches that were asked for."""

    protocol: Protocol
    scale: float = 0.5
    fails_after: int | None = None
    calls: list[tuple[int, list[int]]] = field(default_factory=list)
    model: ModelRecord = field(default_factory=lambda: ModelRecord(source="noise"))
    method: str | None = None
    seed: int | None = None
    cost: Cost | None = None
    notes: str = ""
    sampler_record: SamplerRecord | None = None

    @property
    def key(self) -> Mapping[str, Any]:
        return {"scale": self.scale}

    def take(self, repeat: int, index: Tensor) -> Tensor:
        if self.fails_after is not None and len(self.calls) >= self.fails_after:
            raise KeyboardInterrupt
        self.calls.append((repeat, index.tolist()))
        first = self.protocol.seed_ranges[repeat][0]
        return self.scale * StepRandom(0, 0, first + index).normal("noise", SHAPE)


@dataclass
class TensorFeatures:
    """A reference's features, in memory."""

    features: Tensor

    @property
    def summary(self) -> Summary:
        return Summary.of(self.features)

    def rows(self, max_samples: int | None = None) -> Tensor:
        return self.features[:max_samples]


def shuffled_pixels(images: Tensor) -> tuple[Tensor, Tensor]:
    """Features [B, 16] and logits [B, 4], sample by sample, without a sum that a batch could reorder."""
    flat = images.flatten(1)
    return flat.roll(1, 1) * 2 + flat, flat[:, :4] * 3


EXTRACTOR = Extractor(label="toy", network=shuffled_pixels, prepare=Tensor.float, num_features=16, num_logits=4)
TOY: Registered = register(EXTRACTOR)

METRICS: tuple[AnyMetric, ...] = (
    Frechet(features=TOY),
    KernelDistance(features=TOY, num_subsets=5, subset_size=50),
    PrecisionRecall(features=TOY),
    InceptionScore(features=TOY, splits=2),
    Diversity(features=TOY),
)


def toy_protocol(num_images: int = 300, **changes: Any) -> Protocol:
    settings: dict[str, Any] = {
        "name": "toy",
        "num_images": num_images,
        "repeats": 2,
        "image_shape": SHAPE,
        "labels": Labels(policy="cyclic", num_classes=10),
        "preparation": Preparation(quantiser="none"),
        "metrics": METRICS,
    }
    return Protocol(**(settings | changes))


def toy_bench(protocol: Protocol, *, batch_size: int = 100, workers: Workers | None = None) -> Bench:
    real = 0.6 * StepRandom(7, 0, torch.arange(200)).normal("real", (16,))
    return Bench(
        protocol=protocol,
        extractors={"toy": EXTRACTOR},
        real={"toy": TensorFeatures(real)},
        workers=workers or Workers(torch.device("cpu")),
        batch_size=batch_size,
    )


def files_under(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]
