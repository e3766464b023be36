"""Whether a denoiser can be guided: asked here alone, by methods, samplers and evaluation alike."""

from torch import Tensor

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.guidance.first_steps import FirstSteps
from diffdistill.diffusion.guidance.policies import Guidance
from diffdistill.settings.schema import UserError


def check_guidance(denoiser: Denoiser, setting: str, scale: Guidance | tuple[float, float]) -> None:
    """Raise UserError where a setting asks for guidance of a network that saw "no class" as little as a scale.

    setting: its name, for the user.  scale: of it: a number, one for each sample, the ends of a range, or a policy;
    1 asks for nothing.
    """
    if isinstance(scale, FirstSteps):
        check_guidance(scale.teacher, f"{setting} (of the first steps)", scale.guidance)
        scale = scale.rest
    values = scale.tolist() if isinstance(scale, Tensor) else scale if isinstance(scale, tuple) else (scale,)
    asked = [value for value in values if value != 1]
    if asked and not denoiser.takes_guidance:
        raise UserError(f"{setting}: {asked[0]} needs a model trained with class_dropout > 0; use 1")


def check_null_condition(denoiser: Denoiser, what: str) -> None:
    """Raise UserError where the network knows no "no class", for what needs that estimate itself, and not guidance.

    what: needs it, for the user: a setting and its value.
    """
    if not denoiser.net.has_null_condition:
        takes = " (it takes a scale as its input instead)" if denoiser.takes_guidance else ""
        raise UserError(f"{what} needs an unconditional estimate: a model trained with class_dropout > 0{takes}")
