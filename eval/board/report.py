"""An HTML page of one run: settings, curves, health signals, previews, scores. From its folder alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from diffdistill.eval.board.figures import compact, shorten
from diffdistill.eval.board.leaderboard import Score
from diffdistill.eval.board.pages import Embedded, embed_picture, plain, render
from diffdistill.eval.board.panels import Panel, draw_panel
from diffdistill.eval.metrics.against import AboveFloor, Measured
from diffdistill.eval.metrics.settings import metric_label
from diffdistill.eval.records.record import Record, read_records
from diffdistill.settings.links import refuse_links
from diffdistill.settings.reading import read_json, read_log
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import hide_secrets
from diffdistill.settings.values import read_yaml
from diffdistill.storage.atomic import write_text_atomically
from diffdistill.storage.checkpoint import list_checkpoints
from diffdistill.training.reports.curves import CLOCKS, read_metrics, read_reports, sections

CONFIG, METRICS, WARNINGS, PREVIEWS, TABLE, PAGE = (
    *("config.yaml", "metrics.jsonl", "warnings.txt", "previews", "table.json", "report.html"),
)
MOST_PREVIEWS = 24  # spread over the run; the first and the newest are among them
MOST_ROWS = 20  # of a file of records, the newest ones
SCORES = "eval/"  # what a small protocol measured during training, among the logged numbers


@dataclass(frozen=True)
class Clock:
    """What had gone by at each report. steps, images, seconds: ascending; seconds of the clock, a resumed run's parts
    added up."""

    steps: tuple[float, ...]
    images: tuple[float, ...]
    seconds: tuple[float, ...]

    def at(self, step: float) -> tuple[float, float]:
        """(images, seconds) at a step, linearly between reports and from 0 at step 0."""
        steps = [0.0, *self.steps]
        return tuple(float(np.interp(step, steps, [0.0, *known])) for known in (self.images, self.seconds))  # type: ignore[return-value]


@dataclass(frozen=True)
class Preview:
    step: int
    images: float
    picture: Embedded


@dataclass(frozen=True)
class Table:
    """Rows of texts. origin: the file they come from."""

    origin: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def write_report(run: FilePath, out: FilePath | None = None) -> FilePath:
    """Write report.html into the run's folder, or to `out`.

    Returns the file. Raises UserError if the folder holds no run, or links to files, or if `out` cannot be written.
    """
    file = out or run / PAGE
    page = report_page(run)
    if out is None:
        refuse_links(run)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, page)
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from None
    return file


def report_page(run: FilePath) -> str:
    """The page of a run. Raises UserError if the folder has no config.yaml, or one that is not YAML."""
    if not (run / CONFIG).is_file():
        raise UserError(f"{run}: not the folder of a run: it has no {CONFIG}")
    config = read_yaml(run / CONFIG)
    metrics = read_metrics(run / METRICS)
    clock = read_clock(run / METRICS)
    panels = {
        heading: [draw_panel(name, metrics[name], clock.at, clock.steps) for name in names]
        for heading, names in _sections(list(metrics), sections(metrics)).items()
    }
    health = [panel for held in panels.values() for panel in held if panel.band is not None]
    return render(
        "report.html",
        scripts=("theme.js", "report.js"),
        title=shorten(f"{_method(config)}: {run.resolve().name}", 80),
        run=run.resolve().name,
        method=_method(config),
        summary=_summary(config),
        tiles=tiles(run, config, clock, health),
        warnings=read_warnings(run / WARNINGS),
        panels=panels,
        previews=read_previews(run / PREVIEWS, clock),
        tables=[*read_table(run), *read_scores(run)],
        settings=settings(config),
        checkpoints=[folder.name for folder in list_checkpoints(run / "checkpoints")],
    )


def read_clock(file: FilePath) -> Clock:
    """The run's clocks, from metrics.jsonl. The seconds of a resumed run begin anew in the file; here they go on."""
    reports = read_reports(file)
    clocks = [[report.get(name, math.nan) for name in CLOCKS[:3]] for report in reports]
    lines = [clock for clock in clocks if all(map(math.isfinite, clock))]
    if not lines:
        return Clock((), (), ())
    steps, images, seconds = zip(*lines, strict=True)
    jumps = [before if after < before else 0.0 for before, after in pairwise(seconds)]
    resumed = np.cumsum([0.0, *jumps])
    return Clock(steps, images, tuple(float(s + r) for s, r in zip(seconds, resumed, strict=True)))


def tiles(
    run: FilePath, config: Mapping[str, Any], clock: Clock, health: Sequence[Panel]
) -> list[tuple[str, str, str]]:
    """(what, value, note): how far the run is, what it took, how it is."""
    planned = _setting(config, "train", "steps")
    done = int(clock.steps[-1]) if clock.steps else 0
    seconds, images = (clock.seconds[-1], clock.images[-1]) if clock.steps else (0.0, 0.0)
    ill = [panel.label for panel in health if panel.is_ill]
    found = [
        ("Steps", f"{done:,}", f"of {planned:,}" if isinstance(planned, int) else ""),
        ("Images", compact(images), f"batches of {_setting(config, 'train', 'global_batch_size')}"),
        ("Time", duration(seconds), f"{done / seconds:.3g} steps per second" if seconds else ""),
        ("Seed", str(_setting(config, "train", "seed")), str(_setting(config, "train", "precision"))),
    ]
    if health:
        well = len(health) - len(ill)
        found.append(
            ("Healthy signals", f"{well} of {len(health)}", shorten(", ".join(ill), 60) if ill else "all of them")
        )
    state = _newest_state(run)
    if told := _classes(state):
        found.append(("Classes", told[0], told[1]))
    skips = _skips(state)
    return [*found, ("Skipped updates", str(skips), "not finite")] if skips else found


def read_warnings(file: FilePath) -> list[tuple[str, str]]:
    """Lines of warnings.txt as (what, why and what to try), split at the second colon as health.py writes them."""
    found = []
    for line in filter(None, read_log(file).splitlines()):
        head, closing, words = line.partition("): ")
        found.append((head + closing.rstrip(": "), words) if closing else ("", line))
    return found


def read_previews(folder: FilePath, clock: Clock) -> list[Preview]:
    """At most MOST_PREVIEWS of the run's previews, oldest first. One that cannot be read is left out."""
    steps = {}
    for file in sorted(folder.glob("step-*.png")):
        number = file.stem.removeprefix("step-")
        if number.isdecimal():
            steps[int(number)] = file
    order = sorted(steps)
    chosen = sorted({order[round(place)] for place in np.linspace(0, len(order) - 1, MOST_PREVIEWS)}) if order else []
    previews = []
    for step in chosen:
        try:
            previews.append(Preview(step, clock.at(step)[0], embed_picture(steps[step])))
        except UserError:
            continue  # half written by a run that was killed
    return previews


def read_table(run: FilePath) -> list[Table]:
    """The demo's table.json, in the run's folder or beside it. Raises UserError if it is no list of rows."""
    for file in (run / TABLE, run.resolve().parent / TABLE):
        if not file.is_file():
            continue
        try:
            rows = read_json(file)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file}: cannot be read: {error}") from None
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{file}: must be a list of rows, as `diffdistill demo` writes it")
        heads = tuple(dict.fromkeys(str(key) for row in rows for key in row))
        return [Table(file.name, heads, tuple(tuple(_text(row.get(head)) for head in heads) for row in rows))]
    return []


def read_scores(run: FilePath) -> list[Table]:
    """Records of this run's evaluations, from the JSONL files in its folder and beside it."""
    found = []
    for folder in (run.resolve(), run.resolve().parent):
        for file in sorted(folder.glob("*.jsonl")):
            if file.name == METRICS:
                continue
            mine = [record for record in _records(file) if _is_of(record, run)]
            metrics = tuple(dict.fromkeys(name for record in mine for name in record.metrics))
            rows = tuple(_score_row(record, metrics) for record in mine[-MOST_ROWS:])
            if rows:
                found.append(Table(file.name, ("name", "protocol", *metrics), rows))
            found += against_table(file.name, mine[-MOST_ROWS:])
    return found


def against_table(origin: str, records: Sequence[Record]) -> list[Table]:
    """The distances of a run to its teacher, each with its floor and interval; nothing where none was measured."""
    rows = [
        (record.name, record.against.place, f"{record.against.num_images:,}", metric_label(metric), *_interval(one))
        for record in records
        if record.against
        for metric, one in record.against.metrics.items()
    ]
    heads = ("name", "against", "images", "metric", "distance", "floor", "distance - floor")
    pairs = [
        (
            record.name,
            record.against.place,
            f"{ends.count:,}",
            "RMS of pixels, same noise",
            _measured(ends.same_noise),
            "–",
            "–",
        )
        for record in records
        if record.against and (ends := record.against.end_points)
    ]
    return [Table(f"{origin}: against its teacher", heads, (*rows, *pairs))] if rows else []


def _interval(one: AboveFloor) -> tuple[str, str, str]:
    return _measured(one.student), f"{one.floor.value:.4g}", _measured(one.excess)


def _measured(one: Measured) -> str:
    return f"{one.value:.4g} ({one.low:.4g} to {one.high:.4g})"


def settings(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The config in groups, the lone values of the top first; nothing that sounds secret."""
    clean = {key: _without_secrets(value, key) for key, value in config.items()}
    lone = {key: value for key, value in clean.items() if not isinstance(value, dict)}
    groups = [(key, value) for key, value in clean.items() if isinstance(value, dict) and value]
    return [("run", lone), *groups] if lone else groups


def duration(seconds: float) -> str:
    """48 s, 3 min 36 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _without_secrets(value: Any, name: str) -> Any:
    """A setting's value without what sounds secret in it, or in its name."""
    if isinstance(value, Mapping):
        return {hide_secrets(str(key)): _without_secrets(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_secrets(inner, name) for inner in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return hide_secrets(f"{name}: {value}").removeprefix(f"{name}: ")


def _sections(names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """What was measured during training first, then losses, gradient norms, health."""
    scores = [name for name in names if name.startswith(SCORES)]
    rest = {heading: [name for name in held if name not in scores] for heading, held in groups.items()}
    return {heading: held for heading, held in {"scores": scores, **rest}.items() if held}


def _records(file: FilePath) -> list[Record]:
    try:
        return read_records(file)
    except UserError:
        return []  # some other file of lines


def _is_of(record: Record, run: FilePath) -> bool:
    """Whether a record was measured on this run or one of its checkpoints."""
    if record.model is None:
        return False
    place = FilePath(record.model.source).resolve()
    return place == run.resolve() or run.resolve() in place.parents


def _score_row(record: Record, metrics: Sequence[str]) -> tuple[str, ...]:
    cells = [record.name, str(record.protocol["name"])]
    for name in metrics:
        score = Score.of([record.metrics[name].values]) if name in record.metrics else None
        spread = f" ± {score.std:.3g}" if score and score.std is not None else ""
        cells.append(f"{score.headline:.5g}{spread}" if score else "–")
    return tuple(cells)


def _newest_state(run: FilePath) -> Mapping[str, Any]:
    """What the newest checkpoint says of the run; nothing if there is none that can be read."""
    newest = list_checkpoints(run / "checkpoints")[-1:]
    try:
        state = read_json(newest[0] / "state.json")
    except (IndexError, OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def _skips(state: Mapping[str, Any]) -> int:
    """Updates that were left out because a loss was not finite."""
    try:
        return sum(int(number) for number in state["skips"].values())
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return 0


def _classes(state: Mapping[str, Any]) -> tuple[str, str] | None:
    """How many classes the run is about, and their names, where they have some."""
    model = state.get("model")
    names = model.get("class_names") if isinstance(model, dict) else None
    if not isinstance(names, list) or not names or not isinstance(model, dict):
        return None
    chosen = model.get("classes") or range(len(names))
    told = [str(names[n]) for n in chosen if isinstance(n, int) and 0 <= n < len(names)]
    return str(len(told)), shorten(", ".join(told), 60)


def _method(config: Mapping[str, Any]) -> str:
    return str(_setting(config, "method", "name"))


def _summary(config: Mapping[str, Any]) -> str:
    parts = [f"Data {_setting(config, 'data', 'name')}"]
    parts += [f"teacher {config['teacher']}"] if config.get("teacher") else []
    return shorten(", ".join(parts), 160) + "."


def _setting(config: Mapping[str, Any], group: str, name: str) -> Any:
    held = config.get(group)
    return held.get(name, "–") if isinstance(held, Mapping) else "–"


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return "–" if value is None else plain(value) if isinstance(value, int) else str(value)
