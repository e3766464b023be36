"""Every data set by name, and what a config may name under `data`."""

from typing import TYPE_CHECKING, Annotated, Any, Protocol

from diffdistill.data.source import ImageSource
from diffdistill.settings.registry import OneOf, Registry, schema_class


class DataConfig(Protocol):
    """A data set's settings, a class with `@schema` and a `name` of its own."""

    @property
    def name(self) -> str: ...

    def load(self) -> ImageSource:
        """The images, ready to train on. Raises UserError if they cannot be read."""
        ...


DATA: Registry[type[DataConfig]] = Registry(
    "data",
    {
        "digits": "diffdistill.data.digits:Digits",
        "cifar10": "diffdistill.data.torchvision_sets:Cifar10",
        "mnist": "diffdistill.data.torchvision_sets:MNIST",
        "fashion_mnist": "diffdistill.data.torchvision_sets:FashionMNIST",
        "image_folder": "diffdistill.data.image_folder:ImageFolder",
        "huggingface": "diffdistill.data.huggingface:HuggingFace",
        "npz": "diffdistill.data.npz:Npz",
        "prompts": "diffdistill.data.prompts:Prompts",
        "captioned_images": "diffdistill.data.captioned_images:CaptionedImages",
        "webdataset": "diffdistill.data.web_dataset:WebDataset",
    },
    group="diffdistill.data",
    check=schema_class("load"),
    unlisted={"given": "diffdistill.data.given:GivenData"},
)
"""Every data set, by its name in a config."""

if TYPE_CHECKING:
    AnyData = DataConfig
else:
    AnyData = Annotated[Any, OneOf(DATA)]
