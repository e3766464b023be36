"""What text is read, and what a file that is none is said to be."""

from collections.abc import Callable
from pathlib import Path

import pytest

from diffdistill.data.prompts import Prompts
from diffdistill.eval.protocols.captions import read_captions
from diffdistill.eval.protocols.protocol import Protocol
from diffdistill.eval.records.record import read_records
from diffdistill.settings.schema import UserError
from diffdistill.settings.text import read_text
from diffdistill.settings.values import read_yaml, validate

LINES = "a red kite\nan \u00e9t\u00e9\n"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16le", "utf-16be", "utf-32le", "utf-32be"])
@pytest.mark.parametrize("text", [LINES, "plain letters\n"])
def test_a_wide_encoding_is_named_with_the_command_that_converts_it(encoding: str, text: str) -> None:
    with pytest.raises(UserError, match=rf"p\.txt, line \d: .*seems to be {encoding.upper()}.*iconv -f {encoding} -t"):
        read_text(text.encode(encoding), origin="p.txt")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16le"])
def test_a_wide_encoding_that_was_converted_as_latin_1_is_refused(encoding: str) -> None:
    converted = LINES.encode(encoding).decode("latin-1").encode()
    with pytest.raises(UserError, match=r"line 1: holds a NUL character"):
        read_text(converted, origin="p.txt")


def test_its_mark_tells_where_it_came_from() -> None:
    with pytest.raises(UserError, match=r"seems to have been UTF-16 .* convert the original"):
        read_text(LINES.encode("utf-16").decode("latin-1").encode(), origin="p.txt")


def test_other_bytes_are_named_by_their_line() -> None:
    with pytest.raises(UserError, match=r"line 2: byte 0xe9 is not UTF-8; if .* iconv -f latin1"):
        read_text(LINES.encode("latin-1"), origin="p.txt")


@pytest.mark.parametrize("text", [LINES, LINES.replace("\n", "\r"), LINES.replace("\n", "\r\n"), "\ufeff" + LINES])
def test_line_ends_and_a_byte_order_mark_are_no_part_of_a_prompt(text: str, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes(text.encode())
    assert Prompts(path=str(file)).captions().prompts == tuple(LINES.split("\n")[:2])


def protocol_captions(file: str) -> object:
    about = {"num_images": 2, "image_shape": [3, 8, 8], "captions": {"name": "two", "count": 2}}
    metrics = [{"name": "clip_score", "features": {"name": "open_clip", "model": "m", "pretrained": "t", "size": 8}}]
    labels = {"policy": "captions"}
    protocol = validate(Protocol, {"name": "p", **about, "metrics": metrics, "labels": labels}, origin="p")
    return read_captions(protocol, file)


@pytest.mark.parametrize("read", [read_yaml, read_records, protocol_captions])
def test_every_reader_of_text_names_the_encoding(read: Callable[[str], object], tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(LINES.encode("utf-16"))
    with pytest.raises(UserError, match="seems to be UTF-16"):
        read(str(file))


def test_a_byte_order_mark_would_be_part_of_a_protocols_first_caption(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(("\ufeff" + LINES).encode())
    with pytest.raises(UserError, match="begins with a byte order mark"):
        protocol_captions(str(file))
