"""Guidance scales as settings: a number, or a range from which each sample's is drawn."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import ValidationError, WrapValidator
from torch import Tensor

from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Draw
from diffdistill.settings.numbers import Number


def _checked(value: Any, check: Any) -> Any:
    """One sentence in place of one for each of the two types."""
    try:
        scale = check(tuple(value) if isinstance(value, list) else value)  # YAML knows lists alone
    except ValidationError:
        raise ValueError("must be a finite number, or a range [low, high]") from None
    if isinstance(scale, tuple) and scale[0] > scale[1]:
        raise ValueError(f"the range must rise: {list(scale)}")
    return scale


Scale = Annotated[Number | tuple[Number, Number], WrapValidator(_checked)]
"""w of D_u + w (D_c - D_u): one, or the least and the greatest, drawn evenly for each sample."""


def draw_scales(rng: StepRandom, scales: Mapping[str, Scale]) -> dict[str, Tensor]:
    """[B] in float64 for each setting that is a range, by its name."""
    ranges = {name: scale for name, scale in scales.items() if isinstance(scale, tuple)}
    uniforms = rng.uniforms(list(ranges)) if ranges else {}
    return {name: low + uniforms[name] * (high - low) for name, (low, high) in ranges.items()}


def scale_in(draw: Draw, name: str, scale: Scale) -> float | Tensor:
    """What a score is asked with: the setting itself, or where it is a range, what was drawn for each sample, [B]."""
    return draw[name] if isinstance(scale, tuple) else scale


def other_than_one(scale: Scale) -> float | None:
    """A value of the setting that needs a teacher which can be guided; None if there is none."""
    return next((w for w in (scale if isinstance(scale, tuple) else (scale,)) if w != 1), None)
