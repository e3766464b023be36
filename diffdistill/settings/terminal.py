"""What people are shown: texts as they are, without what a terminal would obey, and without secrets."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import quote

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, but for tabs and line breaks; escape sequences begin with one
    "\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)  # what turns the direction of text, is not seen, or is no text
SECRET_NAME = re.compile(r"key(?!b)|token(?!iz)|secret|passw|_pwd|credential|auth(?!or)", re.IGNORECASE)
SECRET_TEXT = re.compile(
    r"\b(api[_-]?key|token|password|secret|authorization)(['\"]?\s*[=:]\s*['\"]?)(bearer\s+)?[^\s;,&'\"]+",
    re.IGNORECASE,
)
SECRET_URL = re.compile(r"(://)[^/\s@]+@")
SECRET_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b|://[^/\s@:]*:[^/\s@]+@")


class Console(RichConsole):
    """rich's, that takes no markup in texts unless asked to, and shows control characters instead of sending them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def on_broken_pipe(self) -> None:
        """Nobody reads any more (`2>&1 | head`): nothing more is shown, and the work goes on. rich would end it."""
        self.quiet = True
        with suppress(OSError, ValueError):  # of a file that is no descriptor
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.file.fileno())
            os.close(nowhere)


def say(message: str) -> None:
    """One message on the standard error stream, without secrets."""
    Console(stderr=True).print(hide_secrets(message), soft_wrap=True)


def printable(text: str) -> str:
    """A text whose control characters, and others that deceive the eye, are written as escapes: \\x1b, \\u202e."""
    return OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)


def hide_secrets(text: str) -> str:
    """`text` without the values of environment variables that sound secret, `api_key=...`, `://user:password@` and
    tokens of the Hugging Face hub."""
    values = [value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= 6]
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***").replace(quote(value, safe=""), "***")
    text = SECRET_URL.sub(r"\1***@", SECRET_TEXT.sub(r"\1\2***", text))
    return SECRET_TOKEN.sub("***", text)


def holds_secret(text: str) -> bool:
    """Whether there is no doubt: a token of the hub, or a URL with a password."""
    return SECRET_TOKEN.search(text) is not None
