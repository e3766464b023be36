"""Every reader: files that are there = files that are used + files that are named with a reason."""

import io
import re
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.pictures import encode, write_folder, write_zip

from diffdistill.data import CaptionedImages, HuggingFace, ImageFolder, Npz, WebDataset
from diffdistill.eval.images.files import open_images
from diffdistill.eval.protocols.protocol import Preparation
from diffdistill.settings.schema import UserError

DOT = "of a name with dots, whose ending begins at the first dot"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))


def image(level: int, kind: str = "PNG") -> bytes:
    return encode(Image.new("RGB", (8, 8), (level, level, level)), kind)


USED = {f"{part}/{n}.png": image(40 * n + len(part)) for part in ("a", "bb") for n in range(3)}
SYSTEMS = {
    "__MACOSX/a/._0.png": b"x",
    "a/@eaDir/0.png/SYNOPHOTO_THUMB_M.png": image(7),
    "bb/.ipynb_checkpoints/1-checkpoint.png": image(8),
    "#recycle/old.png": image(9),
    "$RECYCLE.BIN/gone.png": image(10),
    ".DS_Store": b"x",
    "Thumbs.db": b"x",
    "a/readme.md": b"x",
    "other.csv": b"file,label\n",
}
CAPTIONS = {name.replace(".png", ".txt"): f"picture {name}".encode() for name in USED}


def write_tar(file: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, content in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return file


def folder(root: Path) -> Path:
    return write_folder(root / "f", USED | SYSTEMS)


def folder_with_links(root: Path) -> Path:
    place = folder(root)
    (place / "link.png").symlink_to(place / "a/0.png")
    (place / "linked").symlink_to(place / "a")
    (place / "@eaDir").mkdir()
    (place / "@eaDir/link.png").symlink_to(place / "a/0.png")
    return place


def packed(root: Path) -> Path:
    return write_zip(root / "f.zip", USED | SYSTEMS)


PLACES = {"folder": folder, "links": folder_with_links, "zip": packed}


def there(place: Path) -> int:
    """Files and links below a folder or in a zip."""
    if place.is_file():
        with zipfile.ZipFile(place) as archive:
            return len(archive.infolist())
    return sum(path.is_symlink() or not path.is_dir() for path in place.rglob("*"))


def counted(notes: tuple[str, ...]) -> tuple[int, int]:
    """What the one line of notes says: files that are not used, and all; its parts add up."""
    (line,) = [note for note in notes if "are not used" in note]
    found = re.search(r": ([\d,]+) of ([\d,]+) files are not used: (.*)", line)
    assert found is not None
    unused, total = (int(number.replace(",", "")) for number in found.groups()[:2])
    parts = re.findall(r"(?:^|; )([\d,]+) x [^(;]+ \(", found[3])
    assert sum(int(part.replace(",", "")) for part in parts) == unused
    return unused, total


@pytest.mark.parametrize("kind", PLACES)
def test_a_folder_or_a_zip_of_images(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = PLACES[kind](tmp_path)
    source = ImageFolder(path=str(place), labels="folders").load()
    assert len(source) == len(USED)
    unused, total = counted(source.notes)
    assert (unused + len(source), total) == (there(place), there(place))
    again = ImageFolder(path=str(place), labels="folders").load()  # from the cache
    assert again.notes == source.notes
    assert capsys.readouterr().err.count("are not used") == 2


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_table_of_labels_is_used_where_it_lies_among_the_images(where: str, tmp_path: Path) -> None:
    place = folder(tmp_path)
    table = (place if where == "inside" else tmp_path) / "labels.csv"
    table.write_text("file,label\n" + "".join(f"{name},{n}\n" for n, name in enumerate(USED)))
    source = ImageFolder(path=str(place), labels="csv", labels_file=str(table)).load()
    unused, total = counted(source.notes)
    assert (unused, total) == (len(SYSTEMS), there(place))


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("captions", ["beside", "table"])
def test_images_with_captions(kind: str, captions: str, tmp_path: Path) -> None:
    texts = CAPTIONS | {"a/of-no-image.txt": b"nothing"} if captions == "beside" else {}
    write = write_zip if kind == "zip" else write_folder
    place = write(PLACES[kind](tmp_path), USED | SYSTEMS | texts)
    table = tmp_path / "captions.csv"
    table.write_text("file,caption\n" + "".join(f"{name},picture\n" for name in [*USED, "gone.png"]))
    found = CaptionedImages(path=str(place), captions_file=str(table) if captions == "table" else None).captions()
    unused, total = counted(found.notes)
    used = len(found.items) + (len(CAPTIONS) if captions == "beside" else 0)
    assert (unused + used, total) == (there(place), there(place))
    assert any("1 of 7 rows name no image: gone.png" in note for note in found.notes) == (captions == "table")


def test_a_shard_of_samples(tmp_path: Path) -> None:
    files = {
        f"s{n}.{ending}": image(n) if ending == "png" else b"a text" for n in range(4) for ending in ("png", "txt")
    }
    files |= {f"v1.5_{n}.png": image(50 + n) for n in range(3)} | {f"v1.5_{n}.txt": b"lost" for n in range(3)}
    files |= {"b0.bmp": image(99, "BMP"), "b0.txt": b"of a bmp", "s3.json": b"{}", ".hidden.png": b"", "README": b"x"}
    files |= {"z.png": image(1), "z.jpg": image(2, "JPEG"), "z.txt": b"two images"}
    file = write_tar(tmp_path / "a.tar", files)
    with tarfile.open(file, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "s0.png"
        archive.addfile(link)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    found = WebDataset(path=str(file)).captions()
    unused, total = counted(found.notes)
    assert (len(found.items), unused, total) == (5, len(files) + 1 - 10, len(files) + 1)
    (line,) = found.notes
    assert f"6 x {DOT} (v1.5_0.png, v1.5_1.png, v1.5_2.png, ...)" in line
    assert "1 x an image of a format that is not looked for (b0.bmp)" in line
    assert "1 x a caption without an image (b0.txt)" in line


def test_a_shard_without_a_sample_says_what_it_holds(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", {"v1.5.png": image(0), "v1.5.txt": b"text"})
    with pytest.raises(UserError, match=rf"no sample has an image .* but 2 x {DOT} \(v1\.5\.png, v1\.5\.txt\)"):
        WebDataset(path=str(file)).captions()


def test_what_lies_beside_shards_and_a_damaged_shard(tmp_path: Path) -> None:
    root = tmp_path / "shards"
    root.mkdir()
    write_tar(root / "0.tar", {"a.png": image(0), "a.txt": b"whole", "a.json": b"{}"})
    whole = write_tar(root / "1.tar", {"b.json": b"{}", "b.png": image(1), "b.txt": b"cut", "c.png": image(2)})
    whole.write_bytes(whole.read_bytes()[:4000])
    (root / "2.tar.gz").write_bytes(b"x")
    (root / "0_stats.json").write_bytes(b"{}")
    (root / "more").mkdir()
    found = WebDataset(path=str(root)).captions()
    damaged, line = found.notes
    assert "1 of 2 shards are damaged and are left out: 1.tar" in damaged
    assert counted((line,)) == (4, 6)  # of the damaged shard nothing is counted but itself
    assert "3 x beside the shards, and no .tar (0_stats.json, 2.tar.gz, more/)" in line


def test_a_folder_that_hugging_face_reads(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    place = write_folder(tmp_path / "f", {f"train/{n}" if "/" in n else n: c for n, c in (USED | SYSTEMS).items()})
    write_folder(place, {"test/a/9.png": image(90)})
    source = HuggingFace(path=str(place)).load()
    strange, line = source.notes
    assert "takes for images of the set" in strange
    unused, total = counted((line,))
    assert (unused + len(source), total) == (there(place), there(place))
    assert "1 x of no row of train (test/a/9.png)" in line


def test_rows_of_a_table_of_images_are_used_or_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": image(n), "path": None} for n in range(200)]
    cells[7] = {"bytes": b"no image", "path": None}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).save_to_disk(str(tmp_path / "h"))
    source = HuggingFace(path=str(tmp_path / "h")).load()
    assert len(source) == 199
    assert any("1 of 200 images (0.50%) cannot be read and are left out: 7 (" in note for note in source.notes)


def test_arrays_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, images=np.zeros((2, 8, 8, 3), np.uint8), labels=np.arange(2), scores=np.ones(2), prompt=np.ones(1))
    assert Npz(path=str(file)).load().notes == (f"{file}: arrays that are not used: prompt, scores",)
    judged = open_images(file, Preparation())
    assert judged.notes == f"{file}: arrays that are not used: labels, prompt, scores"


@pytest.mark.parametrize("kind", PLACES)
def test_judged_images(kind: str, tmp_path: Path) -> None:
    place = PLACES[kind](tmp_path)
    judged = open_images(place, Preparation())
    unused, total = counted((judged.notes,))
    assert (unused + len(judged), total) == (there(place), there(place))


def test_where_everything_is_used_nothing_is_said(tmp_path: Path) -> None:
    place = write_folder(tmp_path / "f", USED | CAPTIONS)
    assert CaptionedImages(path=str(place)).captions().notes == ()
    tar = write_tar(tmp_path / "a.tar", {name.replace("/", "-"): c for name, c in sorted((USED | CAPTIONS).items())})
    assert WebDataset(path=str(tar)).captions().notes == ()
    assert open_images(write_folder(tmp_path / "g", USED), Preparation()).notes == ""


NFC, NFD = (unicodedata.normalize(form, "\u00e9t\u00e9 \u00fc.png") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("on_disk", "typed"), [(NFD, NFC), (NFC, NFD)])
@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_names_that_are_the_same_text_are_matched_with_a_note(
    on_disk: str, typed: str, write: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path
) -> None:
    place = write(tmp_path / "place", {f"all/in/{on_disk}": image(1), "all/in/b.png": image(2)})
    table = tmp_path / "labels.csv"
    table.write_text(f"file,label,caption\nin/{typed},4,one\nin/b.png,7,two\n", encoding="utf-8")
    source = ImageFolder(path=str(place), labels="csv", labels_file=str(table)).load()
    assert source.labels is not None
    assert source.labels.tolist() == [7, 4]
    assert any("1 names differ from their files' in Unicode normalisation alone" in note for note in source.notes)
    captions = CaptionedImages(path=str(place), captions_file=str(table)).captions()
    assert captions.prompts == ("two", "one")
    assert any("in Unicode normalisation alone" in note for note in captions.notes)


def test_a_text_beside_an_image_may_be_normalised_otherwise(tmp_path: Path) -> None:
    place = write_folder(tmp_path / "f", {NFD: image(1), NFC.replace("png", "txt"): b"a caption"})
    found = CaptionedImages(path=str(place)).captions()
    assert found.prompts == ("a caption",)
    assert len(found.notes) == 1


@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_a_table_among_the_images_is_found_by_its_text(
    write: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path
) -> None:
    made, typed = (name.replace("png", "csv") for name in (NFD, NFC))
    place = write(tmp_path / "f", {"b.png": image(2), made: b"file,label,caption\nb.png,3,three\n"})
    source = ImageFolder(path=str(place), labels="csv", labels_file=typed).load()
    captions = CaptionedImages(path=str(place), captions_file=typed).captions()
    assert source.labels is not None
    assert (source.labels.tolist(), source.notes, captions.prompts, captions.notes) == ([3], (), ("three",), ())


def test_exact_names_come_first_and_nothing_is_guessed_between_two(tmp_path: Path) -> None:
    place = write_folder(tmp_path / "f", {NFC: image(1), NFD: image(2)})
    table = tmp_path / "labels.csv"
    table.write_text(f"file,label\n{NFC},0\n{NFD},1\n", encoding="utf-8")
    source = ImageFolder(path=str(place), labels="csv", labels_file=str(table)).load()
    assert source.notes == ()
    labels = dict(zip(sorted((NFC, NFD)), source.labels.tolist(), strict=True))  # type: ignore[union-attr]
    assert labels == {NFC: 0, NFD: 1}
    table.write_text(f"file,label\n{NFC},0\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"1 of 2 images have no label: .*differs in Unicode normalisation alone"):
        ImageFolder(path=str(place), labels="csv", labels_file=str(table)).load()


@pytest.mark.parametrize("kind", ["labels", "captions"])
def test_a_missing_row_shows_what_the_table_has(kind: str, tmp_path: Path) -> None:
    place = write_folder(tmp_path / "f", {"0001.png": image(1), "0002.png": image(2)})
    table = tmp_path / "labels.csv"
    table.write_text("file,label,caption\n1.png,0,a\n2.png,1,b\n", encoding="utf-8")
    read = {
        "labels": ImageFolder(path=str(place), labels="csv", labels_file=str(table)).load,
        "captions": CaptionedImages(path=str(place), captions_file=str(table)).captions,
    }[kind]
    with pytest.raises(UserError, match=r"2 of 2 images have no .*: 0001\.png.*without an image are 1\.png, 2\.png"):
        read()
