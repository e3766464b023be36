"""Sampling from models: classes, or prompts by number."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from diffdistill.data.classes import told_classes
from diffdistill.data.names import composed
from diffdistill.diffusion.guidance.check import check_guidance
from diffdistill.diffusion.guidance.policies import Guidance
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.threads import sampling_threads, threads
from diffdistill.models.spec import ModelSpec, TrainedModel
from diffdistill.settings.schema import UserError

NO_CLASS = "none: it is unconditional"


@torch.no_grad()
def sample_images(
    model: TrainedModel,
    *,
    count: int,
    label: int | str | None = None,
    seed: int = 0,
    guidance: Guidance = 1.0,
    batch: int = 256,
) -> Tensor:
    """[count, C, H, W] in [-1, 1]. Image i depends on (seed, i) and its class alone, not on the batch size."""
    num_classes = model.spec.num_classes
    classes = model.spec.classes or tuple(range(num_classes))
    told = label_numbers(() if label is None else (label,), model.spec)
    known = torch.tensor(classes or (0,))
    made = []
    for first in range(0, count, batch):
        index = torch.arange(first, min(first + batch, count))
        chosen = known[index % len(known)] if not told else torch.full_like(index, told[0])
        made.append(sample_rows(model, StepRandom(seed, 0, index), chosen, guidance=guidance))
    return torch.cat(made)


@torch.no_grad()
def sample_rows(model: TrainedModel, rng: StepRandom, labels: Tensor, *, guidance: Guidance) -> Tensor:
    """One image for each of the numbers of `rng`, [B, C, H, W].

    labels: classes, or numbers of encoded prompts, [B].  Raises UserError on guidance that the model does not know.
    """
    shape = model.spec.image_shape
    check_guidance(model.denoiser, "--guidance", guidance)
    with threads(sampling_threads(model.denoiser, shape)):
        return model.spec.sampler(
            model.denoiser,
            rng.normal("noise", shape),
            model.denoiser.class_cond(labels),
            guidance=guidance,
            fresh_noise=rng.fresh_noise(shape),
        )


def label_numbers(labels: Sequence[int | str], spec: ModelSpec) -> tuple[int, ...]:
    """Classes by number; text is a number in digits, or else a class's name. Raises UserError as `check_labels`."""
    classes = spec.classes or tuple(range(spec.num_classes))
    found = tuple(number_of(label, spec.class_names) for label in labels)
    check_labels(found, classes, spec.num_classes, spec.class_names)
    return tuple(int(label) for label in found)


def number_of(label: int | str, names: Sequence[str]) -> int | str:
    """A class's number, or the text that is none's name."""
    if not isinstance(label, str):
        return int(label)  # NumPy's integers, too
    if re.fullmatch(r"-?[0-9]{1,9}", label):
        return int(label)
    found = _called(label, names)
    return found[0] if len(found) == 1 else label


def _called(label: str, names: Sequence[str]) -> list[int]:
    """The classes of that name, else of the same text, else with it among their synonyms."""
    alike = [number for number, name in enumerate(names) if composed(name) == composed(label)]
    return [number for number in alike if names[number] == label] or alike or _synonyms(label, names)


def _synonyms(label: str, names: Sequence[str]) -> list[int]:
    """The classes one of whose names it is, where they have several: "tench, Tinca tinca"."""
    several = [[part.strip() for part in composed(name).split(",")] for name in names]
    return [number for number, parts in enumerate(several) if len(parts) > 1 and composed(label) in parts]


def check_labels(
    labels: Sequence[int | str], classes: Sequence[int], num_classes: int, names: Sequence[str] = ()
) -> None:
    """Raise UserError on a class that is not among these, or a name of several.  names: of all classes, by number."""
    for label in labels:
        if label not in classes:
            is_all = len(classes) == num_classes and not names
            several = f"0 to {num_classes - 1}" if is_all else told_classes(classes, names)
            called = _called(label, names) if isinstance(label, str) else []
            if len(called) > 1:
                raise UserError(
                    f"--label {label}: several classes have this name, {told_classes(called, names)}; give the number"
                )
            raise UserError(f"--label {label}: unknown class; the model knows {several if classes else NO_CLASS}")
