"""A teacher as people have it: a pipeline, with a single-file checkpoint, LoRA files or learned tokens over it, or for
images of another size.
"""

from typing import Annotated

from pydantic import Discriminator, Tag

from diffdistill.settings.numbers import Number, Sides, as_size
from diffdistill.settings.schema import schema


@schema
class LoRAFile:
    """place: a .safetensors file, or a folder or a name on the hub with one.  weight: multiplies its factors."""

    place: str
    weight: Number = 1.0


@schema
class TokenFile:
    """A token of textual inversion.  place: as a LoRA's.  token: its name in prompts; null: the name in its file."""

    place: str
    token: str | None = None


@schema
class ComposedTeacher:
    """name: a pipeline's folder or its name on the hub, the base.

    file: a single-file checkpoint (.safetensors) whose weights replace the pipeline's.
    lora: any number of files.
    textual_inversion: learned tokens for prompts.
    resolution: of its images in pixels, the side of a square or height and width; null: that of its network's config.
    """

    name: str
    file: str | None = None
    lora: tuple[LoRAFile, ...] = ()
    textual_inversion: tuple[TokenFile, ...] = ()
    resolution: Sides | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels, where they are asked for."""
        return None if self.resolution is None else as_size(self.resolution)

    @property
    def is_plain(self) -> bool:
        """Whether nothing is added or changed."""
        return not (self.file or self.lora or self.textual_inversion or self.resolution)


AnyTeacher = Annotated[
    Annotated[str, Tag("place")] | Annotated[ComposedTeacher, Tag("composed")],
    Discriminator(lambda value: "place" if isinstance(value, str) else "composed"),
]
"""A run's folder, a pipeline's, or its name on the hub; or what a pipeline's is made with."""
