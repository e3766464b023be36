"""Captions: the same prompts and images in any wrapping, and one clear message for what cannot be read."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill.data import CaptionedImages, HuggingFace, Prompts, WebDataset
from diffdistill.data.captions import Captions
from diffdistill.data.left_out import LeftOut
from diffdistill.data.web_dataset import find_shards
from diffdistill.settings.schema import UserError

PROMPTS = ("a red fox", "zwölf blaue Vögel", "a red fox", "three dogs, and a cat", 'a sign that says "stop"')


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


IMAGES = {f"{number:03d}.png": picture(number) for number in range(len(PROMPTS))}


def table(kind: str, columns: tuple[str, str] = ("file", "caption")) -> str:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(IMAGES, PROMPTS, strict=True)]
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, delimiter="\t" if kind == "tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_images(folder: Path, **others: str | bytes) -> Path:
    folder.mkdir(parents=True)
    for name, content in (IMAGES | others).items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def write_tar(file: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(file, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return file


def samples(first: int, last: int, *, ending: str = "txt") -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for number in range(first, last):
        caption = PROMPTS[number] if ending == "txt" else json.dumps({"caption": PROMPTS[number], "width": 8})
        found |= {f"s/{number:03d}.png": IMAGES[f"{number:03d}.png"], f"s/{number:03d}.{ending}": caption.encode()}
    return found


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl"])
def test_a_file_of_prompts_gives_them_in_order(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"prompts.{kind}"
    text = "\n".join(PROMPTS) + "\n\n" if kind == "txt" else table(kind)
    file.write_text("\ufeff" + text, encoding="utf-8")
    found = Prompts(path=str(file)).captions()
    assert found.prompts == PROMPTS
    assert found.different == (PROMPTS[0], PROMPTS[1], PROMPTS[3], PROMPTS[4])


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
def test_a_caption_file_in_latin_1_is_refused_with_its_line(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"prompts.{kind}"
    text = "\n".join(PROMPTS) + "\n" if kind == "txt" else table(kind)
    file.write_bytes(text.encode("latin-1"))
    line = {"txt": 2, "csv": 3, "jsonl": 2}[kind]
    with pytest.raises(UserError, match=rf"prompts.{kind}, line {line}: byte 0xf6 is not UTF-8; .* iconv -f latin1"):
        Prompts(path=str(file)).captions()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "title\nx\n", "has the columns title; set data.column"),
        ("a.csv", "caption,text\nx,y\n", "has the columns caption, text; set data.column"),
        ("a.csv", "caption,b\nx\n", "line 2: the number of cells differs from the header"),
        ("a.jsonl", "{}\n{", "line 2: not valid JSON"),
        ("a.jsonl", "[1]\n", "line 1: must be a JSON object, not list"),
        ("a.jsonl", '{"caption": 3}\n', "line 1: the caption must be text, not int"),
        ("a.txt", "x" * 10_001, "line 1: a caption of 10,001 characters"),
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.doc", "x", "give a file that ends in"),
    ],
)
def test_a_damaged_file_of_prompts_is_named_with_the_line(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        Prompts(path=str(tmp_path / name)).captions()


def wrapped(kind: str, root: Path) -> Any:
    if kind == "beside":
        texts = {f"{number:03d}.txt": prompt for number, prompt in enumerate(PROMPTS)}
        return CaptionedImages(path=str(write_images(root / "i", **texts)))
    if kind in ("csv", "jsonl"):
        folder = write_images(root / "i", **{f"c.{kind}": table(kind, ("file_name", "text"))})
        return CaptionedImages(path=str(folder), captions_file=f"c.{kind}")
    if kind == "shards":
        write_tar(root / "00.tar", samples(0, 2))
        write_tar(root / "01.tar", samples(2, 5))
        return WebDataset(path=f"{root}/{{00..01}}.tar")
    if kind == "json shards":
        return WebDataset(path=str(write_tar(root / "a.tar", samples(0, 5, ending="json"))), captions_ending="json")
    import datasets

    pictures = [Image.open(io.BytesIO(content)) for content in IMAGES.values()]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": pictures, "text": list(PROMPTS)}, features=features)
    rows.save_to_disk(str(root / "hf"))
    return HuggingFace(path=str(root / "hf"), caption_column="text")


@pytest.mark.parametrize("kind", ["beside", "csv", "jsonl", "shards", "json shards", "hugging face"])
def test_images_with_captions_are_the_same_in_any_wrapping(kind: str, tmp_path: Path) -> None:
    data = wrapped(kind, tmp_path)
    captions = data.captions()
    images = captions.images(data.sizing, None)
    assert captions.prompts == PROMPTS
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 0, 2, 3]
    assert images.num_classes == 4
    expected = np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in IMAGES.values()])
    found = images.rows(torch.arange(5)) * 127.5 + 127.5
    assert torch.equal(found.round().byte(), torch.from_numpy(expected).permute(0, 3, 1, 2))


def test_an_image_that_cannot_be_read_leaves_the_others_with_their_captions(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for number in range(150):
        members |= {f"{number:03d}.png": picture(number), f"{number:03d}.txt": f"number {number}".encode()}
    members["007.png"] = b"torn"
    data = WebDataset(path=str(write_tar(tmp_path / "a.tar", members)))
    captions = data.captions()
    labels = captions.images(data.sizing, None).labels
    assert labels is not None
    assert [captions.different[label] for label in labels[6:8].tolist()] == ["number 6", "number 8"]


def test_many_images_without_a_caption_are_refused_and_few_left_out(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for number in range(150):
        members |= {f"{number:03d}.png": b"", f"{number:03d}.txt": b"x"}
    del members["003.txt"]
    found = WebDataset(path=str(write_tar(tmp_path / "a.tar", members))).captions()
    assert (len(found.prompts), found.notes[0].count("1 images without a caption are left out")) == (149, 1)
    for number in range(10, 20):
        del members[f"{number:03d}.txt"]
    with pytest.raises(UserError, match=r"11 of 150 images have no caption: b.tar:003.png, b.tar:010.png"):
        WebDataset(path=str(write_tar(tmp_path / "b.tar", members))).captions()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"captions_file": "none.csv"}, "no such file"),
        ({"captions_file": "c.txt"}, "must end in .csv"),
        ({"captions_file": "c.csv", "caption_column": "title"}, "caption_column = 'title'"),
        ({"captions_file": "twice.csv"}, "line 3: '000.png' is listed twice"),
        ({}, "5 of 5 images have no caption"),
    ],
)
def test_a_table_of_captions_that_does_not_fit_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    others = {"c.csv": table("csv"), "c.txt": "x", "twice.csv": "file,caption\n000.png,a\n000.png,b\n"}
    with pytest.raises(UserError, match=said):
        CaptionedImages(path=str(write_images(tmp_path / "i", **others)), **change).captions()


def test_shards_that_are_missing_compressed_or_cut_off_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "00.tar", samples(0, 2))
    with pytest.raises(UserError, match=r"no such file: .*01.tar"):
        find_shards(f"{tmp_path}/{{00..01}}.tar", LeftOut())
    write_tar(tmp_path / "z.tar", samples(0, 2), "w:gz")
    with pytest.raises(
        UserError, match=r"more than half: z.tar \(not a tar that can be read \(compressed ones are not\)"
    ):
        WebDataset(path=str(tmp_path / "z.tar")).captions()
    whole = write_tar(tmp_path / "cut.tar", samples(0, 5)).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:2100])
    with pytest.raises(UserError, match=r"1 of 1 shards are damaged, .*: cut.tar \(cut off: it has no end\)"):
        WebDataset(path=str(tmp_path / "cut.tar")).captions()
    with pytest.raises(UserError, match="names 900,000,000,000 shards"):
        find_shards("x{0..899999999999}.tar", LeftOut())


def test_nothing_of_a_shard_is_unpacked_and_its_links_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w") as archive:
        link = tarfile.TarInfo("../x.txt")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.txt")
        archive.addfile(link)
        for name, content in {"../x.png": IMAGES["000.png"], "/y.png": IMAGES["001.png"], "/y.txt": b"fine"}.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    before = sorted(tmp_path.parent.rglob("*"))
    with pytest.raises(UserError, match="1 of 2 images have no caption"):
        WebDataset(path=str(file)).captions()
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_prompts_alone_have_no_images() -> None:
    with pytest.raises(UserError, match="holds prompts and no images"):
        Captions("here", ("a",)).images(Prompts(path="x").sizing, None)


def test_captions_alone_are_read_from_a_hugging_face_set(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": list(PROMPTS), "width": [8] * 5}).save_to_disk(str(tmp_path / "hf"))
    data = HuggingFace(path=str(tmp_path / "hf"), image_column=None, caption_column="text")
    assert (data.has_images, data.captions().prompts) == (False, PROMPTS)
    with pytest.raises(UserError, match="caption_column = 'width', row 0: the caption must be text, not int"):
        HuggingFace(path=str(tmp_path / "hf"), image_column=None, caption_column="width").captions()


def flipped(content: bytes, place: int, count: int = 1) -> bytes:
    return content[:place] + bytes(byte ^ 0x9A for byte in content[place : place + count]) + content[place + count :]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda tar: b"", "empty file"),
    "cut in a member": (lambda tar: tar[: tar.index(b"s/103.png") + 600], "unexpected end of data"),
    "cut in a header": (lambda tar: tar[: tar.index(b"s/103.png") + 100], "cut off: it has no end"),
    "cut between members": (lambda tar: tar[: tar.index(b"s/103.png")], "cut off: it has no end"),
    "a flipped header": (lambda tar: flipped(tar, tar.index(b"s/103.png")), "neither a header nor the end at byte "),
    "a flipped caption": (
        lambda tar: flipped(tar, tar.index(b"number 103")),
        "s/103.txt, line 1: byte 0xf4 is not UTF-8",
    ),
    "a flipped half": (lambda tar: flipped(tar, len(tar) // 4, len(tar) // 2), ""),
    "no tar": (lambda tar: b"some text", "not a tar that can be read"),
}


def write_three(folder: Path, damage: Callable[[bytes], bytes]) -> WebDataset:
    """Three shards of ten samples, the second one damaged."""
    folder.mkdir()
    for shard in range(3):
        members: dict[str, bytes] = {}
        for number in range(100 * shard, 100 * shard + 10):
            members |= {f"s/{number:03d}.png": picture(number), f"s/{number:03d}.txt": f"number {number}".encode()}
        write_tar(folder / f"{shard:02d}.tar", members)
    (folder / "01.tar").write_bytes(damage((folder / "01.tar").read_bytes()))
    return WebDataset(path=f"{folder}/{{00..02}}.tar")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_left_out_counted_and_named_and_the_others_are_whole(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, reason = DAMAGES[damage]
    images = write_three(tmp_path / "shards", change).load()
    expected = np.stack([np.asarray(Image.open(io.BytesIO(picture(n)))) for n in (*range(10), *range(200, 210))])
    assert np.array_equal(images.images, expected.transpose(0, 3, 1, 2))
    said = capsys.readouterr().err
    assert said.count(": 1 of 3 shards are damaged and are left out: 01.tar (") == 1
    assert reason in said
    assert images.notes == (said.strip(),)


def test_flipped_bytes_of_an_image_leave_it_out_with_its_shard_s_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_three(tmp_path / "shards", lambda tar: flipped(tar, tar.index(b"\x89PNG"), 300)).load()
    assert len(images) == 29
    assert "1 of 30 images (3.33%) cannot be read and are left out: 01.tar:s/100.png (" in capsys.readouterr().err


def test_images_that_cannot_be_read_all_over_the_shards_are_refused(tmp_path: Path) -> None:
    data = write_three(tmp_path / "shards", lambda tar: tar)
    for shard in sorted((tmp_path / "shards").iterdir())[:2]:
        content = shard.read_bytes()
        shard.write_bytes(flipped(content, content.index(b"\x89PNG"), 300))
    with pytest.raises(UserError, match=r"2 of 30 images cannot be read .*: 00.tar:s/000.png .*, 01.tar:s/100.png"):
        data.load()


def test_a_set_whose_shards_are_mostly_damaged_is_refused(tmp_path: Path) -> None:
    data = write_three(tmp_path / "shards", lambda tar: b"")
    (tmp_path / "shards" / "02.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 of 3 shards are damaged, more than half: 01.tar \(.*\), 02.tar \("):
        data.load()


def test_a_repaired_shard_is_used_and_no_longer_spoken_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_three(tmp_path / "shards", lambda tar: tar)
    whole = (tmp_path / "shards" / "01.tar").read_bytes()
    (tmp_path / "shards" / "01.tar").write_bytes(whole[:700])
    assert len(data.load()) == 20
    assert "are left out" in capsys.readouterr().err
    (tmp_path / "shards" / "01.tar").write_bytes(whole)
    assert len(data.load()) == 30
    (tmp_path / "shards" / "01.tar").unlink()
    assert len(WebDataset(path=f"{tmp_path}/shards/*.tar").load()) == 20
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "No such file")])
def test_a_shard_that_is_gone_or_may_not_be_read_is_no_damage(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(shard: Path, mode: str) -> None:
        raise error

    data = write_three(tmp_path / "shards", lambda tar: tar)
    monkeypatch.setattr(tarfile, "open", refuse)
    with pytest.raises(UserError, match=rf"00\.tar: cannot be read: {error.strerror}"):
        data.load()
