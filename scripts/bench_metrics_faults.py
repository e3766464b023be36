"""Which metric sees which fault? Real CIFAR-10, spoilt in known ways, against real CIFAR-10.

DIFFDISTILL_TEST_DATA=FOLDER python scripts/bench_metrics_faults.py [--features resnet20|efficientnet] [--count 2000]
    [--references 50000] [--clean 5] [--keep FOLDER]

FOLDER holds load.py with `cifar10(split)`, and cifar-resnets/. A clean set is `count` test images that no other clean
set has; the faults spoil the first clean set's images or choose others of the test split. A value that lies further
from the clean sets' mean than 4 of their standard deviations is in bold: the metric sees that fault.
"""

import argparse
import importlib.util
import io
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from describe_machine import describe
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

from diffdistill.eval.features.extractors import AnyFeatures, CifarResNet, EfficientNetLite0, Extractor, load_extractor
from diffdistill.eval.metrics.distances import frechet_from_features
from diffdistill.eval.metrics.kernels import kid
from diffdistill.eval.metrics.neighbours import prdc

Pixels = NDArray[np.uint8]
Judged = tuple[Tensor, Tensor]  # features [N, d] and labels [N]
SPREADS = 4


def jpeg(image: Image.Image) -> Image.Image:
    """Saved as JPEG with quality 75, and read back."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return Image.open(buffer).convert("RGB")


def blur(image: Image.Image) -> Image.Image:
    """A Gaussian blur with a standard deviation of one pixel."""
    return image.filter(ImageFilter.GaussianBlur(1))


def spoilt(images: Pixels, how: Callable[[Image.Image], Image.Image]) -> Pixels:
    """Every one of [N, H, W, 3]."""
    return np.stack([np.asarray(how(Image.fromarray(image))) for image in images])


def extract(extractor: Extractor, images: Pixels, *, name: str, keep: Path | None) -> Tensor:
    """Features [N, d] and the classifier's choice [N] beside them: [N, d + 1]. A file of an earlier run is taken."""
    file = keep / f"{extractor.label}-{name}-{len(images)}.npy" if keep else None
    if file and file.is_file():
        return torch.from_numpy(np.load(file))
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    found = []
    for batch in tensor.split(64):
        made = extractor(batch)
        assert made.logits is not None
        found.append(torch.cat([made.features, made.logits.argmax(1, keepdim=True).float()], 1))
    rows = torch.cat(found)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, rows.numpy())
    return rows


def without(labels: Tensor, classes: int, count: int) -> Tensor:
    """The first `count` images of all but the last so many classes."""
    return (labels < 10 - classes).nonzero().flatten()[:count]


def within_classes(fake: Judged, real: Judged) -> float:
    """The mean over the classes that there are of the Frechet distance of a class's images to the real ones of it."""
    present = fake[1].unique()
    distances = [frechet_from_features(fake[0][fake[1] == c], real[0][real[1] == c]) for c in present]
    return statistics.fmean(distances)


def judge(fake: Judged, real: Judged, choice: Tensor | None) -> dict[str, float]:
    """All metrics.  choice: the class that the network sees in each image."""
    near = prdc(real[0][:10_000], fake[0], nearest_k=3, density_k=5)
    found = {
        "FD": frechet_from_features(fake[0], real[0]),
        "KID x 1000": 1000 * kid(fake[0], real[0], subset_size=min(1000, len(fake[0])))[0],
        "precision": near.precision,
        "recall": near.recall,
        "density": near.density,
        "coverage": near.coverage,
    }
    if choice is not None:
        found |= {
            "FD within classes": within_classes(fake, real),
            "label seen": float((choice == fake[1]).float().mean()),
        }
    return found


def table(rows: dict[str, dict[str, float]], num_clean: int) -> str:
    """Markdown: the clean sets' mean and spread, then the faults."""
    clean = list(rows.values())[:num_clean]
    columns = list(clean[0])
    means = {column: statistics.fmean(row[column] for row in clean) for column in columns}
    spreads = {column: statistics.stdev(row[column] for row in clean) for column in columns}
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    cells = [f"{means[column]:.3f} ± {spreads[column]:.3f}" for column in columns]
    lines.append("| test images, mean and spread | " + " | ".join(cells) + " |")
    for name, row in list(rows.items())[num_clean:]:
        seen = [abs(row[column] - means[column]) > SPREADS * spreads[column] for column in columns]
        marks = [
            f"**{row[column]:.3f}**" if bold else f"{row[column]:.3f}"
            for column, bold in zip(columns, seen, strict=True)
        ]
        lines.append(f"| {name} | " + " | ".join(marks) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, and what it was measured with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", choices=("resnet20", "efficientnet"), default="resnet20")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--references", type=int, default=50_000)
    parser.add_argument("--clean", type=int, default=5)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    home = Path(os.environ["DIFFDISTILL_TEST_DATA"])
    began = time.process_time()
    is_resnet = options.features == "resnet20"
    features: AnyFeatures = CifarResNet() if is_resnet else EfficientNetLite0()
    weights = home / "cifar-resnets" / "resnet20-12fca82f.th" if is_resnet else None
    rows = measure(load_extractor(features, weights=weights), load(home / "load.py"), options, is_resnet=is_resnet)
    print(table(rows, options.clean))
    print(
        f"\n{features.label}: {options.count:,} images a row against the first {options.references:,} of the training "
        f"split, {options.clean} clean sets; {time.process_time() - began:.0f} CPU-seconds on {describe()}"
    )


def measure(
    extractor: Extractor, data: ModuleType, options: argparse.Namespace, *, is_resnet: bool
) -> dict[str, dict[str, float]]:
    """Every row by its name, the clean sets first.  is_resnet: the network knows CIFAR-10's classes."""
    count: int = options.count
    train, train_labels = data.cifar10("train")
    test, test_labels = data.cifar10("test")
    labels = torch.from_numpy(test_labels.astype(np.int64))
    pool = max(options.clean * count, 2 * count)

    def of(images: Pixels, name: str) -> Tensor:
        return extract(extractor, images, name=name, keep=options.keep)

    real = of(train[: options.references], "train")[:, :-1]
    known = torch.from_numpy(train_labels.astype(np.int64))[: options.references]
    clean = of(test[:pool], "test")
    sets: dict[str, tuple[Tensor, Tensor]] = {
        f"clean {number}": (clean[part], labels[part])
        for number, part in enumerate(torch.arange(options.clean * count).split(count))
    }
    first = labels[:count]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    sets["copies of training images"] = (of(train[: options.references], "train")[-count:], known[-count:])
    sets["JPEG, quality 75"] = (of(spoilt(test[:count], jpeg), "jpeg"), first)
    sets["blur of 1 pixel"] = (of(spoilt(test[:count], blur), "blur"), first)
    sets["labels shuffled"] = (clean[:count], first[order])
    for dropped in (1, 2, 5):
        chosen = without(labels[:pool], dropped, count)
        sets[f"{dropped} of 10 classes dropped"] = (clean[chosen], labels[chosen])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few samples in a class: said on the page
        return {
            name: judge((rows[:, :-1], told), (real, known), rows[:, -1] if is_resnet else None)
            for name, (rows, told) in sets.items()
        }


def load(file: Path) -> ModuleType:
    """The data folder's own reader."""
    spec = importlib.util.spec_from_file_location("load", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
