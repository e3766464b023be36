"""Images to be judged, from files: exactly those of the folder, or one clear message and nothing else.

How a single odd file is decoded (CMYK, 16 bit, palettes, animations) is tests/data/test_hostile_images.py's affair: the
same decoder reads here.
"""

import io
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import encode, pictures, write_folder, write_zip

from diffdistill.data import Digits
from diffdistill.data.source import MappedImages
from diffdistill.eval.images.files import DataImages, in_number_order, is_lossy, open_images
from diffdistill.eval.images.preparation import prepare
from diffdistill.eval.protocols.protocol import Preparation
from diffdistill.settings.schema import UserError

PLAIN = Preparation()
RED = Image.new("RGB", (8, 8), (200, 10, 30))
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)

Hostile = Callable[[Path], Path]
HOSTILE: dict[str, tuple[Hostile, str]] = {}
"""By name: what makes the input below a folder, and the message."""


def hostile(name: str, message: str) -> Callable[[Hostile], Hostile]:
    def keep(make: Hostile) -> Hostile:
        HOSTILE[name] = (make, message)
        return make

    return keep


def grey(number: int = 20) -> dict[str, bytes]:
    return {f"{n:03d}.png": encode(np.full((8, 8, 3), n % 256, np.uint8)) for n in range(number)}


def one_more(name: str, content: bytes, message: str) -> None:
    """A folder of good images and one hostile file."""
    title = message.split(":", maxsplit=1)[0] if not content else name
    HOSTILE[f"{title} in a folder"] = (lambda root: write_folder(root / "f", grey() | {name: content}), message)
    HOSTILE[f"{title} in a zip"] = (lambda root: write_zip(root / "f.zip", grey() | {name: content}), message)


def png(side: int) -> bytes:
    """A PNG of a few bytes that claims side x side pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


one_more("empty.png", b"", r"empty\.png cannot be read: empty")
one_more("text.png", b"just some text", r"text\.png cannot be read: not an image")
one_more("torn.png", encode(NOISE)[:5000], r"torn\.png cannot be read: .*truncated")
one_more("one-pixel.png", encode(Image.new("RGB", (1, 1))), r"one-pixel\.png cannot be read: 1 x 1 pixels")
one_more("bomb.png", png(60_000), r"bomb\.png cannot be read")
one_more("large.png", png(12_000), r"large\.png cannot be read: 12000 x 12000 pixels, over the limit")
one_more("float.tif", encode(Image.new("F", (8, 8)), "TIFF"), r"more than one format \(20 x \.png, 1 x \.tif\)")
one_more("photo.jpg", encode(RED, "JPEG"), r"more than one format \(20 x \.png, 1 x \.jpg\), such as photo\.jpg")
one_more("disguised.png", encode(RED, "JPEG"), r"disguised\.png is no lossless file.*encoding is lossless")
one_more("lossy.png", encode(RED, "WEBP", quality=80), r"lossy\.png is no lossless file")
one_more("wide.png", encode(Image.new("RGB", (9, 8))), r"000\.png is 8 x 8, wide\.png is 9 x 8\)")
one_more("\x1b[2J.png", b"x", r"'\\x1b\[2J\.png' cannot be read")
one_more("postscript.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", r"postscript\.png cannot be read")


for escape in ("../out.png", "/tmp/out.png", "C:\\out.png", "a/../../out.png"):
    HOSTILE[f"zip with {escape}"] = (
        lambda root, name=escape: write_zip(root / "f.zip", grey() | {name: encode(RED)}),  # type: ignore[misc]
        "point outside the archive",
    )


@hostile("nothing there", r"/f: no such folder or file")
def nothing(root: Path) -> Path:
    return root / "f"


@hostile("empty folder", "holds no images")
def empty_folder(root: Path) -> Path:
    (root / "f").mkdir()
    return root / "f"


@hostile("folder of links", r"holds no images but 20 x symbolic link \(000.png, 001.png, 002.png, ...\)")
def links(root: Path) -> Path:
    outside, inside = write_folder(root / "outside", grey()), root / "f"
    inside.mkdir()
    for file in outside.iterdir():
        (inside / file.name).symlink_to(file)
    return inside


@hostile("no zip", "neither a folder nor a readable zip")
def no_zip(root: Path) -> Path:
    (root / "f.zip").write_bytes(b"PK\x03\x04 cut off")
    return root / "f.zip"


@hostile("zip of text", "holds no images")
def zip_of_text(root: Path) -> Path:
    return write_zip(root / "f.zip", {"readme.txt": b"x"})


@hostile("zip with one name twice", r"more than one file of the name 000\.png")
def twice(root: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(root / "f.zip", "w") as archive:
            archive.writestr("000.png", encode(RED))
            archive.writestr("./000.png", encode(RED))
    return root / "f.zip"


@hostile("encrypted member", "cannot be read: encrypted")
def encrypted(root: Path) -> Path:
    file = write_zip(root / "f.zip", grey())
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    file.write_bytes(content)
    return file


@hostile("damaged member", "cannot be read: damaged in the zip")
def damaged(root: Path) -> Path:
    file = write_zip(root / "f.zip", grey(1))
    content = bytearray(file.read_bytes())
    content[60] ^= 255
    file.write_bytes(content)
    return file


def npz(name: str, message: str, arrays: dict[str, Any], *, compressed: bool = False) -> None:
    def make(root: Path) -> Path:
        (np.savez_compressed if compressed else np.savez)(root / "f.npz", **arrays)
        return root / "f.npz"

    HOSTILE[name] = (make, message)


GOOD = np.zeros((4, 8, 8, 3), np.uint8)
npz("npz with wrong keys", r"has the arrays pictures, mu; it needs `images` or `arr_0`", {"pictures": GOOD, "mu": GOOD})
npz("npz of floats", r"float64 \[4, 8, 8, 3\]; it must be uint8", {"images": GOOD.astype(float)})
npz("npz of five channels", "one or three channels", {"images": np.zeros((4, 8, 8, 5), np.uint8)})
npz("npz without images", "it must be uint8", {"images": np.zeros((0, 8, 8, 3), np.uint8)})
npz("npz of three axes", "it must be uint8", {"images": np.zeros((4, 8, 8), np.uint8)})
npz("npz of objects", "Python objects", {"images": np.array([{}], dtype=object)})
npz("compressed npz of objects", "cannot be read as .npz", {"images": np.array([{}], dtype=object)}, compressed=True)


@hostile("npz whose header asks for more than there is", "cannot be read as .npz")
def liar(root: Path) -> Path:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 64, 64, 3)})
    return write_zip(root / "f.npz", {"images.npy": buffer.getvalue()})


@hostile("torn npz", "cannot be read as .npz")
def torn_npz(root: Path) -> Path:
    np.savez(root / "f.npz", images=GOOD)
    (root / "f.npz").write_bytes((root / "f.npz").read_bytes()[:300])
    return root / "f.npz"


def all_of(place: Path) -> torch.Tensor:
    images = open_images(place, PLAIN)
    return images.rows(torch.arange(len(images)))


def tree(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}


def test_there_are_more_than_thirty_kinds_of_hostile_input() -> None:
    assert len(HOSTILE) > 45


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_hostile_input_is_one_clear_message_and_leaves_no_file(name: str, tmp_path: Path) -> None:
    make, message = HOSTILE[name]
    place = make(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        all_of(place)
    assert len(str(caught.value).splitlines()) == 1
    assert "\x1b" not in str(caught.value)
    assert tree(tmp_path) == before


@pytest.fixture
def real() -> torch.Tensor:
    """[12, 3, 32, 32] uint8."""
    return torch.from_numpy(pictures(12)[0]).permute(0, 3, 1, 2).contiguous()


def written(kind: str, root: Path) -> Path:
    photographs = pictures(12)[0]
    files = {f"{n:02d}.png": encode(pixels) for n, pixels in enumerate(photographs)}
    if kind == "folder":
        return write_folder(root / "f", files)
    if kind == "zip":
        return write_zip(root / "f.zip", files, compression=zipfile.ZIP_DEFLATED)
    chosen = photographs.transpose(0, 3, 1, 2) if kind == "npz NCHW" else photographs
    save = np.savez_compressed if kind == "compressed npz" else np.savez
    save(root / "f.npz", **{"arr_0" if kind == "ADM's npz" else "images": chosen})
    return root / "f.npz"


KINDS = ("folder", "zip", "npz", "npz NCHW", "compressed npz", "ADM's npz")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 5, 12])
def test_images_come_in_the_order_of_their_names_whatever_the_batches(
    kind: str, batch: int, real: torch.Tensor, tmp_path: Path
) -> None:
    images = open_images(written(kind, tmp_path), PLAIN)
    assert len(images) == 12
    assert torch.equal(torch.cat([images.rows(index) for index in torch.arange(12).split(batch)]), real)
    assert torch.equal(images.rows(torch.tensor([7, 2, 7])), real[[7, 2, 7]])
    assert images.notes == ""


def test_what_training_leaves_out_with_a_warning_is_an_error_here(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "f", grey(400) | {"zzz.png": b"damaged"})
    images = open_images(root, PLAIN)
    images.rows(torch.arange(200))
    with pytest.raises(UserError, match=r"zzz\.png cannot be read"):
        images.rows(torch.arange(200, 401))


def test_a_number_beyond_the_last_image_says_how_many_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds 12 images; number 12 was asked for"):
        open_images(written("npz", tmp_path), PLAIN).rows(torch.tensor([12]))


def test_images_are_cropped_and_resized_one_by_one_as_the_protocol_says(tmp_path: Path) -> None:
    sizes = [(30, 20), (20, 20), (64, 48)]
    pixels = [np.random.default_rng(n).integers(0, 256, (h, w, 3), np.uint8) for n, (w, h) in enumerate(sizes)]
    root = write_folder(tmp_path / "f", {f"{n}.png": encode(p) for n, p in enumerate(pixels)})
    how = Preparation(crop="centre_square", side=16, filter="lanczos")
    found = open_images(root, how).rows(torch.arange(3))
    expected = [prepare(torch.from_numpy(p).permute(2, 0, 1)[None], how)[0] for p in pixels]
    assert torch.equal(found, torch.stack(expected))


def test_changes_that_a_user_may_not_expect_are_noted_once_with_their_number(tmp_path: Path) -> None:
    hole = encode(Image.new("RGBA", (8, 8), (200, 0, 0, 0)))
    images = open_images(write_folder(tmp_path / "f", grey(3) | {"a.png": hole, "b.png": hole}), PLAIN)
    images.rows(torch.arange(5))
    assert images.notes.endswith("f: 2 are transparent: laid on white")


def test_jpegs_are_judged_where_the_protocol_names_them_and_real_ones_always(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "f", {"a.jpg": encode(RED, "JPEG"), "b.JPEG": encode(RED, "JPEG")})
    assert open_images(root, Preparation(encoding="jpeg")).rows(torch.arange(2)).shape == (2, 3, 8, 8)
    assert open_images(root, PLAIN, is_judged=False).rows(torch.arange(2)).shape == (2, 3, 8, 8)
    with pytest.raises(UserError, match=r"a\.jpg is no lossless file"):
        open_images(root, PLAIN).rows(torch.arange(1))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encode(RED), False),
        (encode(RED, "JPEG", quality=100), True),
        (encode(RED, "WEBP", lossless=True), False),
        (encode(RED, "WEBP", quality=90), True),
        (encode(RED, "BMP"), False),
        (b"", False),
    ],
)
def test_lossy_files_are_told_by_their_first_bytes(content: bytes, expected: bool) -> None:
    assert is_lossy(content) is expected


def test_grey_and_colour_are_read_as_the_protocol_has_them(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "f", {"a.png": encode(Image.new("L", (8, 8), 70)), "b.png": encode(RED)})
    assert open_images(root, PLAIN).rows(torch.arange(2))[0, :, 0, 0].tolist() == [70, 70, 70]
    assert open_images(root, PLAIN, channels=1).rows(torch.arange(2)).shape == (2, 1, 8, 8)


def test_the_hash_is_of_contents_in_order_and_not_of_names(tmp_path: Path) -> None:
    def hashed(folder: str, names: str) -> str:
        contents = [encode(np.full((8, 8, 3), n, np.uint8)) for n in (1, 2)]
        files = {f"{name}.png": content for name, content in zip(names, contents, strict=True)}
        return open_images(write_folder(tmp_path / folder, files), PLAIN).sha256

    assert hashed("a", "xy") == hashed("b", "vw") != hashed("c", "yx")


def test_an_uncompressed_npz_is_mapped_and_not_read(tmp_path: Path) -> None:
    images = open_images(written("npz", tmp_path), PLAIN)
    content = images.items[0].read()
    assert isinstance(content, np.memmap)


def test_only_the_asked_and_the_following_images_are_held(tmp_path: Path) -> None:
    images = open_images(write_folder(tmp_path / "f", grey(100)), PLAIN)
    for index in torch.arange(100).split(10):
        images.rows(index)
        assert len(images._ahead) <= 10


def test_a_training_data_set_gives_its_own_grey_levels(real: torch.Tensor) -> None:
    mapped = MappedImages(real.numpy(), None, key="x", num_classes=0)
    assert torch.equal(DataImages("mine", mapped, PLAIN).rows(torch.tensor([3, 1])), real[[3, 1]])
    digits = Digits().load()
    floats = DataImages("digits", digits, Preparation(quantiser="none"))
    assert torch.equal(floats.rows(torch.arange(5)), digits.rows(torch.arange(5)))


@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_captions_meet_images_in_the_order_of_the_numbers_in_their_names(
    write: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path
) -> None:
    levels = {"s2/9.png": 3, "s10/0.png": 4, "s2/10.png": 30, "s2/09.png": 29, "x\u00b2.png": 60}
    files = {name: encode(Image.new("L", (8, 8), level), "PNG") for name, level in levels.items()}
    plain = open_images(write(tmp_path / "p", files), Preparation(), channels=1)
    ordered = in_number_order(plain)
    assert [item.name for item in ordered.items] == ["s2/09.png", "s2/9.png", "s2/10.png", "s10/0.png", "x\u00b2.png"]
    assert ordered.rows(torch.arange(5))[:, 0, 0, 0].tolist() == [29, 3, 30, 4, 60]
    assert "by the numbers in their names: s2/09.png, s2/9.png, s2/10.png" in ordered.notes
    assert [item.name for item in plain.items] == sorted(levels)  # where position means nothing
    assert in_number_order(ordered) is ordered
