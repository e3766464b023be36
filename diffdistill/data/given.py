"""Images that a program gives as an object: this process knows them by the key of their content."""

from typing import Any, Literal

from diffdistill.data.source import ImageSource
from diffdistill.data.torch_dataset import as_source
from diffdistill.settings.schema import UserError, schema

_GIVEN: dict[str, ImageSource] = {}


@schema
class GivenData:
    """kind: the object's class, for messages.  key: of its content."""

    name: Literal["given"] = "given"
    kind: str
    key: str

    def load(self) -> ImageSource:
        if self.key not in _GIVEN:
            raise UserError(
                f"data: is a {self.kind} object from a Python program, which a config cannot name; resume from "
                "Python, with dd.Trainer(config, data=..., resume=True)"
            )
        return _GIVEN[self.key]


def give_data(data: Any) -> GivenData:
    """A torch Dataset or an ImageSource as the `data` of a config, in this process; it stays in memory until its end.

    Raises UserError as `as_source`.
    """
    source = as_source(data)
    _GIVEN[source.key] = source
    return GivenData(kind=type(data).__name__, key=source.key)
