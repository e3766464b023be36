"""The preference models as rewards: the networks and weights of the metrics, with a gradient to the images.

Xu et al. 2023, arXiv:2304.05977 (ReFL) and Ren et al. 2024, arXiv:2404.13686 (Hyper-SD) train by such scores.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffdistill.distillation.rewards import Judge
from diffdistill.eval.features.extractors import Extractor, Hps, LaionAesthetic, PickScore, load_extractor
from diffdistill.settings.schema import UserError


class Preference(Judge):
    """One model's score of each image and its prompt. Its weights lie where the metric's do."""

    def __init__(self, name: str, features: PickScore | Hps | LaionAesthetic) -> None:
        self.name, self.features = name, features
        self.reads_text = not isinstance(features, LaionAesthetic)
        self._loaded: Extractor | None = None

    def load(self, device: torch.device) -> None:
        """Raises UserError if a package or the weights are missing, saying where they belong."""
        if self._loaded is None or self._loaded.device != device:
            self._loaded = load_extractor(self.features, device=device)

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        return self._loaded.parts if self._loaded else ()

    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """images: [B, 3, H, W]; those of one channel are grey.  Raises UserError on others: latents."""
        if images.shape[1] not in (1, 3):
            raise UserError(f"reward: {self.name!r} takes images of 1 or 3 channels, not {images.shape[1]}")
        self.load(images.device)
        extractor = self._loaded
        assert extractor is not None
        found = extractor.network(extractor.prepare(images))
        if isinstance(found, tuple):
            return found[1].squeeze(1)
        assert extractor.encode_text is not None
        return (found * extractor.encode_text(captions).clone()).sum(1)


PICKSCORE = Preference("pickscore", PickScore())
HPS = Preference("hps", Hps())
LAION_AESTHETIC = Preference("laion_aesthetic", LaionAesthetic())
