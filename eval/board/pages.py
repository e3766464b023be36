"""Self-contained HTML pages: templates, pictures as data, and a policy that lets a browser load nothing else."""

import base64
import functools
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path as FilePath
from typing import Any

from diffdistill import __version__
from diffdistill.eval.board.figures import shorten
from diffdistill.settings.schema import UserError

TEMPLATES = FilePath(__file__).with_name("html")
MOST_PIXELS = 64_000_000  # of a picture that is read
WIDEST = 1600  # pixels of a picture that is embedded; a wider one is scaled down
LARGEST_PNG = 400_000  # bytes; a larger picture is embedded as WebP


@dataclass(frozen=True)
class Embedded:
    """A picture as a data URL."""

    url: str
    width: int
    height: int


def render(template: str, *, scripts: tuple[str, ...], **values: Any) -> str:
    """A page of html/<template>. Everything in `values` is escaped.

    scripts: file names in html/, run in this order.  The page's Content-Security-Policy allows these scripts and this
    style by their hashes, pictures as data, and nothing else: no request leaves it, and no injected script runs.
    """
    style = _asset("style.css")
    script = "\n".join(_asset(name) for name in scripts)
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_sha256(style)}'; script-src '{_sha256(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    from markupsafe import Markup

    page = _environment().get_template(template)
    now = datetime.now(UTC)
    return page.render(
        **values,
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        version=__version__,
        date=f"{now.day} {now:%B %Y}",
    )


def embed_picture(file: FilePath) -> Embedded:
    """A PNG, JPEG or WebP, decoded and encoded anew, so that nothing but pixels gets into the page.

    Raises UserError if it is no such picture, or has more than MOST_PIXELS.
    """
    from PIL import Image

    try:
        with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise UserError(f"{file}: {opened.width} x {opened.height} pixels, of at most {MOST_PIXELS:,}")
            picture = opened.convert("RGB")
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise anything
        reason = getattr(error, "strerror", None) or "no PNG, JPEG or WebP that can be read"
        raise UserError(f"{file}: {reason}") from None
    if picture.width > WIDEST:
        height = max(1, round(picture.height * WIDEST / picture.width))
        picture = picture.resize((WIDEST, height), Image.Resampling.LANCZOS)
    kind, data = "png", _encoded(picture, "PNG", optimize=True)
    if len(data) > LARGEST_PNG:
        kind, data = "webp", _encoded(picture, "WEBP", quality=90)
    return Embedded(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", picture.width, picture.height)


def is_web(url: object) -> bool:
    """Whether a link may lead there: http and https only, never javascript: or file:."""
    return isinstance(url, str) and url.startswith(("https://", "http://"))


def plain(number: float) -> str:
    """A number for people: integers with thousands separators, others with six figures."""
    if isinstance(number, int):
        return f"{number:,}" if abs(number) >= 10_000 else str(number)
    return f"{number:,.0f}" if number.is_integer() and abs(number) >= 10_000 else f"{number:.6g}"


def short(value: object) -> str:
    """Any value in a few words."""
    return "nothing" if value is None else shorten(str(value), 60)


@functools.cache
def _environment() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise UserError(f"pages need the package jinja2 (pip install jinja2): {error}") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"is_web": is_web, "plain": plain, "short": short, "of_mappings": _of_mappings}
    return environment


def _of_mappings(value: Any) -> bool:
    return bool(value) and all(isinstance(item, Mapping) for item in value)


def _asset(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _encoded(picture: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()
