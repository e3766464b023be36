"""Data sets: what a config may name under `data`. Each has `load()`, which gives an ImageSource."""

from diffdistill.data.captioned_images import CaptionedImages
from diffdistill.data.digits import Digits
from diffdistill.data.huggingface import HuggingFace
from diffdistill.data.image_folder import ImageFolder
from diffdistill.data.npz import Npz
from diffdistill.data.prompts import Prompts
from diffdistill.data.registry import DATA, AnyData, DataConfig
from diffdistill.data.torchvision_sets import MNIST, Cifar10, FashionMNIST
from diffdistill.data.web_dataset import WebDataset

__all__ = [
    "DATA",
    "MNIST",
    "AnyData",
    "CaptionedImages",
    "Cifar10",
    "DataConfig",
    "Digits",
    "FashionMNIST",
    "HuggingFace",
    "ImageFolder",
    "Npz",
    "Prompts",
    "WebDataset",
]
