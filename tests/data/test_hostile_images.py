"""Images as people have them, and as nobody should: each is read right, named, passed over or refused."""

import os
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.pictures import encode, write_folder, write_zip

from diffdistill.data import ImageFolder, Npz
from diffdistill.data.collection import MAX_FILE_BYTES, UnreadableImage
from diffdistill.data.colour import UNPROFILED_CMYK
from diffdistill.data.decode import ANIMATED, ENLARGED, TRANSPARENT, Sizing, decode
from diffdistill.settings.schema import UserError

RED = Image.new("RGB", (8, 8), (200, 10, 30))
RAMP = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024 + 200
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
TOLERANCE = 3  # JPEG's rounding


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))


def palette(*, transparent: bool = False) -> bytes:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 10, 30])
    return encode(image, transparency=1) if transparent else encode(image)


def rotated() -> bytes:
    """A red image, wide in the file, whose left half is black; the camera says: turn by 90 degrees."""
    pixels = np.asarray(RED).copy()
    pixels[:, :4] = 0
    tags = Image.Exif()
    tags[0x0112] = 6
    return encode(pixels, exif=tags)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def pixel_bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims side x side pixels."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("content", "colour", "notes"),
    [
        (encode(RED.convert("CMYK"), "JPEG", quality=100), (200, 10, 30), (UNPROFILED_CMYK,)),
        (encode(RED.convert("CMYK"), "TIFF"), (200, 10, 30), (UNPROFILED_CMYK,)),
        (encode(RED, "BMP"), (200, 10, 30), ()),
        (encode(RED, "WEBP", lossless=True), (200, 10, 30), ()),
        (encode(RED, "PPM"), (200, 10, 30), ()),
        (palette(), (200, 10, 30), ()),
        (palette(transparent=True), (255, 255, 255), (TRANSPARENT,)),
        (encode(RED.convert("RGBA")), (200, 10, 30), ()),
        (encode(Image.new("RGBA", (8, 8), (200, 0, 0, 0))), (255, 255, 255), (TRANSPARENT,)),
        (encode(Image.new("LA", (8, 8), (70, 255))), (70, 70, 70), ()),
        (encode(Image.new("L", (8, 8), 70)), (70, 70, 70), ()),
        (encode(Image.new("1", (8, 8), 1)), (255, 255, 255), ()),
        (encode(Image.fromarray(np.full((8, 8), 70 * 257, np.uint16))), (70, 70, 70), ()),
        (encode(Image.fromarray(np.full((8, 8), 70 * 257, np.uint16)), "TIFF"), (70, 70, 70), ()),
        (encode(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8))]), (200, 10, 30), (ANIMATED,)),
        (
            encode(RED, "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", (8, 8))]),
            (200, 10, 30),
            (ANIMATED,),
        ),
    ],
    ids=[
        *("cmyk jpeg", "cmyk tiff", "bmp", "webp", "ppm", "palette", "palette with a hole", "opaque", "transparent"),
        *("grey with alpha", "grey", "one bit", "16 bit png", "16 bit tiff", "animated gif", "animated webp"),
    ],
)
def test_an_unusual_image_is_read_with_its_colours(
    content: bytes, colour: tuple[int, int, int], notes: tuple[str, ...]
) -> None:
    made = decode(content, Sizing(channels=3))
    assert made.pixels.shape == (3, 8, 8)
    assert made.notes == notes
    apart = np.abs(made.pixels.astype(int) - np.array(colour)[:, None, None]).max()
    assert apart <= (TOLERANCE if content[:2] == b"\xff\xd8" else 0)


def test_sixteen_bits_keep_their_range_where_plain_conversion_clips() -> None:
    content = encode(Image.fromarray(RAMP))
    assert np.array_equal(decode(content, Sizing(channels=1)).pixels[0], RAMP >> 8)


def test_a_photograph_stands_as_its_camera_says() -> None:
    pixels = decode(rotated(), Sizing(channels=3)).pixels
    assert pixels[0, :4].max() == 0  # the left half is now the upper one
    assert pixels[0, 4:].min() == 200


def test_a_wide_image_is_cropped_in_the_middle_and_resized_by_lanczos() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8)
    made = decode(encode(pixels), Sizing(10, 3))
    expected = Image.fromarray(pixels[:, 5:25]).resize((10, 10), Image.Resampling.LANCZOS)
    assert np.array_equal(made.pixels, np.asarray(expected).transpose(2, 0, 1))
    assert made.notes == ()
    assert decode(encode(pixels), Sizing(64, 1)).notes == (ENLARGED,)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"just some text", "not an image"),
        (encode(NOISE)[:5000], "truncated"),
        (encode(NOISE, "JPEG")[:1500], "truncated"),
        (encode(NOISE, "WEBP")[:900], "."),
        (encode(Image.new("RGB", (1, 1))), "1 x 1 pixels: a placeholder"),
        (encode(Image.new("RGB", (300, 1))), "300 x 1 pixels"),
        (encode(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), "mode F"),
        (pixel_bomb(60_000), "."),
        (pixel_bomb(12_000), "12000 x 12000 pixels, over the limit"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not an image in a format that is read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    ],
    ids=[
        *("empty", "text", "torn png", "torn jpeg", "torn webp", "one pixel", "one line", "float"),
        *("huge bomb", "large bomb", "postscript", "svg"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_unreadable_image_says_why(content: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        decode(content, Sizing(8, 3))


def twenty(number: int = 20) -> dict[str, bytes]:
    return {f"{n:03d}.png": encode(np.full((8, 8, 3), n, np.uint8)) for n in range(number)}


def tree(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if "cache" not in path.parts}


@pytest.mark.parametrize(
    "name", ["../out.png", "a/../../out.png", "/tmp/out.png", "C:\\out.png", "..\\out.png", "\\out.png"]
)
def test_a_zip_that_reaches_outside_is_refused_by_name(tmp_path: Path, name: str) -> None:
    file = write_zip(tmp_path / "a.zip", twenty() | {name: encode(RED)})
    before = tree(tmp_path)
    with pytest.raises(UserError, match="point outside the archive") as caught:
        ImageFolder(path=str(file)).load()
    assert "out.png" in str(caught.value)
    assert tree(tmp_path) == before


def test_a_zip_with_a_file_without_a_name_is_refused(tmp_path: Path) -> None:
    file = write_zip(tmp_path / "a.zip", twenty() | {"?.png": encode(RED)})
    file.write_bytes(file.read_bytes().replace(b"?.png", b"\0.png"))  # a name ends at a zero
    with pytest.raises(UserError, match=r"a\.zip: refused: an entry has no name"):
        ImageFolder(path=str(file)).load()


def test_a_zip_with_one_name_twice_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("a.png", encode(RED))
            archive.writestr("./a.png", encode(RED))
    with pytest.raises(UserError, match=r"more than one file of the name a\.png"):
        ImageFolder(path=str(tmp_path / "a.zip")).load()


def test_the_same_name_in_two_folders_is_two_images(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "f", {"a/1.png": encode(RED), "b/1.png": encode(Image.new("RGB", (8, 8)))})
    assert len(ImageFolder(path=str(root)).load()) == 2


@pytest.mark.parametrize("kind", ["zip", "npz"])
def test_a_zip_bomb_is_refused_unread(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"a.{kind}"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png" if kind == "zip" else "images.npy", b"small")
    content = bytearray(file.read_bytes())
    place = content.rindex(b"PK\x01\x02") + 24  # the directory's word for the size when unpacked
    content[place : place + 4] = struct.pack("<I", 2**32 - 2)
    file.write_bytes(content)
    with pytest.raises(UserError, match="refused as a zip bomb"):
        (ImageFolder(path=str(file)) if kind == "zip" else Npz(path=str(file))).load()


def test_a_huge_member_is_named_and_not_unpacked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in twenty(101).items():
            archive.writestr(name, content)
        with archive.open("huge.bmp", "w") as handle:
            for _ in range(MAX_FILE_BYTES // 2**20 + 1):
                handle.write(bytes(2**20))
    assert len(ImageFolder(path=str(tmp_path / "a.zip")).load()) == 101
    assert "huge.bmp (257 MiB, over the limit of 256 MiB)" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["content", "encrypted", "compression"])
def test_a_damaged_member_is_named(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_zip(tmp_path / "a.zip", twenty(150))
    content = bytearray(file.read_bytes())
    entry = content.index(b"PK\x01\x02")  # the directory's first entry
    name = content[entry + 46 : entry + 53].decode()
    if damage == "content":
        content[int.from_bytes(content[entry + 42 : entry + 46], "little") + 60] ^= 255
    elif damage == "encrypted":
        content[entry + 8] |= 1
    else:
        content[entry + 10] = 99
    file.write_bytes(content)
    assert len(ImageFolder(path=str(file)).load()) == 149
    assert f"1 of 150 images (0.67%) cannot be read and are left out: {name} (" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_zip_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(UserError, match="neither a folder nor a readable zip"):
        ImageFolder(path=str(tmp_path / "a.zip")).load()


def test_links_hidden_files_and_other_files_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folder(tmp_path / "f", {f"b/{name}": content for name, content in twenty().items()})
    outside = write_folder(tmp_path / "outside", {"secret.png": encode(RED)})
    ours = {".hidden.png", ".git/a.png", "__MACOSX/b/._000.png", "Thumbs.db", "notes.txt"}
    write_folder(root, dict.fromkeys(ours, encode(RED)))
    (root / "link.png").symlink_to(outside / "secret.png")
    (root / "linked").symlink_to(outside)
    (root / "loop").symlink_to(root)
    (root / "dangling.png").symlink_to(root / "nowhere")
    os.mkfifo(root / "pipe.png")
    source = ImageFolder(path=str(root)).load()
    assert source.images[:, 0, 0, 0].tolist() == list(range(20))
    assert (
        "10 of 30 files are not used: 2 x hidden (.git/a.png, .hidden.png); 1 x in a folder" in capsys.readouterr().err
    )


def test_links_and_hidden_files_in_a_zip_are_passed_over(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    ignored = {"__MACOSX/._000.png": b"x", ".DS_Store": b"x", "a/.b/c.png": b"x", "readme.txt": b"x"}
    file = write_zip(tmp_path / "a.zip", twenty() | ignored)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    assert len(ImageFolder(path=str(file)).load()) == 20


def test_names_are_no_matter_for_what_a_file_is(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "f", {"png.JPG": encode(RED), "jpg.png": encode(RED, "JPEG")})
    assert len(ImageFolder(path=str(root)).load()) == 2


def test_odd_names_are_printed_without_what_a_terminal_would_obey(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_folder(tmp_path / "f", twenty(250))
    (root / "\x1b[2Jwipe[red].png").write_bytes(b"no image")
    os.close(os.open(os.fsencode(root) + b"/\xff\xfe.png", os.O_CREAT | os.O_WRONLY))
    assert len(ImageFolder(path=str(root)).load()) == 250
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "wipe[red].png" in said
    assert "\\udcff\\udcfe.png" in said


@pytest.mark.parametrize("kind", ["folder", "zip", "only_links", "missing"])
def test_no_images_is_one_clear_error(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "place"
    if kind == "zip":
        write_zip(place, {"readme.txt": b"x"})
    elif kind != "missing":
        place.mkdir()
        if kind == "only_links":
            (place / "a.png").symlink_to(tmp_path)
    message = {"missing": "no such folder or file", "only_links": "1 x symbolic link"}.get(kind, "holds no images")
    with pytest.raises(UserError, match=message):
        ImageFolder(path=str(place)).load()


def test_images_of_two_sizes_need_a_resolution(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "f", twenty() | {"wide.png": encode(Image.new("RGB", (9, 8)))})
    with pytest.raises(UserError, match=r"000\.png is 8 x 8, wide\.png is 9 x 8\); set data\.resolution"):
        ImageFolder(path=str(root)).load()
    assert ImageFolder(path=str(root), resolution=4).load().image_shape == (3, 4, 4)
