"""Small colour images for the tests of data, real where they are at hand, and ways to lay them on the disk."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

Pixels = NDArray[np.uint8]


def pictures(count: int) -> tuple[Pixels, list[int]]:
    """[count, 32, 32, 3] and labels: CIFAR-10 from $DIFFDISTILL_TEST_DATA, else coloured waves."""
    home = Path(os.environ.get("DIFFDISTILL_TEST_DATA", "")) / "cifar10"
    if not (home / "meta.npz").is_file():
        return _waves(count), [number % len(NAMES) for number in range(count)]
    sheet = Image.open(sorted(home.glob("train_*.webp"))[0]).convert("RGB")
    columns = sheet.width // 32
    corners = [(number % columns * 32, number // columns * 32) for number in range(count)]
    tiles = [np.asarray(sheet.crop((x, y, x + 32, y + 32))) for x, y in corners]
    return np.stack(tiles), np.load(home / "meta.npz")["y"][:count].tolist()


def _waves(count: int) -> Pixels:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32] / 32
    frequency, phase = rng.uniform(-3, 3, (2, count, 3, 1, 1)), rng.uniform(0, 2 * np.pi, (count, 3, 1, 1))
    waves = np.sin(2 * np.pi * (frequency[0] * x + frequency[1] * y) + phase)
    return (waves * 100 + 128).astype(np.uint8).transpose(0, 2, 3, 1)


def encode(pixels: Pixels | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """An image file's content."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def by_class(images: Pixels, labels: list[int]) -> dict[str, bytes]:
    """PNGs by name: class/number.png, sorted."""
    files = {
        f"{NAMES[label]}/{n:05d}.png": encode(pixels)
        for n, (pixels, label) in enumerate(zip(images, labels, strict=True))
    }
    return dict(sorted(files.items()))


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    """The files below `root`, in an order that is not theirs."""
    for name in sorted(files, key=lambda name: name[::-1]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(files[name])
    return root


def write_zip(file: Path, files: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED) -> Path:
    """The files in a zip, in an order that is not theirs; names are written as they are."""
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name in sorted(files, key=lambda name: name[::-1]):
            archive.writestr(zipfile.ZipInfo(name), files[name], compression)
    return file


def write_hugging_face(folder: Path, files: dict[str, bytes]) -> Path:
    """The files as a Hugging Face data set on disk, with their class as a ClassLabel."""
    import datasets

    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    images = [{"bytes": content, "path": None} for content in files.values()]
    labels = [NAMES.index(name.split("/")[0]) for name in files]
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=kinds).save_to_disk(str(folder))
    return folder
