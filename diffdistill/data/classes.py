"""Classes by name: a number means a class only together with the names that it was counted by."""

import re
from collections import defaultdict
from collections.abc import Sequence

import torch

from diffdistill.data.collection import listed, shown
from diffdistill.data.names import composed
from diffdistill.data.shards import table_key
from diffdistill.data.source import ImageSource, MappedImages
from diffdistill.data.torch_dataset import DatasetImages
from diffdistill.settings.schema import UserError

NUM_SHOWN = 20
IMAGENET_CLASSES = 1000
IMAGENET_FOLDERS = ("n01440764", "n15075141")  # ILSVRC2012's first and last, and what these two are called
IMAGENET_WORDS = ("tench", "toilet tissue")


def class_names_of(source: object) -> tuple[str, ...]:
    """The names of a source's classes, by label; empty where labels are plain numbers, or nothing says."""
    names = tuple(getattr(source, "class_names", ()))
    return () if names == tuple(map(str, range(len(names)))) else names


def told_classes(numbers: Sequence[int], names: Sequence[str] = ()) -> str:
    """Classes for people: 0 = cat, 2 = fox; the numbers alone where they have no names."""
    told = [f"{number} = {names[number]}" if number < len(names) else str(number) for number in numbers]
    return listed(told, most=NUM_SHOWN)


def same_names(some: Sequence[str], others: Sequence[str]) -> bool:
    """Whether classes have the same names by number, as text; those that nothing names may be any."""
    return not some or not others or tuple(map(composed, some)) == tuple(map(composed, others))


def classes_with_images(source: ImageSource) -> tuple[int, ...]:
    """The classes that have an image, in order; empty where all have one, or there are no labels."""
    if source.labels is None:
        return ()
    found = tuple(source.labels.unique().tolist())
    return () if len(found) == source.num_classes else found


def with_teachers_classes(
    source: ImageSource, known: Sequence[str], *, num_classes: int = 0
) -> tuple[ImageSource, tuple[str, ...]]:
    """The source with the numbers that the teacher has for its classes, and what the user should know.

    known: the names of the teacher's classes by number; empty where its checkpoint holds none.  num_classes: of the
    teacher; data that names its classes by such numbers, "3" and "5", means these.
    Classes are matched by their names, exactly or as the same text.  Raises UserError if the teacher has none of a
    name. Where either side has no names the numbers are taken as they are.
    """
    names = class_names_of(source)
    if source.labels is None or tuple(map(composed, names)) == tuple(map(composed, known)):
        return source, ()
    if not names:
        return source, (f"data: labels are numbers, taken for the teacher's: {told_classes(range(len(known)), known)}",)
    if not known and set(names) <= set(numbers := tuple(map(str, range(num_classes)))):
        known = numbers
    if not known:
        told = told_classes(range(len(names)), names)
        return source, (f"data: the teacher's checkpoint holds no names of its classes, which are taken to be {told}",)
    places = numbers_among(names, known)
    note = f"data: classes are matched with the teacher's by name: {told_classes(sorted(places), known)}"
    if not isinstance(source, MappedImages | DatasetImages):
        told = told_classes(range(len(known)), known)
        raise UserError(f"data: {type(source).__name__} must number its classes like the teacher: {told}")
    made = source.with_classes(
        torch.tensor(places)[source.labels.cpu()],
        num_classes=len(known),
        class_names=tuple(known),
        key=source.key if places == tuple(range(len(places))) else table_key(source.key, places),
    )
    return made, (note,)


def numbers_among(
    names: Sequence[str], known: Sequence[str], *, origin: str = "data", whose: str = "the teacher"
) -> tuple[int, ...]:
    """Of each name its number in `known`, by the name or else the same text; of several alike that of its own place.
    ImageNet's thousand folders are in the order of its classes, whose names are words elsewhere; words in another
    order, as the alphabet's, are not matched with them.

    origin, whose: for messages, whose names `names` and `known` are.
    Raises UserError naming those that are not there, or that several have.
    """
    if (_are_imagenets_folders(names) and _are_imagenets_words(known)) or (
        _are_imagenets_words(names) and _are_imagenets_folders(known)
    ):
        return tuple(range(IMAGENET_CLASSES))
    exact, alike = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
    for number, name in enumerate(known):
        exact[name].append(number)
        alike[composed(name)].append(number)
    found = [exact.get(name) or alike.get(composed(name), []) for name in names]
    missing = [name for name, numbers in zip(names, found, strict=True) if not numbers]
    if missing:
        raise UserError(
            f"{origin}: {whose} knows no class {listed(missing)}; it knows {told_classes(range(len(known)), known)}. "
            f"Rename the classes, leave them out, or use numbers as labels"
        )
    chosen = [numbers[0] if len(numbers) == 1 else own if own in numbers else -1 for own, numbers in enumerate(found)]
    several = [name for name, number in zip(names, chosen, strict=True) if number < 0]
    if several:
        raise UserError(f"{origin}: {whose} knows several classes of the name {listed(several)}; rename them")
    if len(set(chosen)) < len(chosen):
        raise UserError(f"{origin}: two classes have the name of one of {whose}'s: {listed(sorted(map(shown, names)))}")
    return tuple(chosen)


def _are_imagenets_folders(names: Sequence[str]) -> bool:
    """Whether names are the ids of WordNet that ImageNet's folders have, in order."""
    if len(names) != IMAGENET_CLASSES or (names[0], names[-1]) != IMAGENET_FOLDERS:
        return False
    return all(re.fullmatch(r"n[0-9]{8}", name) for name in names) and list(names) == sorted(names)


def _are_imagenets_words(names: Sequence[str]) -> bool:
    """Whether names are words for ImageNet's classes in the order of its folders, synonyms after commas."""
    ends = tuple(name.split(",")[0].strip().lower() for name in (*names[:1], *names[-1:]))
    return len(names) == IMAGENET_CLASSES and ends == IMAGENET_WORDS


def note_empty(source: ImageSource, *, of_teacher: Sequence[int] | None) -> tuple[str, ...]:
    """A note of the classes that have no image.

    of_teacher: those that a teacher knows, which are drawn all the same.
    """
    if source.labels is None:
        return ()
    known = range(source.num_classes) if of_teacher is None else of_teacher
    empty = sorted(set(known) - set(source.labels.unique().tolist()))
    if not empty:
        return ()
    what = "they are not drawn" if of_teacher is None else "the teacher's are drawn all the same"
    told = told_classes(empty, class_names_of(source))
    return (f"data: {len(empty):,} of {len(known):,} classes have no image; {what}: {told}",)
