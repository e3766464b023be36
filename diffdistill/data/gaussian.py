"""The Gaussian of a data set's images."""

import torch

from diffdistill.data.source import ImageSource
from diffdistill.diffusion.teleport import LowRankGaussian

MOST = 10_000
"""Images at most: what a mean and a covariance of low rank need."""


def gaussian_of(images: ImageSource, *, by_class: bool) -> LowRankGaussian:
    """Of the images, or of `MOST` evenly spaced ones, since many data sets are in the order of their classes.

    by_class: with a mean for each class, where the images have one.
    Raises UserError for fewer than two images.
    """
    count = min(len(images), MOST)
    index = torch.arange(count) * len(images) // max(count, 1)
    labels = images.labels.cpu()[index] if by_class and images.labels is not None else None
    return LowRankGaussian.fit(images.rows(index).cpu(), labels)
