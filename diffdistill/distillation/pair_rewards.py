"""A reward of pairs: how far samples of one condition are apart, between a network's features.

Cideron et al. 2024, arXiv:2410.06084 (of pairs of one prompt, 1 - cos of their embeddings).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser, device_of
from diffdistill.settings.registry import NameOf, from_above
from diffdistill.settings.schema import Positive, UserError, schema


@schema
class Embedding:
    """features: the network whose features are compared, by name, as in a protocol of evaluation; `null`: the teacher's
    bottleneck.  ratio: the noise-to-signal ratio at which the teacher sees the samples."""

    features: Annotated[str, NameOf("FEATURES")] | None = None
    ratio: Positive = 0.6

    def __call__(self, images: Tensor, noise: Tensor, cond: Cond, teacher: Denoiser) -> Tensor:
        """images, noise: [B, ...]; returns [B, D] with the images' graph, float32 or wider, without autocast.

        Of the teacher's bottleneck the mean over places.
        """
        with torch.autocast(images.device.type, enabled=False):
            seen = images.to(torch.promote_types(images.dtype, torch.float32))
            if self.features is not None:
                seen = seen if teacher.runtime.decode is None else teacher.runtime.decode(seen)
                extractor = _extractor(self.features, str(images.device))
                found = extractor.network(extractor.prepare(seen))
                return _wide(found[0] if isinstance(found, tuple) else found)
            path = teacher.path
            ratio = torch.full((len(seen),), self.ratio, dtype=torch.float64, device=seen.device)
            t = path.whole(path.time_of_ratio(ratio))
            return _wide(teacher.features(path.diffuse(seen, noise, t), t, cond).flatten(2).mean(2))

    def check(self, setting: str, image_shape: Sequence[int], teacher: Denoiser) -> None:
        """Raise UserError naming the setting where there are no such features, or no gradient to the images."""
        probe = torch.zeros(2, *image_shape, device=device_of(teacher)).requires_grad_(True)
        label = torch.zeros(2, dtype=torch.int64, device=probe.device)
        try:
            found = self(probe, torch.randn_like(probe), teacher.class_cond(label), teacher)
        except (UserError, ValueError) as error:
            raise UserError(f"{setting}: {error}") from None
        if not found.requires_grad:
            raise UserError(f"{setting}.features = {self.features!r}: has no gradient with respect to the images")


def pair_diversity(embeddings: Tensor, size: int) -> Tensor:
    """Of each sample the mean of 1 - cos to the others of its group: its share of the reward of pairs, [B].

    embeddings: [B, D], `size` samples after one another of one condition.  The mean over a batch is an unbiased
    estimate of E (1 - cos) over two samples of one condition, whatever the size.  Its gradient does not change a
    length, and vanishes where all of a group are the same: what has collapsed stays so.
    """
    groups = F.normalize(embeddings, dim=1).unflatten(0, (-1, size))
    cosines = groups @ groups.mT
    others = cosines.sum(2) - cosines.diagonal(dim1=1, dim2=2)
    return (1 - others / (size - 1)).flatten()


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


@lru_cache(maxsize=2)
def _extractor(name: str, device: str) -> Any:
    """Raises UserError where the network needs settings, or its weights are missing."""
    try:
        features = from_above("FEATURES").find(name)()
    except (TypeError, ValueError):
        raise UserError(f"features = {name!r}: takes settings; register features of your own that have them") from None
    return from_above("load_extractor")(features, device=device)
