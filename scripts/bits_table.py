"""Bits against bytes and the Frechet distance, for a student of digits: as a table.

    python scripts/bits_table.py runs/digits-student --steps 300

A run with `qat` for each number of bits begins with the full-precision run (`init`), by the same method and settings,
and stands beside it. The last column is of the full-precision run's own weights, rounded once. Distances are of 2,000
samples of the same noise in pixels from the training images; bytes are of weights packed in their bits, and of scales.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from diffdistill.data.digits import Digits
from diffdistill.diffusion.gaussians import frechet_distance
from diffdistill.inference.draw import sample_images
from diffdistill.models.load import load_model
from diffdistill.models.spec import TrainedModel
from diffdistill.networks.qat import QuantisedTraining, on_grid, stored_bytes
from diffdistill.training.config import load_config
from diffdistill.training.trainer import Trainer

COUNT = 2000


def main(
    run: Annotated[Path, typer.Argument(help="The full-precision run's folder.")],
    steps: Annotated[int, typer.Option(help="Of each run with few bits.")] = 300,
    bits: Annotated[str, typer.Option(help="Which, separated by commas.")] = "8,4,3,2",
    group: Annotated[int | None, typer.Option(help="Weights that share a scale; default: a row.")] = None,
) -> None:
    torch.set_num_threads(1)
    source = Digits().load()
    images = source.rows(torch.arange(len(source)))
    whole, config = load_model(run), load_config(run / "config.yaml")
    print("| bits | KiB | fd-pixels, trained with them | fd-pixels, rounded alone |")
    print("|---|---|---|---|")
    print(f"| 32 | {kib(whole, None)} | {distance(whole, images):.4f} | |", flush=True)
    for number in map(int, bits.split(",")):
        few = QuantisedTraining(bits=number, group=group)
        place = f"{run}-{number}-bits"
        train = replace(config.train, steps=steps)
        Trainer(replace(config, run=place, init=str(run), qat=few, train=train), quiet=True).run()
        rounded = load_model(run)
        on_grid(rounded.denoiser.net, few)
        both = distance(load_model(place), images), distance(rounded, images)
        print(f"| {number} | {kib(whole, few)} | {both[0]:.4f} | {both[1]:.4f} |", flush=True)


def kib(model: TrainedModel, few: QuantisedTraining | None) -> str:
    return f"{stored_bytes(model.denoiser.net, few) / 1024:.1f}"


def distance(model: TrainedModel, images: Tensor) -> float:
    """The Frechet distance in pixels of its samples from these images."""
    made = sample_images(model, count=COUNT, seed=11)
    (mean, cov), (other, other_cov) = (
        (flat.mean(0), flat.T.cov()) for flat in (x.double().flatten(1) for x in (made, images))
    )
    return frechet_distance(mean, cov, other, other_cov)


if __name__ == "__main__":
    typer.run(main)
