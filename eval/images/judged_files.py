"""Images from files as the source of an evaluation: the first N of them are repeat 0, the next N repeat 1."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from diffdistill.eval.images.files import ImageFiles
from diffdistill.eval.images.generate import show
from diffdistill.eval.protocols.protocol import Protocol
from diffdistill.eval.records.record import Cost, ModelRecord
from diffdistill.settings.schema import UserError


@dataclass(frozen=True)
class FileImages:
    """A folder's, a zip's or a .npz file's images, in the order of their names.

    Raises UserError if there are fewer than the protocol's repeats take.
    """

    images: ImageFiles
    protocol: Protocol
    method: str | None = None
    seed: int | None = None
    cost: Cost | None = None
    sampler_record: None = None

    def __post_init__(self) -> None:
        there, protocol = len(self.images), self.protocol
        if there < self.needed:
            hint = "; --repeats 1 takes fewer, which is another protocol" if there >= protocol.num_images else ""
            raise UserError(
                f"{self.images.origin}: holds {there:,} images; {protocol.name} takes {protocol.repeats} x "
                f"{protocol.num_images:,}{hint}"
            )

    @property
    def needed(self) -> int:
        """Images that are read."""
        return self.protocol.num_images * self.protocol.repeats

    @property
    def key(self) -> Mapping[str, Any]:
        return {"files": self.images.sha256}

    @cached_property
    def model(self) -> ModelRecord:
        return ModelRecord(source=self.images.origin, sha256=self.images.sha256)

    @property
    def notes(self) -> str:
        more = len(self.images) - self.needed
        left = [f"the first {self.needed:,} of {len(self.images):,} images by name"] if more else []
        return "; ".join([*left, *filter(None, [self.images.notes])])

    def take(self, repeat: int, index: Tensor) -> Tensor:
        """The images `index` of a repeat. Raises UserError if they are not of the protocol's size."""
        images = self.images.rows(repeat * self.protocol.num_images + index)
        shape, is_resized = self.protocol.image_shape, self.protocol.preparation.side is not None
        if shape and not is_resized and tuple(images.shape[1:]) != shape:
            raise UserError(
                f"{self.images.origin}: images are {show(tuple(images.shape[1:]))}; {self.protocol.name} is for "
                f"{show(shape)}"
            )
        return images
