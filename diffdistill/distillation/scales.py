"""Guidance scales as settings: a number, a range from which each sample's is drawn, or the other side's."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ValidationError, WrapValidator
from torch import Tensor

from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Draw
from diffdistill.settings.numbers import NonNegative, Number


def _checked(value: Any, check: Any) -> Any:
    """One sentence in place of one for each of the two types."""
    return _read(value, check, "must be a finite number, or a range [low, high]")


def _checked_amount(value: Any, check: Any) -> Any:
    return _read(value, check, "must be a finite number, at least 0, or a range [low, high] of such")


def _checked_or_same(value: Any, check: Any) -> Any:
    return _read(value, check, "must be a finite number, or a range [low, high], or same")


def _read(value: Any, check: Any, choices: str) -> Any:
    try:
        scale = check(tuple(value) if isinstance(value, list) else value)  # YAML knows lists alone
    except ValidationError:
        raise ValueError(choices) from None
    if isinstance(scale, tuple) and scale[0] > scale[1]:
        raise ValueError(f"must be increasing: {list(scale)}")
    return scale


Scale = Annotated[Number | tuple[Number, Number], WrapValidator(_checked)]
"""w of D_u + w (D_c - D_u): one, or the least and the greatest, drawn evenly for each sample."""

Amount = Annotated[NonNegative | tuple[NonNegative, NonNegative], WrapValidator(_checked_amount)]
"""How much of something, or the least and the greatest."""

FakeScale = Annotated[Number | tuple[Number, Number] | Literal["same"], WrapValidator(_checked_or_same)]
"""The fake score's: as `Scale`, or the teacher's `guidance`, in each sample the same number."""

Scales = Mapping[str, FakeScale]
"""The scales of a method by their settings' names: `guidance`, the teacher's, and `fake_guidance`."""


def scale_of(scales: Scales, name: str) -> Scale:
    """The setting; where it is "same", the teacher's."""
    scale = scales.get(name, 1.0)
    return scale_of(scales, "guidance") if isinstance(scale, str) else scale


def draw_scales(rng: StepRandom, scales: Scales) -> dict[str, Tensor]:
    """[B] in float64 for each setting that is a range, by its name."""
    ranges = {name: scale for name, scale in scales.items() if isinstance(scale, tuple)}
    uniforms = rng.uniforms(list(ranges)) if ranges else {}
    return {name: low + uniforms[name] * (high - low) for name, (low, high) in ranges.items()}


def scale_in(draw: Draw, scales: Scales, name: str) -> float | Tensor:
    """What a score is asked with: the setting itself, or where it is a range, what was drawn for each sample, [B]."""
    scale = scales[name]
    if isinstance(scale, str):
        return scale_in(draw, scales, "guidance")
    return draw[name] if isinstance(scale, tuple) else scale


def other_than_one(scale: Scale) -> float | None:
    """A value of the setting that needs a teacher which can be guided; None if there is none."""
    return next((w for w in (scale if isinstance(scale, tuple) else (scale,)) if w != 1), None)
