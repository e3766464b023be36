"""What an extractor's batch size changes: in the features, and in the Frechet distance made of them.

python scripts/bench_extractor_batches.py IMAGES [--features efficientnet_lite0] [--weights FILE]

Statistics and metrics are the same bits for any batch. A network need not be: its convolutions may sum in another
order. The distance is that of the first half of the images from the second half.
"""

import argparse

import torch
from describe_machine import describe
from torch import Tensor

from diffdistill.eval.evaluation.workers import exact_matmul, find_workers
from diffdistill.eval.features.extractors import CifarResNet, EfficientNetLite0, Extractor, load_extractor
from diffdistill.eval.images.files import open_images
from diffdistill.eval.metrics.distances import frechet_from_features
from diffdistill.eval.protocols.protocol import Preparation

BATCHES = (256, 64, 7, 1)
KINDS = {"efficientnet_lite0": EfficientNetLite0(), "resnet20": CifarResNet(depth=20)}


def features(extractor: Extractor, images: Tensor, batch: int) -> Tensor:
    with exact_matmul():
        return torch.cat([extractor(part).features.cpu() for part in images.split(batch)])


def distance(found: Tensor) -> float:
    return frechet_from_features(*found.double().chunk(2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="a folder, a zip or a .npz")
    parser.add_argument("--features", choices=KINDS, default="efficientnet_lite0")
    parser.add_argument("--weights")
    parser.add_argument("--count", type=int, default=512)
    options = parser.parse_args()
    source = open_images(options.images, Preparation(), is_judged=False)
    images = source.rows(torch.arange(min(options.count, len(source))))
    device = find_workers().device
    extractor = load_extractor(KINDS[options.features], weights=options.weights, device=device)
    first = features(extractor, images, BATCHES[0])
    print(f"{describe()}; {len(images)} images, {extractor.label}, {device.type}")
    print(f"batch {BATCHES[0]:3}: distance {distance(first):.9f}")
    for batch in BATCHES[1:]:
        found = features(extractor, images, batch)
        changed = float((found - first).abs().max() / first.abs().max())
        moved = distance(found) / distance(first) - 1
        print(
            f"batch {batch:3}: largest change of a feature {changed:.1e} of the largest, of the distance {moved:+.1e}"
        )


if __name__ == "__main__":
    main()
