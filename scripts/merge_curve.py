"""Quality against diversity along the weight between two runs, as a table: `diffdistill merge` for several weights.

    python scripts/merge_curve.py runs/guided runs/plain --weights 0,0.25,0.5,0.75,1

Of 1,800 digits, 180 of each class, all of the same noise: the Frechet distance in pixels, precision (quality) and
recall (coverage); diversity is the mean RMS distance of two images of one class over that of the training images.
"""

import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer

from diffdistill.data.digits import Digits
from diffdistill.eval.evaluation.digits import generate, score
from diffdistill.models.load import load_model
from diffdistill.models.merge import merge_runs
from diffdistill.training.reports.health import mean_distance

PER_CLASS = 180  # of the protocol's images, class by class


def main(
    first: Annotated[Path, typer.Argument(help="A run on digits.")],
    second: Annotated[Path, typer.Argument(help="Another of the same architecture and start.")],
    weights: Annotated[str, typer.Option(help="Of the second run.")] = "0,0.25,0.5,0.75,1",
) -> None:
    torch.set_num_threads(1)
    images, labels = Digits(split="train").tensors()
    usual = mean_distance(images, labels)
    print("| weight | fd-pixels | precision | recall | diversity |")
    print("|---|---|---|---|---|")
    for weight in map(float, weights.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            merge_runs([first, second], Path(folder), (weight,))
            model = load_model(folder)
        made = generate(model.denoiser, model.spec.sampler)
        found = score(made)
        diversity = mean_distance(made, torch.arange(len(made)) // PER_CLASS) / usual
        row = (
            f"{weight:g}",
            *(f"{value:.3f}" for value in (found.fd_pixels, found.precision, found.recall, diversity)),
        )
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    typer.run(main)
