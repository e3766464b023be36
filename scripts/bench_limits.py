"""What files at the limits of `diffdistill/settings/limits.py` take to read: CPU seconds, and memory at the peak.

python scripts/bench_limits.py [--share 1] [--only KIND ...]

Each file is written, then read in a process of its own: the reader's own CPU time, and by how much it raised the
process's peak. --share: of the limits, to try it out.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from describe_machine import describe
from peak import peak_bytes
from PIL import Image

from diffdistill.data.captioned_images import CaptionedImages
from diffdistill.data.prompts import Prompts
from diffdistill.eval.board.leaderboard import REPORTED
from diffdistill.eval.records.record import read_records
from diffdistill.settings.limits import MAX_RECORDS_BYTES, MAX_ROWS, MAX_TABLE_BYTES

BYTES_A_LINE = MAX_TABLE_BYTES // MAX_ROWS


def _line(number: int, before: str, after: str) -> str:
    """As many bytes as a line may have on average, other ones in each line."""
    text = f"{before}{number:07d} a photograph of a fox in the snow at dawn by the river"
    return text.encode()[: BYTES_A_LINE - len(after.encode()) - 1].decode() + after + "\n"


def _lines(head: str = "", before: str = "", after: str = "") -> Callable[[int], Iterator[str]]:
    def made(rows: int) -> Iterator[str]:
        yield head
        yield from (_line(number, before, after) for number in range(rows - 2))  # fewer by the head

    return made


def _named(rows: int) -> Iterator[str]:
    yield "file,caption\n0000000.png,a fox\n"
    yield from (_line(number, f"{number:07d}.png,", "") for number in range(1, rows - 2))


def _records(rows: int) -> Iterator[str]:
    """The packaged records, again and again, up to their own limit."""
    size = MAX_RECORDS_BYTES * rows // MAX_ROWS
    for line in cycle(REPORTED.read_text(encoding="utf-8").splitlines(keepends=True)):
        size -= len(line.encode())
        if size < 0:
            return
        yield line


def _read_prompts(file: Path) -> int:
    return len(Prompts(path=str(file)).captions().prompts)


def _read_captions(file: Path) -> int:
    Image.new("RGB", (8, 8)).save(file.parent / "0000000.png")
    return len(CaptionedImages(path=str(file.parent), captions_file=str(file)).captions().prompts)


@dataclass(frozen=True)
class Kind:
    """write: a file's lines, of so many.  read: how many entries the reader found."""

    name: str
    write: Callable[[int], Iterator[str]]
    read: Callable[[Path], int]


KINDS = {
    "prompts.txt": Kind("prompts, .txt", _lines(), _read_prompts),
    "emoji.txt": Kind("the same, an emoji in each line", _lines(after="\N{FOX FACE}"), _read_prompts),
    "prompts.csv": Kind("prompts, .csv", _lines("caption\n", '"', '"'), _read_prompts),
    "prompts.jsonl": Kind("prompts, .jsonl", _lines("", '{"caption": "', '"}'), _read_prompts),
    "captions.csv": Kind("a caption for each file name, .csv", _named, _read_captions),
    "records.jsonl": Kind("records", _records, lambda file: len(read_records(file))),
}


def measure(name: str, share: float) -> str:
    """A row of the table."""
    kind, rows = KINDS[name], int(share * MAX_ROWS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        with file.open("w", encoding="utf-8") as handle:
            handle.writelines(kind.write(rows))
        with file.open("rb") as handle:
            lines, size = sum(1 for _ in handle), file.stat().st_size / 2**20
        told = subprocess.run([sys.executable, __file__, "--read", str(file)], check=True, stdout=subprocess.PIPE)
    seconds, added = map(float, told.stdout.split())
    return f"| {kind.name} | {lines:,} | {size:.0f} MiB | {seconds:.1f} s | {added:.0f} MiB |"


def read(file: Path) -> str:
    """CPU seconds, and MiB by which the peak rose."""
    peak, before = peak_bytes(), time.process_time()
    assert KINDS[file.name].read(file) > 0
    return f"{time.process_time() - before} {(peak_bytes() - peak) / 2**20}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--only", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(read(options.read))
        return
    print(describe())
    print("\n| file | lines | size | time | memory |\n|---|---|---|---|---|", flush=True)
    for name in options.only:
        print(measure(name, options.share), flush=True)


if __name__ == "__main__":
    main()
