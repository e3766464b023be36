"""One image file as pixels: uint8, grey or RGB, cropped and resized. Nothing is changed without a note of it."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from diffdistill.data.collection import Content, UnreadableImage
from diffdistill.data.colour import ADOBE_BY_EXIF, is_adobe_by_exif, to_eight_bits, to_srgb
from diffdistill.settings.numbers import as_size

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What is decoded, whatever the file's name says. Formats that run other programs (EPS) are not among them."""

SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    *(".pbm", ".pnm", ".avif", ".heic", ".heif", ".jxl", ".jp2"),
)
"""Names that mean an image. The last five are there to be named as unreadable rather than passed over."""

MAX_PIXELS = 2**27

ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)
"""The tag of EXIF that says how an image lies, and its values of those on their side."""

ANIMATED = "animated: the first frame is taken"
TRANSPARENT = "transparent: laid on white"
ENLARGED = "smaller than the resolution: enlarged"


@dataclass(frozen=True)
class Sizing:
    """resolution: of the centre crop's side, or its height and width, resized by Pillow's Lanczos filter; None leaves
    images as they are.
    channels: 1 for grey (ITU-R 601-2), 3 for RGB, None for what the pixels have."""

    resolution: int | tuple[int, int] | None = None
    channels: int | None = None


@dataclass(frozen=True)
class Decoded:
    """pixels: [C, H, W] uint8.  notes: what was done to the image that its owner may not expect."""

    pixels: NDArray[np.uint8]
    notes: tuple[str, ...] = ()


def decode(content: Content, sizing: Sizing) -> Decoded:
    """An encoded file or an array as sRGB pixels. Raises UnreadableImage with the reason."""
    try:
        image, notes = _open(content) if isinstance(content, bytes) else (_image_of(content), ())
        image, more = _flatten(image, sizing.channels or (1 if image.mode == "L" else 3))
        image, last = _crop_and_resize(image, sizing.resolution)
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise UnreadableImage(_reason(error)) from error
    pixels = np.asarray(image)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return Decoded(np.ascontiguousarray(pixels), (*notes, *more, *last))


def size_of(content: Content) -> tuple[int, int] | None:
    """Height and width of an image as `decode` turns it upright, from its header; None where that cannot be read."""
    if not isinstance(content, bytes):
        return content.shape[0], content.shape[1]
    try:
        opened = Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = opened.size
        is_turned = opened.getexif().get(ORIENTATION) in TURNED
    except Exception:  # of which `decode` gives the reason
        return None
    found = (width, height) if is_turned else (height, width)
    return found if min(found) > 0 else None


def _open(content: bytes) -> tuple[Image.Image, tuple[str, ...]]:
    """The upright image in sRGB, 8 bits a channel."""
    if not content:
        raise UnreadableImage("empty")
    opened = Image.open(io.BytesIO(content), formats=FORMATS)
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width} x {height} pixels, over the limit of {MAX_PIXELS:,}")
    is_animated = getattr(opened, "is_animated", False) and opened.format in ("GIF", "PNG", "WEBP")
    tiles: Any = getattr(opened, "tile", None)
    rawmode = tiles[0][3] if opened.format == "PNG" and tiles else ""  # gone once it is loaded
    opened.load()
    notes = ((ANIMATED,) if is_animated else ()) + ((ADOBE_BY_EXIF,) if is_adobe_by_exif(opened) else ())
    image, more = to_eight_bits(ImageOps.exif_transpose(opened), opened, rawmode)
    image, last = to_srgb(image)
    return image, (*notes, *more, *last)


def _image_of(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _flatten(image: Image.Image, channels: int) -> tuple[Image.Image, tuple[str, ...]]:
    """Any of Pillow's modes as L or RGB, what is transparent laid on white."""
    notes: tuple[str, ...] = ()
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        if np.asarray(image)[..., 3].min() < 255:
            white = Image.new("RGBA", image.size, "white")
            image, notes = Image.alpha_composite(white, image), (TRANSPARENT,)
    return image.convert("L" if channels == 1 else "RGB"), notes


def _crop_and_resize(
    image: Image.Image, resolution: int | tuple[int, int] | None
) -> tuple[Image.Image, tuple[str, ...]]:
    """The largest part in the middle of the resolution's aspect, at the resolution."""
    width, height = image.size
    if min(width, height) < 2:
        raise UnreadableImage(f"{width} x {height} pixels: a placeholder, not an image")
    if resolution is None:
        return image, ()
    rows, columns = as_size(resolution)
    inner_width = min(width, max(round(height * columns / rows), 1))
    inner_height = min(height, max(round(width * rows / columns), 1))
    left, top = (width - inner_width) // 2, (height - inner_height) // 2
    if (inner_width, inner_height) != image.size:
        image = image.crop((left, top, left + inner_width, top + inner_height))
    if (columns, rows) != image.size:
        image = image.resize((columns, rows), Image.Resampling.LANCZOS)
    return image, (ENLARGED,) if inner_height < rows or inner_width < columns else ()


def _reason(error: Exception) -> str:
    """Pillow's fault in a few words, without memory addresses."""
    if isinstance(error, UnidentifiedImageError):
        return f"not an image in a format that is read ({', '.join(FORMATS)})"
    text = " ".join(str(error).split())[:100]
    return text or type(error).__name__
