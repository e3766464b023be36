"""The names of classes that a pipeline's index keeps."""

ID2LABEL = "id2label"  # in the index: where DiTPipeline keeps the names of its classes


def names_in(table: object, num_classes: int) -> tuple[str, ...]:
    """The classes' names of an `id2label`, {"0": name, ...}, by number; () where it does not name each of them."""
    if not num_classes or not isinstance(table, dict) or len(table) != num_classes:
        return ()
    names = tuple(table.get(str(number)) for number in range(num_classes))
    return names if all(isinstance(name, str) for name in names) else ()  # type: ignore[return-value]
