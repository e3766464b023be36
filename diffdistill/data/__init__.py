"""Data sets: what a config may name under `data`. Each has `load()`, which gives an ImageSource."""

from typing import Annotated

from pydantic import Field

from diffdistill.data.captioned_images import CaptionedImages
from diffdistill.data.digits import Digits
from diffdistill.data.huggingface import HuggingFace
from diffdistill.data.image_folder import ImageFolder
from diffdistill.data.npz import Npz
from diffdistill.data.prompts import Prompts
from diffdistill.data.torchvision_sets import Cifar10, FashionMNIST
from diffdistill.data.web_dataset import WebDataset

AnyData = Annotated[
    Digits | Cifar10 | FashionMNIST | ImageFolder | HuggingFace | Npz | Prompts | CaptionedImages | WebDataset,
    Field(discriminator="name"),
]
"""The data sets that a config may name."""

__all__ = [
    "AnyData",
    "CaptionedImages",
    "Cifar10",
    "Digits",
    "FashionMNIST",
    "HuggingFace",
    "ImageFolder",
    "Npz",
    "Prompts",
    "WebDataset",
]
