"""How large anything may be that a user or a file gives: numbers, sizes of networks and images, texts and files.

The types of settings in numbers.py are made of them; `faults_of` holds for every value that is read, whatever its type
says. Each limit is far beyond what anyone trains, and far below what would overflow, loop for hours, or fill the memory
by one number.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

MAX_INTEGER = 2**63 - 1
MAX_NUMBER = 1e100
"""Of two such numbers sum and product are still finite."""
MAX_COUNT = 10**12
"""Steps, images, whatever is counted."""
MAX_SIDE = 16_384
"""Pixels of an image's side."""
MAX_CHANNELS = 4_096
"""Of an image or a latent."""
MAX_VALUES = 2**30
"""Of an image, all channels together."""
MAX_WIDTH = 65_536
"""Features of a layer."""
MAX_BLOCKS = 64
"""Blocks of one resolution, and resolutions."""
MAX_DEPTH = 1_024
"""Blocks of a network without resolutions."""
MAX_PARAMETERS = 40 * 10**9
"""Of a network."""
MAX_TENSORS = 30_000
"""Of a network: a million small layers take hours to make."""
MAX_CLASSES = 1_000_000
MAX_SAMPLING_STEPS = 10_000
MAX_LEVELS = 1_000_000
"""Noise levels of a table."""
MAX_BATCH = 2**20
MAX_PROCESSES = 4_096
"""Also threads."""
MAX_GIB = 1_000_000
"""Memory that a user says there is."""
MAX_IMAGES = 10_000
"""Pictures that a command draws."""
MAX_COLUMNS = 256
"""Of a grid of pictures."""

MAX_SHOWN_BITS = 512
"""Of an integer in a message: Python takes the square of them to write it."""
MAX_ITEMS = MAX_CLASSES
"""Of a list or a group of settings."""
MAX_TOTAL = 2 * MAX_CLASSES + 200_000
"""Values in all lists and groups together: a model's classes are two lists."""
MAX_FAULTS = 100
"""In one message."""
MAX_CHOSEN = 1_000
"""Of a list in which each item is something large, as a metric."""
MAX_NESTING = 64
"""Groups within groups."""
MAX_TEXT = 2**20
"""Characters of one text."""
MAX_CONFIG_BYTES = 2**18
"""A config, a protocol, an override: YAML is read slowly."""
MAX_LISTED = MAX_CONFIG_BYTES // 64
"""Numbers in a list of a config: one takes 32 bytes of YAML at most, so that two such lists are read."""
MAX_JSON_BYTES = 2**25
"""state.json, a manifest, a pipeline's index: made of nothing but empty groups it takes 24 times as much memory."""
MAX_NAMES_BYTES = MAX_JSON_BYTES // 2
"""The names of all classes in such a file, beside their numbers, which take 14 bytes each."""
MAX_LINE_BYTES = 2**22
"""A record: one line."""
MAX_REPEATS = MAX_LINE_BYTES // 64
"""Values of a metric in a record: one takes 26 bytes at most, so that two such metrics are read."""
MAX_LOG_BYTES = 2**26
"""Of a log, its end: some hundred thousand reports of a run."""
MAX_ROWS = 3_000_000
"""Lines of a table."""
MAX_TABLE_BYTES = 64 * MAX_ROWS
"""Prompts, captions, labels: read line by line; what is kept of one is less than a gigabyte."""
MAX_RECORDS_BYTES = 2**25
"""Records, and the captions of a protocol: read whole."""


def faults_of(data: Any) -> list[str]:
    """Each place at which nested data is larger than anything that is read, with what is wrong; of many the first."""
    layer, total = [data], 0
    for depth in range(MAX_NESTING + 1):
        total += len(layer)
        if total > MAX_TOTAL:
            return [f"the value: holds more than {MAX_TOTAL:,} values altogether"]
        inner: list[Any] = []
        for value in layer:
            kind = type(value)
            if value is None or kind is bool or (kind is str and len(value) <= MAX_TEXT):
                continue
            if kind is float and -MAX_NUMBER <= value <= MAX_NUMBER:
                continue
            if _wrong(value, depth):
                return list(islice(_placed(data, "", 0), MAX_FAULTS))
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, (list, tuple)):
                inner += value
        layer = inner
    return []


def _placed(data: Any, place: str, depth: int) -> Iterator[str]:
    wrong = _wrong(data, depth)
    if wrong:
        yield f"{place or 'the value'}{wrong}"
    elif isinstance(data, dict):
        for key, item in data.items():
            yield from _placed(item, f"{place}.{key}".lstrip("."), depth + 1)
    elif isinstance(data, (list, tuple)):
        for number, item in enumerate(data):
            yield from _placed(item, f"{place}[{number}]", depth + 1)


def _wrong(value: Any, depth: int) -> str:
    """What is wrong with a value itself, "" if nothing."""
    if isinstance(value, int):  # also bool
        if abs(value) > MAX_INTEGER:
            shown = f" = {value}" if value.bit_length() <= MAX_SHOWN_BITS else ""
            return f"{shown}: an integer of {value.bit_length()} bits; at most 63 are read"
    elif isinstance(value, float):
        if not abs(value) <= MAX_NUMBER:
            return f" = {value}: must be a finite number, from {-MAX_NUMBER:g} to {MAX_NUMBER:g}"
    elif isinstance(value, str):
        if len(value) > MAX_TEXT:
            return f": a text of {len(value):,} characters; at most {MAX_TEXT:,} are read"
    elif isinstance(value, (dict, list, tuple)):
        if len(value) > MAX_ITEMS:
            return f": holds {len(value):,} values; at most {MAX_ITEMS:,} are read"
        if depth == MAX_NESTING:
            return f": nested more than {MAX_NESTING} deep"
    return ""
