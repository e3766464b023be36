"""What a file's numbers mean, and not its container alone, decides on the pixels."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from support.pictures import encode

from diffdistill.data import ImageFolder
from diffdistill.data.colour import (
    ADOBE_BY_EXIF,
    COARSE_KEY,
    CONVERTED,
    UNPROFILED_CMYK,
    UNUSABLE_PROFILE,
    may_be_converted,
)
from diffdistill.data.decode import TRANSPARENT, Sizing, decode

# Columns: red, green and blue in XYZ, adapted to D50: Adobe RGB (1998), annex; Display P3; sRGB, IEC 61966-2-1.
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
WHITE = (0.9642, 1.0, 0.8249)
COLOUR = (40, 150, 210)


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(space: bytes, gamma: float, primaries: Any = None) -> bytes:
    """An ICC v2 display profile of one gamma, grey or of three primaries.  ICC.1:2001-04, sections 6.1 and 6.5."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"ours\0" + bytes(79),
        b"wtpt": b"XYZ " + bytes(4) + fixed(*WHITE),
    }
    if primaries is None:
        tags[b"kTRC"] = curve
    else:
        for name, column in zip("rgb", primaries.T, strict=True):
            tags[f"{name}XYZ".encode()] = b"XYZ " + bytes(4) + fixed(*column)
            tags[f"{name}TRC".encode()] = curve
    start, table, data = 132 + 12 * len(tags), b"", b""
    for key, value in tags.items():
        table += key + struct.pack(">II", start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    rest = struct.pack(">I", len(tags)) + table + data
    head = struct.pack(">I4xI", 128 + len(rest), 0x02400000) + b"mntr" + space + b"XYZ " + bytes(12) + b"acsp"
    return (head.ljust(68, b"\0") + fixed(*WHITE)).ljust(128, b"\0") + rest


def in_srgb(colour: tuple[int, ...], gamma: float, primaries: Any) -> Any:
    """The colour by the profile's own equations: gamma, to XYZ, to linear sRGB, to its curve."""
    linear = np.linalg.solve(SRGB, primaries @ (np.array(colour) / 255) ** gamma).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def png(depth: int, kind: int, row: bytes, *, key: bytes) -> bytes:
    """A PNG 4 pixels wide and high with a colour key (tRNS)."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", 4, 4, depth, kind, 0, 0, 0)
    parts = {b"IHDR": head, b"tRNS": key, b"IDAT": zlib.compress(4 * (b"\0" + row)), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, content) for name, content in parts.items())


@pytest.mark.parametrize("primaries", [ADOBE, DISPLAY_P3], ids=["adobe", "p3"])
@pytest.mark.parametrize("how", ["png", "jpeg", "webp", "tiff", "palette", "transparent"])
def test_a_photograph_of_another_colour_space_is_converted(primaries: Any, how: str) -> None:
    icc, image = profile(b"RGB ", 2.2, primaries), Image.new("RGB", (8, 8), COLOUR)
    options: dict[str, Any] = {"icc_profile": icc}
    if how == "jpeg":
        content = encode(image, "JPEG", quality=100, subsampling=0, **options)
    elif how == "webp":
        content = encode(image, "WEBP", lossless=True, **options)
    elif how == "tiff":
        content = encode(image, "TIFF", **options)
    elif how == "palette":
        content = encode(image.quantize(4), **options)
    else:
        image.putalpha(255)
        content = encode(image, **options)
    made = decode(content, Sizing(channels=3))
    assert made.notes == (CONVERTED,)
    assert np.abs(made.pixels[:, 4, 4] - in_srgb(COLOUR, 2.2, primaries)).max() < 3  # LittleCMS's and JPEG's rounding
    assert np.abs(made.pixels[:, 4, 4].astype(int) - COLOUR).max() > 20


def test_transparency_stays_where_colours_are_converted() -> None:
    image = Image.new("RGBA", (8, 8), (*COLOUR, 255))
    image.paste((*COLOUR, 0), (0, 0, 4, 8))
    made = decode(encode(image, icc_profile=profile(b"RGB ", 2.2, ADOBE)), Sizing(channels=3))
    assert set(made.notes) == {CONVERTED, TRANSPARENT}
    assert (made.pixels[:, :, :4] == 255).all()
    assert np.abs(made.pixels[:, 4, 6] - in_srgb(COLOUR, 2.2, ADOBE)).max() < 3


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_a_grey_profile_converts_grey_images(mode: str) -> None:
    level = 120
    pixels = np.full((8, 8), level, np.uint8)
    image = Image.fromarray(pixels.astype(np.uint16) * 257 if mode == "I;16" else pixels)
    content = encode(image.convert(mode) if mode == "LA" else image, icc_profile=profile(b"GRAY", 1.8))
    made = decode(content, Sizing(channels=1))
    assert made.notes == (CONVERTED,)
    assert abs(int(made.pixels[0, 0, 0]) - in_srgb((level,) * 3, 1.8, SRGB)[0]) < 3


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_a_profile_that_is_srgb_changes_no_pixel(mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    image = Image.fromarray(noise).convert(mode)
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tagged, plain = (decode(encode(image, **more), Sizing(channels=3)) for more in ({"icc_profile": icc}, {}))
    assert tagged.notes == plain.notes == ()
    assert (tagged.pixels == plain.pixels).all()


@pytest.mark.parametrize("icc", [b"no profile", profile(b"GRAY", 2.2)[:150], profile(b"GRAY", 2.2)])
def test_a_profile_that_cannot_be_used_is_said(icc: bytes) -> None:
    content = encode(Image.new("RGB", (8, 8), COLOUR), "TIFF", icc_profile=icc)
    made = decode(content, Sizing(channels=3))
    assert (made.notes, made.pixels[:, 0, 0].tolist()) == ((UNUSABLE_PROFILE,), list(COLOUR))


def test_cmyk_without_a_profile_is_said() -> None:
    content = encode(Image.new("RGB", (8, 8), COLOUR).convert("CMYK"), "JPEG", quality=100)
    assert decode(content, Sizing(channels=3)).notes == (UNPROFILED_CMYK,)


def test_adobe_rgb_that_only_the_camera_s_data_names_is_said() -> None:
    tags = Image.Exif()
    tags.get_ifd(0x8769)[0xA005] = {1: "R03"}
    content = encode(Image.new("RGB", (8, 8), COLOUR), "JPEG", exif=tags)
    assert decode(content, Sizing(channels=3)).notes == (ADOBE_BY_EXIF,)


@pytest.mark.parametrize("largest", [65535, 1023])
def test_a_grey_map_of_sixteen_bits_is_read_as_the_same_png(largest: int) -> None:
    levels = (np.arange(256).reshape(16, 16) * 4).astype(np.uint16)
    scaled = np.round(levels * (65535 / largest)).astype(np.uint16)
    content = b"P5\n16 16\n%d\n" % largest + levels.astype(">u2").tobytes()
    want = decode(encode(Image.fromarray(scaled)), Sizing(channels=1))
    made = decode(content, Sizing(channels=1))
    assert np.abs(made.pixels.astype(int) - want.pixels).max() <= (largest != 65535)  # Pillow's own rounding
    assert made.notes == want.notes == ()


@pytest.mark.parametrize(
    ("depth", "row", "key", "grey"),
    [
        (16, struct.pack(">4H", 40000, 40001, 0, 65535), 40000, [255, 156, 0, 255]),
        (8, bytes([7, 8, 0, 255]), 7, [255, 8, 0, 255]),
        (4, b"\x70\xf1", 7, [255, 0, 255, 17]),
        (2, b"\x63", 1, [255, 170, 0, 255]),
        (1, b"\x50", 0, [255, 255, 255, 255]),
    ],
)
def test_the_colour_key_of_a_grey_png_is_transparent(depth: int, row: bytes, key: int, grey: list[int]) -> None:
    made = decode(png(depth, 0, row, key=struct.pack(">H", key)), Sizing(channels=1))
    assert made.pixels[0, 0].tolist() == grey
    assert made.notes == (TRANSPARENT,)


def test_the_colour_key_of_a_png_of_sixteen_bits_a_channel_is_transparent() -> None:
    row = struct.pack(">12H", 300, 301, 302, 40000, 0, 0, 0, 40000, 0, 65535, 65535, 65535)
    made = decode(png(16, 2, row, key=struct.pack(">3H", 300, 301, 302)), Sizing(channels=3))
    assert made.pixels[:, 0].T.tolist() == [[255, 255, 255], [156, 0, 0], [0, 156, 0], [255, 255, 255]]
    assert made.notes == (COARSE_KEY, TRANSPARENT)


def test_a_tiff_that_counts_from_white_is_not_read_as_a_negative() -> None:
    content = encode(Image.fromarray(np.full((4, 4), 0x2000, np.uint16)), "TIFF")
    white_is_zero = struct.pack("<HHIHH", 262, 3, 1, 0, 0)
    turned = content.replace(struct.pack("<HHIHH", 262, 3, 1, 1, 0), white_is_zero)
    assert turned != content
    assert decode(content, Sizing(channels=1)).pixels[0, 0, 0] == 0x20
    assert decode(turned, Sizing(channels=1)).pixels[0, 0, 0] == 255 - 0x20


def test_only_what_may_be_read_otherwise_than_before_is_prepared_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    image = Image.new("RGB", (8, 8), COLOUR)
    contents = {"plain": encode(image), "adobe": encode(image, icc_profile=profile(b"RGB ", 2.2, ADOBE))}
    keys = {}
    for version in (1, 2):
        monkeypatch.setattr("diffdistill.data.prepare.COLOUR_VERSION", version)
        monkeypatch.setattr("diffdistill.data.prepare.SOURCES_VERSION", version)
        for name, content in contents.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "0.png").write_bytes(content)
            ImageFolder(path=str(tmp_path / name)).load()
            keys[name, version] = {file.name for file in (tmp_path / "cache").iterdir() if file.is_dir()}
    assert keys["plain", 2] == keys["adobe", 1]
    assert len(keys["adobe", 2]) == len(keys["adobe", 1]) + 1


def test_a_cheap_look_finds_all_that_may_be_converted() -> None:
    image, icc = Image.new("RGB", (8, 8), COLOUR), profile(b"RGB ", 2.2, ADOBE)
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        assert may_be_converted(encode(image, kind, icc_profile=icc))
        assert may_be_converted(encode(image, kind)) == (kind == "TIFF")
    assert may_be_converted(b"P5\n1 1\n65535\n\0\0")
    assert may_be_converted(png(16, 0, bytes(8), key=b"\0\0"))
