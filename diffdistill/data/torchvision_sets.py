"""Data sets through torchvision's classes, which check their files."""

from collections.abc import Callable
from functools import partial
from pathlib import Path as FilePath
from typing import Any, Literal

import numpy as np

from diffdistill.data.collection import Collection, checked_classes
from diffdistill.data.decode import Sizing
from diffdistill.data.npz import array_items
from diffdistill.data.prepare import load_prepared
from diffdistill.data.source import MappedImages
from diffdistill.settings.schema import UserError, schema

CIFAR10_FILES = tuple(
    f"cifar-10-batches-py/{name}" for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
)
IDX_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
MNIST_FILES = tuple(f"MNIST/raw/{name}" for name in IDX_FILES)
FASHION_FILES = tuple(f"FashionMNIST/raw/{name}" for name in IDX_FILES)


@schema
class Cifar10:
    """CIFAR-10: 50,000 + 10,000 colour images 32 x 32 of 10 classes.  Krizhevsky 2009.

    root: the folder that holds cifar-10-batches-py.  download: fetch it there if it is missing.
    """

    name: Literal["cifar10"] = "cifar10"
    root: str = "data"
    split: Literal["train", "test"] = "train"
    download: bool = False
    cache: str | None = None

    def load(self) -> MappedImages:
        """The prepared images. Raises UserError if they are not there, saying what belongs where."""
        how = "unpack cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html there"
        open_set = partial(_open, "CIFAR10", root=self.root, split=self.split, download=self.download)
        return _load(self, CIFAR10_FILES, open_set, how, channels=3)


@schema
class MNIST:
    """MNIST: 60,000 + 10,000 grey images of handwritten digits, 28 x 28.  LeCun et al. 1998.

    root: the folder that holds MNIST/raw.  download: fetch it there if it is missing.
    """

    name: Literal["mnist"] = "mnist"
    root: str = "data"
    split: Literal["train", "test"] = "train"
    download: bool = False
    cache: str | None = None

    def load(self) -> MappedImages:
        """The prepared images. Raises UserError if they are not there, saying what belongs where."""
        how = "put its four files there, each through gunzip"
        open_set = partial(_open, "MNIST", root=self.root, split=self.split, download=self.download)
        return _load(self, MNIST_FILES, open_set, how, channels=1)


@schema
class FashionMNIST:
    """Fashion-MNIST: 60,000 + 10,000 grey images 28 x 28 of 10 classes.  Xiao et al. 2017, arXiv:1708.07747.

    root: the folder that holds FashionMNIST/raw.  download: fetch it there if it is missing.
    """

    name: Literal["fashion_mnist"] = "fashion_mnist"
    root: str = "data"
    split: Literal["train", "test"] = "train"
    download: bool = False
    cache: str | None = None

    def load(self) -> MappedImages:
        """The prepared images. Raises UserError if they are not there, saying what belongs where."""
        how = "put the four files of https://github.com/zalandoresearch/fashion-mnist there, each through gunzip"
        open_set = partial(_open, "FashionMNIST", root=self.root, split=self.split, download=self.download)
        return _load(self, FASHION_FILES, open_set, how, channels=1)


def _load(
    config: Cifar10 | MNIST | FashionMNIST,
    names: tuple[str, ...],
    open_set: Callable[[], Any],
    how: str,
    *,
    channels: int,
) -> MappedImages:
    root = FilePath(config.root).expanduser()
    missing = [name for name in names if not (root / name).is_file()]
    if missing and not config.download:
        raise UserError(
            f"data.root = {config.root!r}: there is no {root / missing[0]}"
            + (f" (nor {len(missing) - 1} more of its {len(names)} files)" if len(missing) > 1 else "")
            + f"; {how}, name another data.root, or set data.download=true"
        )
    return load_prepared(
        {"name": config.name, "split": config.split},
        partial(_collect, f"{config.name} in {config.root}", open_set),
        files=[] if missing else [root / name for name in names],
        sizing=Sizing(channels=channels),
        cache=config.cache,
    )


def _collect(origin: str, open_set: Callable[[], Any]) -> Collection:
    opened = open_set()
    images = np.asarray(opened.data, dtype=np.uint8)
    images = images if images.ndim == 4 else images[..., None]
    classes = checked_classes(np.asarray(opened.targets).tolist(), origin=origin, names=tuple(opened.classes))
    return Collection(origin, array_items(images), classes)


def _open(kind: str, *, root: str, split: str, download: bool) -> Any:
    """torchvision's data set. Raises UserError if torchvision is missing, or the files are damaged."""
    try:
        from torchvision import datasets
    except ImportError:
        raise UserError("torchvision is missing: pip install 'diffdistill[data]'") from None
    try:
        return getattr(datasets, kind)(FilePath(root).expanduser(), train=split == "train", download=download)
    except Exception as error:  # RuntimeError on a wrong checksum; URLError, and what a cut-off file leads to
        reason = " ".join(str(error).split())[:200].removesuffix(" You can use download=True to download it")
        raise UserError(f"data.root = {root!r}: {kind} cannot be read: {reason or type(error).__name__}") from None
