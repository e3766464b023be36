"""What an evaluation costs beside its network, and against clean-fid's on the same network; memory against N.

python scripts/bench_features.py [--images N] [--side N] [--batch N] [--only memory|speed] [--counts N ...] [--out FILE]

The network is torchvision's Inception-v3 with random weights at 299 x 299, on one thread, in CPU-seconds. Ours is all
of `diffdistill eval` on a folder of PNGs: reading, hashing, resizing, the network, features to disk, statistics, the
Frechet distance. Of clean-fid's only the features are counted, with the same weights, batch and folder. The bare
network is the same call on inputs that are ready, made after every second batch of either and taken off its time: what
else the machine does then weighs on both alike, and the two are compared by what they cost over it. Memory is the peak
of a process that judges N small images by a small network.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from describe_machine import describe
from peak import peak_bytes
from PIL import Image
from torch import Tensor, nn

from diffdistill.eval.evaluation.bench import make_bench
from diffdistill.eval.evaluation.reference import About, RealFeatures, open_reference, save_reference
from diffdistill.eval.evaluation.run import evaluate
from diffdistill.eval.evaluation.workers import Workers
from diffdistill.eval.features.extractors import Extractor, register
from diffdistill.eval.features.networks import ready
from diffdistill.eval.features.resize import network_input
from diffdistill.eval.images.files import open_images
from diffdistill.eval.images.judged_files import FileImages
from diffdistill.eval.metrics.distances import frechet_from_few
from diffdistill.eval.metrics.moments import Summary
from diffdistill.eval.metrics.settings import Frechet
from diffdistill.eval.protocols.protocol import Protocol, Reference

MEMORY_COUNTS = (1_000, 4_000, 8_000)
HALF = (128 / 255,) * 3
"""clean-fid's (x - 128) / 128 as a mean and a standard deviation."""


def inception() -> nn.Module:
    """2048 features; the same weights at every call."""
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    network = inception_v3(weights=None, aux_logits=False, transform_input=False, init_weights=False)
    network.fc = nn.Identity()
    return network.eval()


def photographs(count: int, side: int) -> np.ndarray:
    """[count, side, side, 3]: smooth, with a little noise, so that PNG takes as long to read them as photographs."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, side // 8, side // 8, 3), np.uint8)
    fine = rng.integers(-8, 9, (count, side, side, 3))
    smooth = [np.asarray(Image.fromarray(c).resize((side, side), Image.Resampling.BICUBIC), np.int16) for c in coarse]
    return (np.stack(smooth) + fine).clip(0, 255).astype(np.uint8)


def cpu_seconds(call: Callable[[], object]) -> float:
    """Of this process while it runs."""
    before = time.process_time()
    call()
    return time.process_time() - before


def ours(place: Path, count: int, extractor: Extractor, root: Path, batch: int) -> Callable[[], object]:
    """The whole evaluation of a folder or a zip, against statistics as of 50,000 images."""
    protocol = Protocol(
        name="bench",
        num_images=count,
        reference=Reference(name="bench", dataset="bench", split="train"),
        metrics=(Frechet(features=register(extractor)),),
    )
    assert extractor.num_features is not None
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(4 * extractor.num_features, extractor.num_features, generator=generator)
    about = About(label=extractor.label, origin="bench", num_images=50_000, images_sha256="0" * 64)
    summary = replace(Summary.of(real), count=50_000)
    save_reference(RealFeatures(about, summary), root / "reference.npz")
    references = {extractor.label: str(root / "reference.npz")}
    bench = make_bench(protocol, Workers(torch.device("cpu")), batch_size=batch, references=references)

    def run() -> object:
        source = FileImages(open_images(place, protocol.preparation), bench.protocol)
        return evaluate(source, bench, name="bench", root=root)

    return run


@dataclass
class Beside:
    """A network, and after every second call the bare one on inputs that are ready, as a yardstick.

    seconds, images: of the bare one, by the calling thread's clock.
    """

    network: Callable[[Tensor], Tensor]
    bare: Callable[[], object]
    batch: int
    calls: int = 0
    seconds: float = 0.0
    images: int = 0

    def __call__(self, values: Tensor) -> Tensor:
        features = self.network(values)
        self.calls += 1
        if self.calls % 2:
            before = time.thread_time()
            self.bare()
            self.seconds += time.thread_time() - before
            self.images += self.batch
        return features


def cost(run: Callable[[], object], beside: Beside, images: int) -> dict[str, float]:
    """CPU-seconds of `run` on so many images, of the bare network on as many in the same minutes, and their ratio."""
    seconds = cpu_seconds(run) - beside.seconds
    bare = beside.seconds / beside.images * images
    return {"seconds": seconds, "bare": bare, "ratio": seconds / bare}


def speed(images: int, side: int, batch: int) -> dict[str, dict[str, float]]:
    """Our evaluation and clean-fid's features, each against the bare network; and our distance alone."""
    from cleanfid.fid import get_folder_features

    torch.set_num_threads(1)
    fast, plain = ready(inception(), torch.device("cpu")), inception()
    prepare = network_input(299, mean=HALF, std=HALF)
    inputs = prepare(torch.from_numpy(photographs(batch, side)).permute(0, 3, 1, 2))
    own = Beside(fast, lambda: fast(inputs), batch)
    other = Beside(lambda values: plain((values - 128) / 128), lambda: fast(inputs), batch)
    extractor = Extractor(label="inception-random", network=own, prepare=prepare, num_features=2048)

    def theirs() -> None:
        get_folder_features(
            str(folder), other, num_workers=0, batch_size=batch, device=torch.device("cpu"), verbose=False
        )

    def distance() -> None:
        real = open_reference(Path(temporary) / "reference.npz", label=extractor.label).summary
        frechet_from_few(torch.rand(images, 2048), real)  # of 1,000; of more than 2048 by their summaries

    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        folder = Path(temporary) / "images"
        folder.mkdir()
        for number, pixels in enumerate(photographs(images, side)):
            Image.fromarray(pixels).save(folder / f"{number:05d}.png")
        run = ours(folder, images, extractor, Path(temporary), batch)
        torch.testing.assert_close(fast(inputs), plain(inputs), rtol=1e-3, atol=1e-4)  # the same network; warm now
        found = {"ours": cost(run, own, images)}
        print(found, flush=True)
        found["clean-fid's features"] = cost(theirs, other, images)
        return found | {"of ours, the distance": {"seconds": cpu_seconds(distance)}}


def memory(counts: Sequence[int] = MEMORY_COUNTS) -> dict[str, float]:
    """MiB at the peak, by N, each in its own process."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "images.zip"
        pixels = photographs(100, 32)
        with zipfile.ZipFile(file, "w") as archive:
            for number in range(max(counts)):
                buffer = BytesIO()
                Image.fromarray(np.roll(pixels[number % 100], number // 100, 0)).save(buffer, "PNG")
                archive.writestr(f"{number:06d}.png", buffer.getvalue())
        found = {}
        for count in counts:
            command = [sys.executable, __file__, "--peak", str(count), "--file", str(file)]
            found[f"{count:,} images"] = float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        return found


def peak(count: int, file: Path) -> float:
    """MiB that this process held at most, when it judged the first `count` images."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 64, 8, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    extractor = Extractor(
        label="small", network=network, prepare=network_input(32, mean=HALF, std=HALF), num_features=64
    )
    with tempfile.TemporaryDirectory() as temporary:
        ours(file, count, extractor, Path(temporary), 256)()
    return peak_bytes() / 2**20


def main() -> None:
    """Print the figures, and write them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=("memory", "speed"))
    parser.add_argument("--counts", type=int, nargs="+", default=MEMORY_COUNTS, help="images of each peak of memory")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak(options.peak, options.file))
        return
    told: dict[str, object] = {"machine": describe()}
    print(told["machine"])
    if options.only != "speed":
        held = told["peak_mib"] = memory(options.counts)
        print("peak MiB: " + ", ".join(f"{name} {value:.0f}" for name, value in held.items()), flush=True)
    if options.only != "memory":
        seconds = told["cpu_seconds"] = speed(options.images, options.side, options.batch)
        print(f"{options.images} images of {options.side} x {options.side}, CPU-seconds:", seconds)
        both, theirs = seconds["ours"], seconds["clean-fid's features"]
        alone = (both["seconds"] - seconds["of ours, the distance"]["seconds"]) / both["bare"]
        ratios = told["ratios"] = {
            "ours / bare": both["ratio"],
            "ours without the distance / bare": alone,
            "ours / clean-fid's features": both["ratio"] / theirs["ratio"],
            "ours without the distance / clean-fid's features": alone / theirs["ratio"],
        }
        print(", ".join(f"{name} {value:.3f}" for name, value in ratios.items()))
    if options.out:
        options.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
