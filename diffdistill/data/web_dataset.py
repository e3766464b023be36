"""WebDataset shards: tar files whose members of one name, but for the ending, are one sample. Nothing is unpacked.

The format: github.com/webdataset/webdataset, README, "The WebDataset Format".
"""

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import pairwise, product
from math import prod
from pathlib import Path as FilePath
from typing import Literal

from diffdistill.data.buckets import BucketsConfig
from diffdistill.data.captions import COLUMNS, Captions, checked_caption, paired, read_item, read_rows
from diffdistill.data.collection import Item, UnreadableImage, checked_size, is_minority, shown
from diffdistill.data.decode import SUFFIXES, Sizing
from diffdistill.data.left_out import LeftOut
from diffdistill.data.source import MappedImages
from diffdistill.settings.numbers import Sides
from diffdistill.settings.schema import UserError, schema
from diffdistill.settings.text import read_text

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
MAX_SHARDS = 1_000_000
CHUNK = 2**20
MAX_LISTED = 5
BRACES = re.compile(r"\{(\d{1,30})\.\.(\d{1,30})\}")


class DamagedShard(Exception):  # noqa: N818
    """A shard that is no whole tar; the message is the reason."""


@dataclass(frozen=True)
class Member:
    """Where a file lies in a tar."""

    tar: FilePath
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Raises UnreadableImage, OSError."""
        with self.tar.open("rb") as handle:
            handle.seek(self.offset)
            content = handle.read(checked_size(self.size))
        if len(content) != self.size:
            raise UnreadableImage("cut off at the shard's end")
        return content


@schema
class WebDataset:
    """Tar files, uncompressed: one, a folder of them, or a pattern as in data/{0000..0127}.tar or data/*.tar.

    captions_ending: of a caption, a text, or a JSON object with `caption_column` (default caption, text or
    prompt).  The image is the member that ends in jpg, jpeg, png or webp.  Damaged shards are left out with a warning.
    resolution: centre crop and Lanczos resize to this side, or height and width; default: the teacher's
    `resolution`, or else all images must have one size.  buckets: several sizes of about its area instead of one.
    """

    name: Literal["webdataset"] = "webdataset"
    path: str
    captions_ending: str = "txt"
    caption_column: str | None = None
    resolution: Sides | None = None
    buckets: BucketsConfig | None = None
    channels: Literal[1, 3] = 3
    cache: str | None = None

    has_captions = True
    has_images = True

    @property
    def sizing(self) -> Sizing:
        return Sizing(self.resolution, self.channels)

    def load(self) -> MappedImages:
        """The prepared images; their labels are the numbers of their captions."""
        return self.captions().images(self.sizing, self.cache)

    def captions(self) -> Captions:
        """Every sample that has a caption. Shards that are damaged, or compressed, are left out with a note.

        Raises UserError on shards that are missing or may not be read, and if more than half are damaged.
        """
        left_out = LeftOut()
        shards = find_shards(self.path, left_out)
        items: list[Item] = []
        found: list[str | None] = []
        damaged: list[str] = []
        for shard in shards:
            unused = LeftOut()
            try:
                pairs = list(self._pairs(shard, unused))
            except DamagedShard as error:
                damaged.append(f"{shown(shard.name)} ({error})")
                continue
            left_out.merge(unused)
            items += [item for item, _ in pairs]
            found += [caption for _, caption in pairs]
        notes = _without_damaged(self.path, damaged, len(shards))
        if not items:
            has = f", but {left_out}" if left_out.total else ""
            raise UserError(f"data.path = {self.path!r}: no sample has an image ({', '.join(IMAGE_ENDINGS)}){has}")
        kept, prompts, lacking = paired(items, found, origin=self.path)
        used = len(items) + sum(caption is not None for caption in found)
        notes += [*left_out.notes(self.path, used=used), *lacking]
        settings = {"name": self.name, "captions": [self.captions_ending, self.caption_column]}
        return Captions(self.path, tuple(prompts), tuple(kept), tuple(shards), tuple(notes), settings)

    def _pairs(self, shard: FilePath, left_out: LeftOut) -> Iterator[tuple[Item, str | None]]:
        """A shard's images, with the caption of each if it has one. Raises as `samples_of`."""
        for sample in samples_of(shard, left_out):
            ending = next((ending for ending in IMAGE_ENDINGS if ending in sample), None)
            used = (ending, self.captions_ending) if ending else ()
            for other, member in sample.items():
                if other not in used:
                    left_out.add(self._why_not(other), member.name)
            if ending is not None:
                text, image = sample.get(self.captions_ending), sample[ending]
                item = Item(f"{shard.name}:{image.name}", image.read, part=str(shard))
                yield item, None if text is None else self._caption(text)

    def _why_not(self, ending: str) -> str:
        """Why a member of this ending is not used."""
        _, dot, last = ending.rpartition(".")
        if dot and last in (*IMAGE_ENDINGS, self.captions_ending):
            return "of a name with dots, whose ending begins at the first dot"
        if f".{last}" in SUFFIXES and ending not in IMAGE_ENDINGS:
            return "an image of a format that is not looked for"
        if ending == self.captions_ending:
            return "a caption without an image"
        return f"a second image of its sample (.{ending})" if ending in IMAGE_ENDINGS else "of another ending"

    def _caption(self, member: Member) -> str:
        """Raises DamagedShard on what is no UTF-8 or no JSON, UserError on what is no caption."""
        origin, is_json = f"{member.tar}:{member.name}", self.captions_ending == "json"
        try:
            text = read_text(read_item(Item(member.name, member.read), origin=member.name), origin=member.name)
            line = io.BytesIO(" ".join(text.split("\n")).encode())
            rows = list(read_rows(line, suffix=".jsonl", origin=member.name)) if is_json else []
        except UserError as error:
            raise DamagedShard(str(error)) from None
        if not is_json:
            return checked_caption(text, origin=origin)
        (row,) = rows or [(0, {})]
        known = COLUMNS if self.caption_column is None else (self.caption_column,)
        column = next((name for name in known if name in row[1]), None)
        if column is None:
            raise UserError(f"{origin}: has none of {', '.join(known)}; set data.caption_column")
        return checked_caption(row[1][column], origin=origin)


def find_shards(path: str, left_out: LeftOut) -> list[FilePath]:
    """The tar files that a path means, in order. Raises UserError if one is missing.

    left_out: told what else a folder holds.
    """
    place = FilePath(path).expanduser()
    if place.is_dir():
        found = sorted(place.glob("*.tar"))
        for other in sorted(set(place.iterdir()) - set(found)):
            left_out.add("beside the shards, and no .tar", f"{other.name}/" if other.is_dir() else other.name)
    elif BRACES.search(str(place)):
        found = [FilePath(name) for name in _expanded(str(place))]
    elif has_magic(str(place)):
        found = sorted(map(FilePath, glob(str(place))))
    else:
        found = [place]
    missing = [str(file) for file in found if not file.is_file()]
    if missing or not found:
        raise UserError(f"data.path = {path!r}: {f'no such file: {missing[0]}' if missing else 'no .tar there'}")
    return found


def samples_of(shard: FilePath, left_out: LeftOut) -> Iterator[dict[str, Member]]:
    """The samples of a shard by the ending of each member: a name's part behind the first dot.

    left_out: told the members that are of no sample.
    Raises DamagedShard, perhaps after some samples, and UserError if the file is not there or may not be read.
    """
    key: str | None = None
    sample: dict[str, Member] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if not member.isreg() or member.issparse():  # they hold no data, or not in one piece
                    if not member.isdir():
                        left_out.add("symbolic link" if member.issym() else "no regular file", member.name)
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, dot, ending = base.partition(".")
                if not dot or not stem:
                    left_out.add("hidden" if dot else "of a name without an ending", member.name)
                    continue
                if key != f"{folder}/{stem}":
                    if sample:
                        yield sample
                    key, sample = f"{folder}/{stem}", {}
                if ending.lower() in sample:
                    left_out.add("the first of two with one ending in a sample", sample[ending.lower()].name)
                sample[ending.lower()] = Member(shard, member.name, member.offset_data, member.size)
            end = archive.offset
        _check_end(shard, end)
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"{shard}: cannot be read: {error.strerror}") from None
    except (tarfile.TarError, OSError, EOFError, ValueError, UnicodeDecodeError) as error:
        raise DamagedShard(f"not a tar that can be read (compressed ones are not): {error}") from None
    if sample:
        yield sample


def _check_end(shard: FilePath, end: int) -> None:
    """Raise DamagedShard unless zeros alone follow the last member: tarfile takes a damaged header for the end."""
    if shard.stat().st_size - end < tarfile.BLOCKSIZE:
        raise DamagedShard("cut off: it has no end")
    with shard.open("rb") as handle:
        handle.seek(end)
        while chunk := handle.read(CHUNK):
            if chunk.strip(b"\0"):
                raise DamagedShard(f"neither a header nor the end at byte {end:,}")


def _without_damaged(origin: str, damaged: list[str], total: int) -> list[str]:
    """A note of the shards that are not used. Raises UserError if they are too many."""
    if not damaged:
        return []
    names = ", ".join(damaged[:MAX_LISTED]) + (f" and {len(damaged) - MAX_LISTED:,} more" * (len(damaged) > MAX_LISTED))
    if not is_minority(len(damaged), total):
        raise UserError(f"{origin}: {len(damaged):,} of {total:,} shards are damaged, more than half: {names}")
    return [f"{origin}: {len(damaged):,} of {total:,} shards are damaged and are left out: {names}"]


def _expanded(pattern: str) -> list[str]:
    """{0000..0003} as four names, the width kept; of several braces every combination, the last one fastest."""
    found = list(BRACES.finditer(pattern))
    sides = [range(int(one[1]), int(one[2]) + 1) for one in found]
    count = prod(max(0, side.stop - side.start) for side in sides)
    if not 1 <= count <= MAX_SHARDS:
        told = f"{count:,}" if count < 10**30 else "10^30 or more"
        raise UserError(f"data.path = {shown(pattern)!r}: names {told} shards; at most {MAX_SHARDS:,} are read")
    cuts = [0, *(cut for one in found for cut in one.span()), len(pattern)]
    head, *others = [pattern[start:end] for start, end in list(pairwise(cuts))[::2]]
    widths = [len(one[1]) for one in found]
    return [
        head + "".join(f"{n:0{width}d}{text}" for n, width, text in zip(numbers, widths, others, strict=True))
        for numbers in product(*sides)
    ]
