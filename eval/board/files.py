"""The leaderboard as files: Markdown, CSV, model cards' metadata, and the HTML page."""

import csv
import gc
import hashlib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any

from diffdistill.eval.board.card_yaml import write_yaml
from diffdistill.eval.board.costs import cost_columns, nfe
from diffdistill.eval.board.figures import compact, decimals_of
from diffdistill.eval.board.leaderboard import Board, Entry, Group, against_values, read_board
from diffdistill.eval.board.page import board_page
from diffdistill.eval.metrics.settings import metric_label
from diffdistill.settings.links import refuse_link
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import say
from diffdistill.settings.values import dump
from diffdistill.storage.atomic import write_text_atomically

HUB_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "imagenet": "ILSVRC/imagenet-1k",
    "coco2014": "HuggingFaceM4/COCO",
}
"""Names of data sets on the Hugging Face hub, where they differ from ours."""

CSV_COLUMNS = (
    *("kind", "protocol", "protocol_id", "rank", "name", "method", "teacher", "seeds"),
    *("metric", "headline", "mean", "std", "std_over", "min", "values"),
    *("num_evaluations", "guidance", "parameters"),
    *("train_steps", "train_images", "train_seconds", "train_cpu_seconds", "gpu_hours"),
    *("latency_ms", "throughput", "throughput_batch", "peak_memory_bytes", "device", "dtype"),
    *("source", "url", "place", "notes"),
)


def write_leaderboard(
    files: Sequence[str | FilePath],
    out: FilePath,
    *,
    title: str | None = None,
    with_reported: bool | None = True,
    say: Callable[[str], None] = say,
) -> list[FilePath]:
    """Read records and write leaderboard.html, .md and .csv, and a folder cards/<model> for each measured model.

    title: None says what is judged, the protocols.  with_reported: as in `read_board`.
    say: is told what a reader of the page will miss.  Returns the files. Raises UserError on records that cannot be
    shown, before anything is written, or where `out` cannot be written.
    """
    with _without_collecting():
        board = read_board(files, with_reported=with_reported)
        if title is None:
            title = f"Leaderboard: {', '.join(dict.fromkeys(group.name for group in board.measured))}".rstrip(": ")
        texts = {
            FilePath("leaderboard.html"): board_page(board, title=title, say=say),
            FilePath("leaderboard.md"): to_markdown(board, title=title),
            FilePath("leaderboard.csv"): to_csv(board),
            **to_cards(board),
        }
    made = set[FilePath]()
    for name, text in texts.items():
        try:
            _make_folder(out, name.parent, made)
            write_text_atomically(out / name, text, is_derived=True)
        except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise UserError(f"{out / name}: cannot be written: {error.strerror}") from None
    return [out / name for name in texts]


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Garbage is not looked for while a board is made: its records all live to the end, and going through them again
    and again takes a fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _make_folder(out: FilePath, inner: FilePath, made: set[FilePath]) -> None:
    """Make a folder in `out` where there is none.  made: those that need not be looked at again.  Raises UserError if
    a step from `out` down to it is a link."""
    if inner in made:
        return
    if inner == inner.parent:
        out.mkdir(parents=True, exist_ok=True)
    else:
        _make_folder(out, inner.parent, made)
        refuse_link(out / inner)
        (out / inner).mkdir(exist_ok=True)
    made.add(inner)


def to_markdown(board: Board, *, title: str = "Leaderboard") -> str:
    """A table for each measured protocol, then one for each published task."""
    lines = [f"# {_md(title)}", ""]
    for group in board.measured:
        lines += [f"## {_md(group.name)}", "", f"Protocol `{group.protocol_id[:12]}`, measured.", ""]
        lines += [*_md_table([group], is_ranked=True), ""]
    if board.reported:
        lines += ["## Published", "", "Not ranked: the evaluations differ.", ""]
    for task in dict.fromkeys(group.task for group in board.reported):
        groups = [group for group in board.reported if group.task == task]
        lines += [f"### {_md(task)}", "", *_md_table(groups, is_ranked=False), ""]
    return "\n".join(lines).rstrip() + "\n"


def to_csv(board: Board) -> str:
    """One line for each entry and metric. A text that a spreadsheet would take for a formula begins with '."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for group in board.groups:
        for entry in group.entries:
            writer.writerows(_csv_rows(group, entry))
    return buffer.getvalue()


def to_cards(board: Board) -> dict[FilePath, str]:
    """Metadata for the card of each measured model, by file: cards/<model>/model-index.yaml, to be put at the top of
    its README.md, and cards/<model>/.eval_results/<protocol>.yaml."""
    entries: dict[str, list[tuple[Group, Entry]]] = {}
    for group in board.measured:
        for entry in group.entries:
            entries.setdefault(entry.name, []).append((group, entry))
    files: dict[FilePath, str] = {}
    protocol_files = {
        group.protocol_id: f"{file_names([group.name])[group.name]}-{group.protocol_id[:8]}.yaml"
        for group in board.measured
    }
    folders = file_names(list(entries))
    for name, found in entries.items():
        folder = FilePath("cards") / folders[name]
        files[folder / "model-index.yaml"] = write_yaml({"model-index": [model_index(name, found)]})
        for group, entry in found:
            file = folder / ".eval_results" / protocol_files[group.protocol_id]
            files[file] = files.get(file, "") + write_yaml(eval_results(group, entry))
    return files


def model_index(name: str, found: Sequence[tuple[Group, Entry]]) -> dict[str, Any]:
    """One element of a model card's `model-index`, as the Hugging Face hub reads it."""
    results = []
    for group, entry in found:
        settings = dump(entry.first.sampler) if entry.first.sampler else {}
        metrics = [
            {
                "type": metric,
                "name": f"{metric_label(metric)} ({group.name})",
                "value": score.headline,
                "args": {
                    "protocol": group.name,
                    "protocol_id": group.protocol_id,
                    "values": list(score.values),
                    **({"std": score.std, "std_over": score.spread} if score.spread else {}),
                    **({"sampler": settings} if settings else {}),
                    **(_against_args(entry) if metric in against_values(entry.first) else {}),
                },
            }
            for metric, score in entry.scores.items()
        ]
        results.append({"task": _task(group), "dataset": _dataset(group), "metrics": metrics})
    return {"name": name, "results": results}


def _against_args(entry: Entry) -> dict[str, Any]:
    """What a distance to a teacher was measured against."""
    against = entry.first.against
    return {"against": against.place, "num_images": against.num_images} if against else {}


def eval_results(group: Group, entry: Entry) -> list[dict[str, Any]]:
    """Entries of a model repository's `.eval_results/*.yaml`, one for each metric."""
    date = max((s.record.environment.date for s in entry.sources if s.record.environment), default=None)
    evaluations = nfe(entry.first)
    notes = ", ".join(
        text
        for text in (
            f"protocol {group.name} ({group.protocol_id[:12]})",
            f"{evaluations} NFE" if evaluations is not None else "",
            f"seeds {', '.join(map(str, entry.seeds))}" if entry.seeds else "",
        )
        if text
    )
    dataset = str(_dataset(group)["type"])
    return [
        {
            "dataset": {"id": dataset, "task_id": f"{group.name}/{metric}"},
            "value": score.headline,
            **({"date": date} if date else {}),
            "notes": notes + (f", std {score.std:.6g} over {score.spread}" if score.std is not None else ""),
        }
        for metric, score in entry.scores.items()
    ]


def file_names(names: Sequence[str]) -> dict[str, str]:
    """A name for a file or folder for each, all different: letters, digits, inner dots and dashes. Where two would get
    the same, capitals aside, or one gets nothing, a hash tells them apart."""
    short = {name: re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:80].lower() for name in names}
    taken = Counter(short.values())
    return {
        name: text
        if text and taken[text] == 1
        else f"{text or 'model'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        for name, text in short.items()
    }


def _md_table(groups: Sequence[Group], *, is_ranked: bool) -> Iterator[str]:
    metrics = list(dict.fromkeys(name for group in groups for name in group.metrics))
    costs = cost_columns([entry.first for group in groups for entry in group.entries])
    digits = {
        name: decimals_of([e.scores[name].headline for g in groups for e in g.entries if name in e.scores])
        for name in metrics
    }
    heads = ["rank"] if is_ranked else []
    heads += ["model", "method", *map(metric_label, metrics), *(cost.label for cost in costs)]
    heads += [] if is_ranked else ["set-up", "source"]
    yield f"| {' | '.join(heads)} |"
    texts = {"model", "method", "set-up", "source"}
    yield f"|{'|'.join('---' if head in texts else '---:' for head in heads)}|"
    for group in groups:
        for entry in group.entries:
            cells = [str(entry.rank or "–")] if is_ranked else []
            cells += [_md(entry.name), _md(entry.first.method or "")]
            cells += [_md_score(entry, name, digits[name] if is_ranked else None) for name in metrics]
            values = [cost.value(entry.first) for cost in costs]
            cells += ["–" if value is None else compact(value) for value in values]
            source = entry.first.source
            if not is_ranked and source:
                cells += [_md(str(group.protocol.get("evaluator", group.name)))]
                cells += [_md(f"{source.title}, {source.place}: {source.url}")]
            yield f"| {' | '.join(cells)} |"


def _md_score(entry: Entry, name: str, digits: int | None) -> str:
    """digits: after the point; None for as published."""
    score = entry.scores.get(name)
    if score is None:
        return "–"
    if digits is None:
        return f"{score.headline:.6g}"
    return f"{score.headline:.{digits}f}" + (f" ± {score.std:.{digits}f}" if score.std is not None else "")


def _csv_rows(group: Group, entry: Entry) -> Iterator[list[object]]:
    first = entry.first
    known: dict[str, Any] = {
        **(dump(first.cost) if first.cost else {}),
        **(dump(first.efficiency) if first.efficiency else {}),
    }
    known |= {"guidance": first.sampler.guidance if first.sampler else None, "num_evaluations": nfe(first)}
    if first.model and first.model.parameters is not None:
        known["parameters"] = first.model.parameters
    if first.source:
        known |= {"source": first.source.title, "url": first.source.url, "place": first.source.place}
    known |= {
        "kind": group.kind,
        "protocol": group.name,
        "protocol_id": group.protocol_id,
        "rank": entry.rank,
        "name": entry.name,
        "method": first.method,
        "teacher": first.model.teacher if first.model else None,
        "seeds": " ".join(map(str, entry.seeds)),
        "notes": first.notes,
    }
    row = {column: _csv(known.get(column)) for column in CSV_COLUMNS}
    for name, score in entry.scores.items():
        row |= {"metric": _csv(name), "headline": score.headline, "mean": score.mean, "min": score.min}
        row |= {"std": score.std, "std_over": score.spread, "values": _csv(" ".join(map(repr, score.values)))}
        yield list(row.values())


def _csv(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = " ".join(value.split())
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _md(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, one line."""
    line = " ".join(text.split())
    escaped = re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", line)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _task(group: Group) -> dict[str, str]:
    """The hub's nearest task; it knows none for class-conditional images."""
    is_captioned = bool(group.protocol.get("captions"))
    kind = "text-to-image" if is_captioned else "unconditional-image-generation"
    return {"type": kind, "name": "Text to image" if is_captioned else "Image generation"}


def _dataset(group: Group) -> dict[str, str]:
    """What the images are compared with: its hub name as type, our name, its split."""
    reference = group.protocol.get("reference")
    reference = reference if isinstance(reference, dict) else {"name": reference or group.name}
    name = str(reference.get("dataset") or reference.get("name"))
    split = reference.get("split")
    return {"name": name, "type": HUB_DATASETS.get(name, name), **({"split": str(split)} if split else {})}


def model_index_of(records: FilePath, place: str) -> list[dict[str, Any]]:
    """The `model-index` of what the records say of a place, for its model card. Raises UserError if nothing was."""
    board = read_board([records])
    found = [
        (group, entry)
        for group in board.measured
        for entry in group.entries
        if any(found.record.model and found.record.model.source == place for found in entry.sources)
    ]
    if not found:
        raise UserError(f"--records {records}: has no record of {place}")
    return [model_index(found[0][1].name, found)]
