"""What a network may be conditioned on."""

from collections.abc import Callable
from dataclasses import dataclass, fields

from torch import Tensor

from diffdistill.diffusion.on_device import cat, part


@dataclass(frozen=True, kw_only=True)
class Cond:
    """What a network may be conditioned on, besides x_t and t. Every part is [B, ...] or None.

    label: [B] int64 in 0 .. num_classes - 1, or num_classes for "no class".
    text: [B, L, C] token embeddings.  text_mask: [B, L], bool or int64, which of them count.  pooled_text: [B, C].
    text_bias: [B, L], a mask in the place of text_mask that is added to attention's scores: all tokens are seen.
    size: in pixels: [B, 6], SDXL's added sizes, or [B, 2], PixArt's height and width.
    guidance_input: [B], a guidance scale that the network takes as input.
    style: [B, S], how much each of a student's styles weighs.
    end_time: [B], an end time (trajectory students).  augmentation: [B, A], EDM's augmentation labels.
    """

    label: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    text_bias: Tensor | None = None
    pooled_text: Tensor | None = None
    size: Tensor | None = None
    guidance_input: Tensor | None = None
    end_time: Tensor | None = None
    style: Tensor | None = None
    augmentation: Tensor | None = None

    def parts(self) -> dict[str, Tensor]:
        """The parts that are given, by name."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in named if value is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> "Cond":
        """The same parts, each changed by `change`."""
        return Cond(**{name: change(value) for name, value in self.parts().items()})

    def __getitem__(self, index: slice | Tensor) -> "Cond":
        return self.map(lambda value: part(value, index))

    @staticmethod
    def cat(first: "Cond", second: "Cond") -> "Cond":
        """Both batches, one after the other. Raises ValueError if they have different parts."""
        left, right = first.parts(), second.parts()
        if left.keys() != right.keys():
            raise ValueError(f"cannot join conditions with {sorted(left)} and {sorted(right)}")
        return Cond(**{name: cat([left[name], right[name]]) for name in left})


NO_COND = Cond()
