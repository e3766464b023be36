"""YAML of plain values as PyYAML writes it, line by line: a board of ten thousand models has twenty thousand cards.

PyYAML asks of every text anew whether it could be taken for a number, a date or a truth value. Here whatever begins
with a letter and holds nothing that YAML reads is written as it is, and all else goes the slow way.
"""

import json
import re
from functools import lru_cache
from typing import Any

import yaml

WIDTH = 120
LONGEST_KEY = 100  # PyYAML writes a key of 128 characters in another form
PLAIN = re.compile(r"[A-Za-z](?:[A-Za-z0-9_.,()/+=±-]| (?! |$))*", re.ASCII)
WORDS = frozenset({"yes", "no", "on", "off", "true", "false", "null", "y", "n"})


class _UnknownError(Exception):
    """Here it is not known how PyYAML would write a value."""


def write_yaml(value: Any) -> str:
    """Mappings, lists, texts and numbers as YAML in block style, keys in their order, the same as yaml.safe_dump of
    them with width 120, unicode allowed."""
    lines = list[str]()
    try:
        _add(value, "", "", lines)
    except _UnknownError:
        return _slowly(value)
    return "\n".join([*lines, ""])


def _slowly(value: Any) -> str:
    """By libyaml where it is there and writes the same: outside of ASCII it escapes what PyYAML does not."""
    text = json.dumps(value)
    dumper = yaml.SafeDumper if "\\u" in text else getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    value = json.loads(text)  # nothing twice by identity, which YAML would write as an alias
    return str(yaml.dump(value, Dumper=dumper, sort_keys=False, allow_unicode=True, width=WIDTH))


def _add(value: Any, first: str, indent: str, lines: list[str]) -> None:
    """The lines of a mapping or a list that is not empty.  first: how the first one begins, the others by `indent`."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            if isinstance(inner, (dict, list)) and inner:
                lines.append(f"{first}{_key(key)}:")
                deeper = indent if isinstance(inner, list) else indent + "  "
                _add(inner, deeper, deeper, lines)
            else:
                lines.append(_line(f"{first}{_key(key)}: ", inner))
            first = indent
    elif isinstance(value, list) and value:
        for inner in value:
            if isinstance(inner, (dict, list)) and inner:
                _add(inner, f"{first}- ", indent + "  ", lines)
            else:
                lines.append(_line(f"{first}- ", inner))
            first = indent
    else:
        raise _UnknownError


def _line(head: str, value: Any) -> str:
    line = head + _scalar(value)
    if len(line) > WIDTH:
        raise _UnknownError
    return line


def _key(key: Any) -> str:
    if not isinstance(key, str) or len(key) > LONGEST_KEY or not _is_plain(key):
        raise _UnknownError
    return key


@lru_cache(maxsize=4096)
def _is_plain(text: str) -> bool:
    return PLAIN.fullmatch(text) is not None and text.lower() not in WORDS


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return value if _is_plain(value) else _alone(value)
    if isinstance(value, float):
        return _alone(value) if "e" in repr(value) or "n" in repr(value) else repr(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if value in ({}, []):
        return str(value)
    raise _UnknownError


@lru_cache(maxsize=4096)
def _alone(value: str | float) -> str:
    """A text or a number as PyYAML writes it, on one line."""
    text = _slowly({"a": value})
    if text.count("\n") != 1:
        raise _UnknownError
    return text[3:-1]
