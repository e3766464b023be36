"""Which families there are, and which of them a pipeline is of."""

from functools import cache
from importlib import import_module

from diffdistill.models.teachers.family import Family
from diffdistill.settings.schema import UserError

FAMILIES = {
    "ddpm": "diffdistill.models.teachers.ddpm:DDPM",
    "dit": "diffdistill.models.teachers.dit:DiT",
    "sd": "diffdistill.models.teachers.sd:StableDiffusion",
    "sdxl": "diffdistill.models.teachers.sdxl:StableDiffusionXL",
    "pixart": "diffdistill.models.teachers.pixart:PixArt",
    "sd3": "diffdistill.models.teachers.sd3:StableDiffusion3",
    "flux": "diffdistill.models.teachers.flux:Flux",
    "sana": "diffdistill.models.teachers.sana:Sana",
}
"""Every family's name and where its class is."""


@cache
def find_family(name: str) -> Family:
    """The adapter of a family."""
    module, attribute = FAMILIES[name].split(":")
    made: Family = getattr(import_module(module), attribute)()
    return made


def detect_family(pipeline: object, *, origin: str) -> Family:
    """The family of a pipeline's class, `_class_name` of its model_index.json. Raises UserError if it is of none."""
    known = {name: family for family in map(find_family, FAMILIES) for name in family.pipelines}
    if not isinstance(pipeline, str) or pipeline not in known:
        raise UserError(f"{origin}: _class_name = {pipeline!r}: no family of teachers; choose from {', '.join(known)}")
    return known[pipeline]
