"""What Gaussian teleportation saves on a teacher: evaluations against the distance, as a table.

    python scripts/teleport_table.py runs/digits-teacher

One Gaussian of the training images, with a mean for each class, takes the place of the first k steps of Heun's grid.
The distances are of 2,000 samples from the same noise: RMS from the samples of the whole grid, and the Frechet distance
in pixels from the training images.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from diffdistill.data.digits import Digits
from diffdistill.diffusion.gaussians import frechet_distance
from diffdistill.diffusion.sampling import Heun
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.teleport import LowRankGaussian, Teleport
from diffdistill.models.load import load_model

COUNT = 2000


def main(
    teacher: Annotated[Path, typer.Argument(help="A run's folder, of digits.")],
    steps: Annotated[int, typer.Option(help="Of Heun's whole grid.")] = 18,
) -> None:
    torch.set_num_threads(1)
    model, source = load_model(teacher), Digits().load()
    images = source.rows(torch.arange(len(source)))
    gaussian = LowRankGaussian.fit(images, source.labels)
    own = model.spec.sampler
    sampler = Heun(num_steps=steps, rho=own.rho if isinstance(own, Heun) else 7.0)
    grid = model.denoiser.path.karras_times(steps, sampler.rho)
    rng = StepRandom(11, 0, torch.arange(COUNT))
    noise, cond = rng.normal("z", model.spec.image_shape), model.denoiser.class_cond(rng.index % 10)
    with torch.no_grad():
        whole = sampler(model.denoiser, noise, cond)
        print("| left out | starts at | evaluations | RMS from the whole grid's | fd-pixels |")
        print("|---|---|---|---|---|")
        for k in range(0, steps - 2, 2):
            rest, start = replace(sampler, num_steps=steps - k), float(model.denoiser.path.ratio(grid[k]))
            made = whole if k == 0 else Teleport(rest, start, gaussian)(model.denoiser, noise, cond)
            row = (k, f"{start:.3g}", rest.num_evaluations, f"{rms(made, whole):.4f}", f"{distance(made, images):.4f}")
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


def rms(made: Tensor, wanted: Tensor) -> float:
    return float((made - wanted).square().mean().sqrt())


def distance(made: Tensor, images: Tensor) -> float:
    """The Frechet distance in pixels of two sets of images."""
    flat = [x.double().flatten(1) for x in (made, images)]
    (mean, cov), (other_mean, other_cov) = ((x.mean(0), x.T.cov()) for x in flat)
    return frechet_distance(mean, cov, other_mean, other_cov)


if __name__ == "__main__":
    typer.run(main)
