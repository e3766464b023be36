"""What a file's numbers mean as sRGB, 8 bits a channel: embedded ICC profiles, 16-bit levels, PNG's colour keys."""

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from diffdistill.data.collection import UnreadableImage

CONVERTED = "in another colour space: converted to sRGB by their profile"
UNUSABLE_PROFILE = "with a colour profile that cannot be used: taken for sRGB"
UNPROFILED_CMYK = "CMYK without a colour profile: converted by its plain formula"
ADOBE_BY_EXIF = "Adobe RGB by their Exif data, without a profile: taken for sRGB"
COARSE_KEY = "of 16 bits with a transparent colour: compared by its high byte"

SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
MAX_PROFILE_BYTES = 16 * 2**20
SRGB_TOLERANCE = 4
"""Levels by which a profile may differ from sRGB and still be called that: the common ones of that name differ."""
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF 6.0, section 8
_INTEROPERABILITY, _ADOBE_RGB = 0xA005, "R03"  # Exif 2.32 and DCF 2.0: the option file's colour space


def to_eight_bits(image: Image.Image, opened: Image.Image, rawmode: str) -> tuple[Image.Image, tuple[str, ...]]:
    """Any of Pillow's modes with 8 bits a channel, a colour key of PNG as transparency.

    opened: as the file was opened, for its format and tags.  rawmode: of the file's pixels.
    Raises UnreadableImage where the range of levels is not known.
    """
    key = image.info.get("transparency")
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and opened.format in ("PNG", "PPM")):
        # convert() would clip at 255. Pillow itself takes the high byte where such an image has colours.
        levels = np.asarray(image).astype(np.uint32)
        tags: Any = getattr(opened, "tag_v2", {})
        shift = 4 if tags.get(_BITS_PER_SAMPLE) == (12,) else 8
        high = (levels >> shift).astype(np.uint8)
        grey = Image.fromarray(255 - high if tags.get(_PHOTOMETRIC) == 0 else high)
        made = _with_alpha(grey, levels == key, "LA") if isinstance(key, int) else grey
        made.info = {name: value for name, value in image.info.items() if name != "transparency"}
        return made, ()
    if image.mode in ("I", "F"):
        raise UnreadableImage(f"pixels of mode {image.mode}, whose range is not known")
    if isinstance(key, int) and rawmode in ("L;2", "L;4"):  # Pillow scales the levels and not the key
        image.info["transparency"] = key * (85 if rawmode == "L;2" else 17)
    elif isinstance(key, tuple) and rawmode == "RGB;16B":  # Pillow keeps the high bytes alone
        is_key = (np.asarray(image) == np.array([part >> 8 for part in key])).all(-1)
        made = _with_alpha(image, is_key, "RGBA")
        made.info = {name: value for name, value in image.info.items() if name != "transparency"}
        return made, (COARSE_KEY,)
    return image, ()


def to_srgb(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """An image of 8 bits a channel in sRGB, by its embedded profile; without one it is taken to be that.

    Grey stays grey, and transparency stays.
    """
    if "icc_profile" not in image.info:
        return image, (UNPROFILED_CMYK,) if image.mode == "CMYK" else ()
    try:
        colours, alpha = _without_alpha(image)
        transform, mode = _transform(image.info["icc_profile"], colours.mode)
        if transform is None:
            return image, ()
        made = _applied(transform, colours.convert(mode))
    except Exception:  # no LittleCMS, or a profile that is damaged or of another number of channels
        return image, (UNUSABLE_PROFILE,)
    made = made.convert("L") if colours.mode == "L" else made
    if alpha is not None:
        made.putalpha(alpha)
    return made, (CONVERTED,)


def is_adobe_by_exif(image: Image.Image) -> bool:
    """Whether a photograph without a profile says by its Exif data that it is in Adobe RGB."""
    if "exif" not in image.info or "icc_profile" in image.info:
        return False
    try:
        return str(image.getexif().get_ifd(_INTEROPERABILITY).get(1, "")).startswith(_ADOBE_RGB)
    except Exception:  # damaged Exif data of a whole image
        return False


def may_be_converted(content: bytes) -> bool:
    """Whether an encoded file may be one that this module reads otherwise than plain Pillow: a cheap test that finds
    all of these and a few more."""
    if content[:4] in (b"II*\0", b"MM\0*") or content[:2] in (b"P2", b"P5"):
        return True
    return any(mark in content for mark in (b"ICC_PROFILE\0", b"iCCP", b"ICCP", b"tRNS"))


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> tuple[Any, str]:
    """Pillow's transform to sRGB of an image of this mode, and the mode to give it; None where the profile is sRGB
    but for a few levels.

    Raises whatever Pillow does on a profile that cannot be used.
    """
    from PIL import ImageCms

    if not 0 < len(profile) <= MAX_PROFILE_BYTES:
        raise ValueError("no profile, or too large a one")
    source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    if mode == "L" and source.profile.xcolor_space.strip() == "RGB":
        mode = "RGB"
    transform = ImageCms.buildTransform(source, target, mode, "RGB")
    if mode not in ("L", "RGB"):
        return transform, mode
    grid: Any
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3)
    if mode == "L":
        grid = np.arange(256, dtype=np.uint8).reshape(16, 16)
    made = np.asarray(_applied(transform, Image.fromarray(grid))).astype(int)
    is_srgb = np.abs(made - (grid[..., None] if mode == "L" else grid)).max() <= SRGB_TOLERANCE
    return None if is_srgb else transform, mode


def _applied(transform: Any, image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    made = ImageCms.applyTransform(image, transform)
    assert made is not None  # it works in place only where it is told to
    return made


def _without_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """An image as L, RGB, CMYK or LAB, and its transparency where it has some."""
    is_grey = image.mode in ("1", "L", "LA", "La")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        whole = image.convert("RGBA")
        return whole.convert("L" if is_grey else "RGB"), whole.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return image, None
    return image.convert("L" if is_grey else "RGB"), None


def _with_alpha(image: Image.Image, is_transparent: Any, mode: str) -> Image.Image:
    made = image.convert(mode)
    made.putalpha(Image.fromarray(np.where(is_transparent, 0, 255).astype(np.uint8)))
    return made
