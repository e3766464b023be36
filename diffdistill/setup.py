"""From a config to what a run starts with. Whatever cannot be is a UserError, before anything is written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path as FilePath

import torch

from diffdistill.checkpoint import list_checkpoints
from diffdistill.config import RunConfig, TrainConfig
from diffdistill.data.source import ImageSource
from diffdistill.method import Method, Setting
from diffdistill.model import ModelSpec, TrainedModel, load_model
from diffdistill.schema import UserError


def find_start(folder: FilePath, resume: bool | str) -> FilePath | None:
    """The checkpoint of a run's folder to go on from, or None for a new run.

    resume: False, True (the newest checkpoint) or a checkpoint's name.  Raises UserError where that makes no sense.
    """
    found = list_checkpoints(folder / "checkpoints")
    if not resume:
        if found:
            raise UserError(f"{folder}: holds a run already; add --resume to go on, or name another `run`")
        return None
    if isinstance(resume, str):
        target = folder / "checkpoints" / resume
        if not target.is_dir():
            names = ", ".join(c.name for c in found) or "none"
            raise UserError(f"{target.parent}: no checkpoint {resume!r}; there are: {names}")
        return target
    return found[-1] if found else None


def load_teacher(place: str | None, device: torch.device) -> TrainedModel | None:
    """The frozen teacher in a run's folder or checkpoint."""
    if place is None:
        return None
    teacher = load_model(place)
    teacher.denoiser.to(device)
    return teacher


def settle(config: RunConfig, source: ImageSource, teacher: TrainedModel | None) -> tuple[ModelSpec, Setting]:
    """The student's description and the method's setting, from the teacher or from `model`."""
    if (config.model is None) == (teacher is None):
        raise UserError("give either `model` (to pretrain) or `teacher` (to distil), not both or neither")
    shape, method = source.image_shape, config.method
    if teacher:
        spec = teacher.spec
        if spec.image_shape != shape:
            raise UserError(f"data: images are {shape}, but the teacher's are {spec.image_shape}")
        setting = Setting(shape, spec.num_classes, spec.model.path, teacher=teacher.denoiser)
        return replace(spec, sampler=method.sampler(setting)), setting
    assert config.model is not None
    setting = Setting(shape, source.num_classes, config.model.path)
    spec = ModelSpec(
        model=config.model,
        image_shape=shape,
        num_classes=source.num_classes,
        class_dropout=getattr(method, "class_dropout", 0.0),
        sampler=method.sampler(setting),
    )
    with seeded(config.train.seed):
        return spec, replace(setting, network=spec.build())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """New networks depend on the run's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def check_batch(train: TrainConfig, num_processes: int) -> None:
    """Raise UserError where the batch cannot be shared out, or there are several processes to share it."""
    if num_processes > 1:
        raise UserError(f"{num_processes} processes: this version trains on one; start it without a launcher")
    batch, micro = train.global_batch_size, train.micro_batch_size
    if micro and batch % micro:
        raise UserError(f"train.global_batch_size = {batch}: must be a multiple of train.micro_batch_size = {micro}")


def check_labels(method: Method, setting: Setting, source: ImageSource) -> None:
    """Raise UserError if the data's labels are not the teacher's classes."""
    known, labels = setting.num_classes, source.labels
    if not known or not method.needs_images:
        return
    if labels is None:
        raise UserError(f"data: has no labels, but the teacher was trained on {known} classes; give it labels")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= known:
        raise UserError(f"data: labels go from {low} to {high}; the teacher knows 0 to {known - 1}")


def check_optimizers(config: RunConfig, players: Sequence[str]) -> None:
    """Raise UserError if a player has no optimiser, or an optimiser no player."""
    for name in config.optimizers:
        if name not in players and name != "default":
            raise UserError(f"optimizers.{name}: no such player; choose from {', '.join([*players, 'default'])}")
    for name in players:
        config.optimizer(name)
