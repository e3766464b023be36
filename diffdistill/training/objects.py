"""A run's parts that a program gives as objects, and how its config names them."""

from dataclasses import replace
from typing import Any

from diffdistill.data.given import give_data
from diffdistill.models.given import give_teacher, is_given
from diffdistill.settings.schema import UserError
from diffdistill.training.config import RunConfig


def with_objects(config: RunConfig, teacher: Any = None, data: Any = None) -> RunConfig:
    """The config that names them by the keys of their content, which is what a checkpoint holds of them.

    teacher: a Denoiser for images of the data's shape.  data: a torch Dataset or an ImageSource.
    Raises UserError for what they cannot be, and where the config names a teacher of its own.
    """
    if data is not None:
        config = replace(config, data=give_data(data))
    if teacher is None:
        return config
    if config.teacher is not None and not is_given(config.teacher):
        raise UserError(f"teacher = {config.teacher!r}: another is passed as an object; use one of the two")
    return replace(config, teacher=give_teacher(teacher, image_shape=tuple(config.data.load().image_shape)))
