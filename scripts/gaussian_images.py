"""One Gaussian of a data set, with a mean for each class, as images: the row of a table with nothing but two moments.

    python scripts/gaussian_images.py "{name: image_folder, path: photos}" gaussian.npz --count 10000
    diffdistill eval gaussian.npz --protocol cifar10-resnet20

Classes take turns, as where a protocol's labels are cyclic. Numbers are rounded to 8 bits, cut off at black and white.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from diffdistill.data import AnyData
from diffdistill.data.gaussian import gaussian_of
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.settings.schema import schema
from diffdistill.settings.values import parse_yaml, validate


@schema
class Told:
    """The data set, as in a run's config."""

    data: AnyData


def main(
    data: Annotated[str, typer.Argument(help="A data set as in a config: {name: digits}, for one.")],
    out: Annotated[Path, typer.Argument(help="The .npz file to write.")],
    count: Annotated[int, typer.Option(help="Of images.", min=1)] = 10_000,
    seed: Annotated[int, typer.Option(help="Of their noise.", min=0)] = 0,
) -> None:
    source = validate(Told, {"data": parse_yaml(data, origin="DATA")}, origin="DATA").data.load()
    gaussian, index = gaussian_of(source, by_class=True), torch.arange(count)
    labels = index % max(1, len(gaussian.means) - 1)  # the last mean is of all
    noise = StepRandom(seed, 0, index).normal("gaussian", gaussian.values.shape)
    flat = (gaussian.sample(noise, labels).float().clamp(-1, 1) + 1) * 127.5
    images = flat.round().to(torch.uint8).reshape(count, *source.image_shape).movedim(1, -1)
    np.savez(out, images=images.numpy(), labels=labels.numpy())


if __name__ == "__main__":
    typer.run(main)
