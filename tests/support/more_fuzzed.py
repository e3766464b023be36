"""Readers for the fuzzer: what we write ourselves and read again, tables, and folders of other libraries."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save

from diffdistill.data import ImageFolder
from diffdistill.data.captioned_images import CaptionedImages
from diffdistill.data.shards import _mapped
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.export.record import RECORD, ExportRecord, read_record
from diffdistill.models.load import ROUTER, first_student
from diffdistill.training.reports.curves import read_metrics
from diffdistill.training.reports.log import METRICS, RunLog


@dataclass(frozen=True)
class Reader:
    """seeds: good files.  read: of a file with this content, in an empty folder; may raise UserError alone.

    is_named: whether a seed's first line says which of several files it is, and is not changed.  refuses: whether it
    refuses anything; else it passes over what it does not know.
    """

    seeds: Callable[[Path], list[bytes]]
    read: Callable[[Path, bytes], object]
    is_named: bool = False
    refuses: bool = True


def named(file: Path) -> bytes:
    """A file's content behind its name."""
    return f"{file.name}\n".encode() + file.read_bytes()


def _pictures(folder: Path) -> Path:
    for label in ("cat", "dog"):
        (folder / "images" / label).mkdir(parents=True)
        Image.new("RGB", (8, 8), (200, 10, 30)).save(folder / "images" / label / "a.png")
    return folder / "images"


def _prepared(folder: Path) -> list[bytes]:
    _prepare(folder)
    made = next((folder / "cache").glob("*/meta.json")).parent
    return [named(file) for file in sorted(made.iterdir())]


def _prepare(folder: Path) -> None:
    data = ImageFolder(path=str(_pictures(folder)), labels="folders", cache=str(folder / "cache"))
    assert data.load().num_classes == 2


def _read_prepared(folder: Path, content: bytes) -> None:
    """A cache of someone else's, with hashes that fit."""
    name, _, content = content.partition(b"\n")
    _prepare(folder)
    made = next((folder / "cache").glob("*/meta.json")).parent
    (made / name.decode()).write_bytes(content)
    if name != b"meta.json":
        meta = json.loads((made / "meta.json").read_text())
        meta["files"][name.decode()] = [len(content), hashlib.sha256(content).hexdigest()]
        (made / "meta.json").write_text(json.dumps(meta))
    ImageFolder(path=str(folder / "images"), labels="folders", cache=str(folder / "cache")).load()


def _tables_of_tensors(_: Path) -> list[bytes]:
    return [save({"a": torch.ones(3, 2), "b": torch.zeros(2, dtype=torch.long)})]


def _read_table_of_tensors(folder: Path, content: bytes) -> None:
    (folder / "a.safetensors").write_bytes(content)
    assert all(part.numel() < 1000 for part in _mapped(folder / "a.safetensors").values())


def _exports(folder: Path) -> list[bytes]:
    ExportRecord(version="1", kind="stock", pipeline="A", call={"steps": 1}, sampler=FewSteps()).write(folder)
    return [(folder / RECORD).read_bytes()]


def _read_export(folder: Path, content: bytes) -> None:
    (folder / RECORD).write_bytes(content)
    read_record(folder)


def _routers(_: Path) -> list[bytes]:
    return [b'{"router": {"name": "classes", "table": [0, 1, 0]}, "students": ["a", "b"]}']


def _read_router(folder: Path, content: bytes) -> None:
    (folder / ROUTER).write_bytes(content)
    first_student(folder)


def _labels(_: Path) -> list[bytes]:
    rows = b"cat/a.png,a red fox\ndog/a.png,a hen\n"
    return [b"labels.csv\nfile,label\n" + rows, b"captions.csv\nfile,caption\n" + rows]


def _read_labels(folder: Path, content: bytes) -> None:
    name, _, content = content.partition(b"\n")
    images = _pictures(folder)
    (folder / name.decode()).write_bytes(content)
    place, cache = str(folder / name.decode()), str(folder / "cache")
    if name == b"labels.csv":
        ImageFolder(path=str(images), labels="csv", labels_file=place, cache=cache).load()
    else:
        CaptionedImages(path=str(images), captions_file=place, cache=cache).captions()


def _logs(_: Path) -> list[bytes]:
    return [b"".join(b'{"step": %d, "images": 9, "a/loss": 0.5, "health/x": 1}\n' % step for step in range(5))]


def _read_log(folder: Path, content: bytes) -> None:
    """As curves, reports and a resumed run read it. What is no report is passed over: nothing is refused."""
    (folder / METRICS).write_bytes(content)
    read_metrics(folder / METRICS)
    RunLog(folder, title="a", start_step=3, num_steps=9, quiet=True)


MORE_READERS = {
    "prepared cache": Reader(_prepared, _read_prepared, is_named=True),
    "cached tensors": Reader(_tables_of_tensors, _read_table_of_tensors),
    "exported folder": Reader(_exports, _read_export),
    "router": Reader(_routers, _read_router),
    "labels and captions": Reader(_labels, _read_labels, is_named=True),
    "log": Reader(_logs, _read_log, refuses=False),
}
