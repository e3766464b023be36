"""The names that a torch Dataset has for its labels: `classes` and `class_to_idx`, as torchvision's sets say them."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import ConcatDataset, Subset

from diffdistill.data.collection import listed
from diffdistill.settings.schema import UserError

Names = tuple[str, ...]


def names_of_dataset(
    dataset: Any, given: Sequence[str] | None, *, num_classes: int, num_used: int
) -> tuple[Names, tuple[str, ...]]:
    """The names of a Dataset's classes by label, at most `num_classes`, and what the user should know.

    given: what a program says they are, instead of the Dataset; () for none.  num_used: the greatest label and one.
    Raises UserError if names that were given are fewer than the labels, or parts of the Dataset disagree on a label.
    """
    if given is not None:
        if given and len(given) < num_used:
            raise UserError(f"data: class_names: {len(given)} names, but there is a label {num_used - 1}")
        return tuple(given)[:num_classes], ()
    if not num_used:
        return (), ()
    if _is_renumbered(dataset):
        told = f"data: {type(dataset).__name__} has a target_transform, so its class names are not taken"
        return (), (f"{told}; give class_names=...",)
    names = _names(dataset)
    return (names[:num_classes], ()) if len(names) >= num_used else ((), ())


def _names(dataset: Any) -> Names:
    """Those that the Dataset says, or what it is a plain part or sum of."""
    if type(dataset) is Subset:
        return _names(dataset.dataset)
    if type(dataset) is not ConcatDataset:
        return _own_names(dataset)
    found = [_names(part) for part in dataset.datasets]
    longest = max(found, key=len)
    for names in found:
        if names != longest[: len(names)]:
            raise UserError(
                f"data: parts of a ConcatDataset have different names for the same labels: {listed(longest)}, and "
                f"{listed(names)}; number them consistently, or give class_names=..."
            )
    return longest if all(found) else ()  # labels of a part without names may be any


def _own_names(dataset: Any) -> Names:
    """By `class_to_idx` where each number has one name, else by `classes` if that does not number them otherwise, as
    from 1; nothing where neither is such a table."""
    numbers, classes = getattr(dataset, "class_to_idx", None), getattr(dataset, "classes", None)
    if isinstance(numbers, Mapping) and sorted(numbers.values(), key=str) == sorted(range(len(numbers)), key=str):
        return _texts(sorted(numbers, key=numbers.__getitem__))
    if not isinstance(classes, list | tuple):
        return ()
    if isinstance(numbers, Mapping):
        for place, name in enumerate(classes):
            several = [one for one in (name if isinstance(name, tuple) else (name,)) if isinstance(one, str)]
            if any(numbers.get(one, place) != place for one in several):
                return ()
    return _texts(classes)


def _texts(names: Sequence[Any]) -> Names:
    """A name may be a tuple of synonyms, as torchvision's ImageNet has them."""
    told = [
        ", ".join(name) if isinstance(name, tuple) and all(isinstance(n, str) for n in name) else name for name in names
    ]
    return tuple(told) if all(isinstance(name, str) for name in told) else ()


def _is_renumbered(dataset: Any) -> bool:
    """Whether something of the user's changes labels after the Dataset has numbered and named them."""
    if type(dataset) is ConcatDataset:
        return any(map(_is_renumbered, dataset.datasets))
    if type(dataset) is Subset:
        return _is_renumbered(dataset.dataset)
    return getattr(dataset, "target_transform", None) is not None and bool(_own_names(dataset))
