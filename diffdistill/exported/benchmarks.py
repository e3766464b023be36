"""Images for benchmarks that others measure, in the folders that their scripts read: GenEval and DPG-Bench.

Both judge by networks of their own (a detector, a model that answers questions), which are no part of this package.
Ghosh et al. 2023, arXiv:2310.11513; Hu et al. 2024, arXiv:2403.05135.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from diffdistill.data.pictures import save_picture, to_uint8
from diffdistill.exported.image_generators import open_image_generator
from diffdistill.inference.image_generator import SampleRequest
from diffdistill.settings.limits import MAX_JSON_BYTES, MAX_RECORDS_BYTES
from diffdistill.settings.reading import read_text
from diffdistill.settings.schema import UserError
from diffdistill.storage.atomic import write_text_atomically

Layout = Literal["geneval", "dpg"]
ENCODED_AT_ONCE = 64
DPG_SIDE = 2
"""DPG-Bench's script cuts the picture of a prompt into 2 x 2 images, row by row."""


@dataclass(frozen=True)
class Task:
    """One prompt.  name: its folder in GenEval's layout, its file in DPG-Bench's.  metadata: its line, for GenEval."""

    name: str
    prompt: str
    metadata: str = ""


@dataclass(frozen=True)
class BenchmarkOptions:
    """asked: how images are made; its prompts are the benchmark's.  prompts: GenEval's evaluation_metadata.jsonl, or
    DPG-Bench's folder of .txt files.  batch: images at a time."""

    layout: Layout
    prompts: FilePath
    out: FilePath
    asked: SampleRequest
    images_per_prompt: int = 4
    batch: int = 16


def write_benchmark(place: str, options: BenchmarkOptions, advance: Callable[[int], None] = lambda count: None) -> int:
    """Make every image of a benchmark, and `<out>.json` beside the folder, which says how. Returns their number.

    Image s of prompt p of N is of the noise (seed, s N + p), whatever the batch.
    Raises UserError on prompts that cannot be read, on a folder that holds something, and as `open_image_generator`.
    """
    tasks = read_tasks(options.layout, options.prompts)
    _check_empty(options)
    prompts = tuple(task.prompt for task in tasks)
    make = open_image_generator(place, replace(options.asked, prompts=prompts, encode_batch=ENCODED_AT_ONCE))
    count = options.images_per_prompt
    together = max(1, options.batch // count)
    for first in range(0, len(tasks), together):
        part = range(first, min(first + together, len(tasks)))
        index = torch.tensor([sample * len(tasks) + number for number in part for sample in range(count)])
        images = torch.cat([make(piece) for piece in index.split(options.batch)])
        for number, own in zip(part, images.split(count), strict=True):
            _WRITERS[options.layout](options.out, tasks[number], own)
        advance(len(index))
    _write_record(place, options, tasks)
    return len(tasks) * count


def read_tasks(layout: Layout, prompts: FilePath) -> list[Task]:
    """The prompts as the benchmark's authors give them. Raises UserError."""
    try:
        tasks = _geneval_tasks(prompts) if layout == "geneval" else _dpg_tasks(prompts)
    except UnicodeDecodeError:
        raise UserError(f"--prompts {prompts}: must be UTF-8 text") from None
    except OSError as error:
        raise UserError(f"--prompts {prompts}: cannot be read: {error.strerror}") from None
    if not tasks:
        raise UserError(f"--prompts {prompts}: holds no prompts")
    return tasks


def _geneval_tasks(file: FilePath) -> list[Task]:
    tasks = []
    for number, line in enumerate(read_text(file, limit=MAX_RECORDS_BYTES).splitlines()):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError):
            prompt = None
        if not isinstance(prompt, str):
            raise UserError(f"--prompts {file}, line {number + 1}: must be a JSON object with a `prompt`")
        tasks.append(Task(f"{number:05d}", prompt, line))
    return tasks


def _dpg_tasks(folder: FilePath) -> list[Task]:
    if not folder.is_dir():
        raise UserError(f"--prompts {folder}: DPG-Bench needs a folder of .txt files, one prompt each")
    files = sorted(folder.glob("*.txt"))
    return [Task(file.stem, " ".join(read_text(file, limit=MAX_JSON_BYTES).split())) for file in files]


def _write_geneval(out: FilePath, task: Task, images: Tensor) -> None:
    for number, image in enumerate(images):
        save_picture(_picture(image), out / task.name / "samples" / f"{number:04d}.png")
    write_text_atomically(out / task.name / "metadata.jsonl", task.metadata + "\n")


def _write_dpg(out: FilePath, task: Task, images: Tensor) -> None:
    rows = [torch.cat(list(row), dim=-1) for row in images.split(DPG_SIDE)]
    save_picture(_picture(torch.cat(rows, dim=-2)), out / f"{task.name}.png")


_WRITERS: dict[Layout, Callable[[FilePath, Task, Tensor], None]] = {"geneval": _write_geneval, "dpg": _write_dpg}


def _picture(image: Tensor) -> Image.Image:
    """[C, H, W] in [-1, 1]."""
    shown = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return Image.fromarray(to_uint8(shown[None])[0].permute(1, 2, 0).contiguous().numpy())


def _check_empty(options: BenchmarkOptions) -> None:
    out, count = options.out, options.images_per_prompt
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"--out {out}: exists already; the benchmark's script evaluates everything in it, so name a new folder"
        )
    if options.layout == "dpg" and count not in (1, DPG_SIDE**2):
        raise UserError(f"--images-per-prompt {count}: DPG-Bench's script crops 1 or {DPG_SIDE**2} out of a picture")


def _write_record(place: str, options: BenchmarkOptions, tasks: Sequence[Task]) -> None:
    """Beside the folder: DPG-Bench's script takes every file in it for a picture."""
    asked = options.asked
    told = {
        "benchmark": options.layout,
        "place": place,
        "prompts": len(tasks),
        "prompts_sha256": hashlib.sha256(json.dumps([(one.name, one.prompt) for one in tasks]).encode()).hexdigest(),
        "images_per_prompt": options.images_per_prompt,
        "seed": asked.seed,
        "guidance": None if asked.guidance is None else str(asked.guidance),
        "steps": asked.num_steps,
        "ema": asked.ema,
    }
    write_text_atomically(options.out.with_name(f"{options.out.name}.json"), json.dumps(told, indent=2) + "\n")
