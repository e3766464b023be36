"""The leaderboard as one HTML page: what its template shows, worked out beforehand."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffdistill.eval.board.costs import Cost, cost_columns, nfe
from diffdistill.eval.board.figures import Given, Plot, Scale, compact, decimals_of, scatter, shorten
from diffdistill.eval.board.further import embedded, rows_at_once, table_of
from diffdistill.eval.board.leaderboard import Board, Entry, Group, Located, Score
from diffdistill.eval.board.pages import Embedded, embed_picture, plain, render
from diffdistill.eval.metrics.settings import better, metric_label
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import say
from diffdistill.settings.values import dump

STRIP = (5.0, 87.0)  # where a row's values stand in its small picture, in its own units


@dataclass(frozen=True)
class Column:
    """label: as shown.  better: lower or higher, or "".  sorted: ascending or descending, if rows stand so."""

    label: str
    help: str
    better: str = ""
    is_number: bool = True
    sorted: str = ""


@dataclass(frozen=True)
class Strip:
    """Where an entry's values stand in the column's range. mean: of the headline."""

    places: tuple[float, ...]
    mean: float


@dataclass(frozen=True)
class Cell:
    text: str
    value: float | None
    spread: str = ""
    title: str = ""
    is_best: bool = False
    is_primary: bool = False
    strip: Strip | None = None


@dataclass(frozen=True)
class Row:
    """One entry, as its line, its plots and its dialog show it."""

    entry: Entry
    group: Group
    anchor: str
    cells: tuple[Cell, ...]
    image: Embedded | None = None

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def rank(self) -> int | None:
        return self.entry.rank

    @property
    def kind(self) -> str:
        return self.group.kind

    @property
    def method(self) -> str:
        return self.entry.first.method or ""

    @property
    def protocol(self) -> dict[str, Any]:
        return self.group.protocol

    @property
    def protocol_name(self) -> str:
        return self.group.name

    @property
    def source(self) -> Any:
        return self.entry.first.source

    @property
    def headline(self) -> str:
        score = self.entry.scores.get(self.group.primary)
        return f"{score.headline:.{decimals_of([score.headline])}f}" if score else ""

    @property
    def subtitle(self) -> str:
        """Method, teacher and seeds, in a few words."""
        first, seeds = self.entry.first, self.entry.seeds
        teacher = first.model.teacher if first.model else None
        several = f"{len(seeds)} seeds" if len(seeds) > 1 else ""
        return shorten(" · ".join(part for part in (first.method, teacher and f"from {teacher}", several) if part), 90)

    @property
    def bucket(self) -> str:
        number = nfe(self.entry.first)
        if number is None:
            return ""
        return "1" if number == 1 else "2-4" if number <= 4 else "5+"

    @property
    def search(self) -> str:
        first = self.entry.first
        model = (first.model.source, first.model.teacher) if first.model else ()
        source = (first.source.title, first.source.place) if first.source else ()
        texts = (self.name, first.method, self.group.name, *model, *source, first.notes)
        return " ".join(text for text in texts if text).lower()

    @property
    def notes(self) -> list[str]:
        return list(dict.fromkeys(source.record.notes for source in self.entry.sources if source.record.notes))

    @property
    def scores(self) -> list[dict[str, str]]:
        """The dialog's table."""
        return [_score_row(name, score) for name, score in self.entry.scores.items()]

    @property
    def seeds(self) -> list[dict[str, Any]]:
        """One part of the dialog for each record behind the entry."""
        return [_seed(source) for source in self.entry.sources]


def board_page(board: Board, *, title: str, say: Callable[[str], None] = say) -> str:
    """The page. say: is told of sample grids that are missing.  Raises UserError on a grid that is not what it says."""
    numbers = iter(range(1, 1 + sum(len(group.entries) for group in board.groups)))
    at_once = rows_at_once(board)
    measured = [_section(group, numbers, say, at_once) for group in board.measured]
    tasks = [_task(groups, numbers) for groups in _by_task(board.reported)]
    rows = [row for section in measured for row in section["rows"]]
    rows += [row for task in tasks for setup in task["setups"] for row in setup["rows"]]
    further = {section["anchor"]: table_of(section, section["further"]) for section in measured if section["further"]}
    methods = {row.method for row in [*rows, *(row for section in measured for row in section["further"])]}
    return render(
        "leaderboard.html",
        scripts=("theme.js", "leaderboard.js", *(("further.js",) if further else ())),
        title=title,
        summary=_summary(board),
        methods=sorted(methods - {""}),
        measured=measured,
        tasks=tasks,
        rows=rows,
        further=embedded(further) if further else None,
    )


def _section(group: Group, numbers: Iterator[int], say: Callable[[str], None], at_once: int | None) -> dict[str, Any]:
    """A measured protocol: its table, plots and sample grids.  at_once: of how many rows; None for all."""
    costs = cost_columns([entry.first for entry in group.entries])
    columns = [Column("#", "Rank", sorted="ascending"), Column("Model", "", is_number=False)]
    columns += [_metric_column(name) for name in group.metrics] + [
        Column(cost.label, cost.unit.capitalize()) for cost in costs
    ]
    found = _rows([group], group.metrics, costs, numbers)
    rows = [replace(row, image=_grid(row.entry, say)) for row in found[:at_once]]
    return {
        "anchor": f"protocol-{group.protocol_id[:12]}",
        "name": group.name,
        "short_id": group.protocol_id[:8],
        "facts": _facts(group),
        "differs": group.differs,
        "protocol": group.protocol,
        "primary": metric_label(group.primary),
        "columns": columns,
        "rows": rows,
        "further": found[len(rows) :],
        "plots": _plots(rows, costs, group.primary),
        "galleries": _galleries(rows),
    }


def _task(groups: Sequence[Group], numbers: Iterator[int]) -> dict[str, Any]:
    """What is published on one task: a table with a part for each set-up."""
    metrics = tuple(dict.fromkeys(name for group in groups for name in group.metrics))
    costs = cost_columns([entry.first for group in groups for entry in group.entries])
    rows = _rows(groups, metrics, costs, numbers)
    return {
        "anchor": f"task-{groups[0].protocol_id[:12]}",
        "name": groups[0].task,
        "columns": [
            Column("Model", "", is_number=False),
            *map(_metric_column, metrics),
            *(Column(cost.label, cost.unit.capitalize()) for cost in costs),
        ],
        "setups": [
            {"name": group.protocol.get("evaluator", group.name), "rows": [row for row in rows if row.group is group]}
            for group in groups
        ],
    }


def _rows(groups: Sequence[Group], metrics: Sequence[str], costs: Sequence[Cost], numbers: Iterator[int]) -> list[Row]:
    entries = [(group, entry) for group in groups for entry in group.entries]
    digits = {
        name: decimals_of([entry.scores[name].headline for _, entry in entries if name in entry.scores])
        for name in metrics
    }
    ranges = {(id(group), name): _Range.of(group, name) for group in groups for name in metrics}
    rows = []
    for (group, entry), number in zip(entries, numbers, strict=False):
        cells = [_metric_cell(group, entry, name, digits[name], ranges[id(group), name]) for name in metrics]
        cells += [_cost_cell(cost.value(entry.first)) for cost in costs]
        rows.append(Row(entry, group, f"record-{number}", tuple(cells)))
    return rows


@dataclass(frozen=True)
class _Range:
    """Of one metric over a group's entries.  best: None where nothing is compared.  scale: of small pictures; None
    where none are drawn."""

    best: float | None
    scale: Scale | None

    @staticmethod
    def of(group: Group, name: str) -> "_Range":
        scores = [entry.scores[name] for entry in group.entries if name in entry.scores]
        is_measured = group.kind == "measured"
        is_compared = is_measured and len(scores) > 1 and better(name) != "unknown"
        choose = min if better(name) == "lower" else max
        is_drawn = is_measured and bool(scores) and name == group.primary
        return _Range(
            best=choose(score.headline for score in scores) if is_compared else None,
            scale=Scale.around([v for score in scores for v in score.values], *STRIP, room=0.0) if is_drawn else None,
        )


def _metric_cell(group: Group, entry: Entry, name: str, digits: int, among: _Range) -> Cell:
    score = entry.scores.get(name)
    if score is None:
        return Cell("–", None)
    return Cell(
        f"{score.headline:.{digits}f}" if group.kind == "measured" else f"{score.headline:.6g}",
        score.headline,
        spread=f"{score.std:.{digits}f}" if score.std is not None else "",
        title=_each(score),
        is_best=score.headline == among.best,
        is_primary=name == group.primary,
        strip=_strip(score, among.scale) if among.scale else None,
    )


def _cost_cell(value: float | None) -> Cell:
    return Cell("–", None) if value is None else Cell(compact(value), value, title=plain(value))


def _strip(score: Score, scale: Scale) -> Strip:
    return Strip(tuple(scale(value) for value in score.values), scale(score.headline))


def _metric_column(name: str) -> Column:
    side, label = better(name), metric_label(name)
    if side == "unknown":
        return Column(label, f"{label}: the better direction is unknown")
    return Column(label, f"{label}: {side} is better", side)


def _plots(rows: Sequence[Row], costs: Sequence[Cost], metric: str) -> list[Plot]:
    """Distance against every cost that at least two models know."""
    plots = []
    for cost in costs if better(metric) == "lower" else ():
        given = []
        for row in rows:
            value, score = cost.value(row.entry.first), row.entry.scores.get(metric)
            if value is not None and score is not None:
                given.append(Given(row.anchor, row.name, value, score.headline, score.min, score.max))
        if cost.is_plotted and len({one.cost for one in given}) > 1:
            plots.append(scatter(given, choice=cost.choice, x_title=cost.unit, is_lower_better=True))
    return plots


def _galleries(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Sample grids, those from the same noise together: the protocol and the first seed range are then the same."""
    found: dict[tuple[int, int] | None, list[Row]] = {}
    for row in rows:
        if row.image is not None:
            images = _source_of_grid(row.entry).record.images
            found.setdefault(images.seeds[0] if images and images.seeds else None, []).append(row)
    return [
        {
            "title": f"Samples from the same noise: seeds {plain(seeds[0])} to {plain(seeds[1] - 1)}"
            if seeds
            else "Samples whose seeds are not recorded",
            "rows": same,
        }
        for seeds, same in found.items()
    ]


def _source_of_grid(entry: Entry) -> Located:
    with_grid = [source for source in entry.sources if source.record.images and source.record.images.grid]
    return (with_grid or entry.sources)[0]


def _grid(entry: Entry, say: Callable[[str], None]) -> Embedded | None:
    """The entry's sample grid. Raises UserError if it lies outside the folder of its record's file."""
    source = _source_of_grid(entry)
    images = source.record.images
    if images is None or images.grid is None:
        return None
    folder = source.file.resolve().parent
    try:
        file = (folder / images.grid).resolve()
        is_there = file.is_relative_to(folder) and file.exists()
    except (OSError, ValueError):
        raise UserError(f"{source.origin}: images.grid = {shorten(images.grid, 80)!r}: is not a file name") from None
    if not file.is_relative_to(folder):
        raise UserError(f"{source.origin}: images.grid = {images.grid!r}: lies outside {folder}")
    if not is_there:
        say(f"{source.origin}: images.grid = {images.grid!r}: no such file; the page omits it")
        return None
    return embed_picture(file)


def _facts(group: Group) -> str:
    """A protocol in one line, as far as it says these things."""
    protocol = group.protocol
    reference = protocol.get("reference")
    against = reference.get("name") if isinstance(reference, dict) else reference
    number, repeats = protocol.get("num_images"), protocol.get("repeats", 1)
    facts = [
        f"{plain(number)} images" if isinstance(number, int) else "",
        f"{repeats} repeats" if isinstance(repeats, int) and repeats > 1 else "",
        f"against {shorten(str(against), 60)}" if against else "",
        f"ranked by {metric_label(group.primary)}"
        + (", the minimum of the repeats" if protocol.get("headline") == "min" else ""),
    ]
    return " · ".join(fact for fact in facts if fact)


def _summary(board: Board) -> str:
    models = sum(len(group.entries) for group in board.measured)
    published = sum(len(group.entries) for group in board.reported)
    text = f"{_count(models, 'result')} measured under {_count(len(board.measured), 'protocol')}"
    text += f", next to {_count(published, 'published one')}. " if published else ". "
    return text + "Models are ranked only against models measured under the same protocol."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _by_task(groups: Sequence[Group]) -> list[list[Group]]:
    tasks: dict[str, list[Group]] = {}
    for group in groups:
        tasks.setdefault(group.task, []).append(group)
    return list(tasks.values())


def _each(score: Score) -> str:
    """Every value, and what the deviation is over."""
    values = ", ".join(f"{value:.6g}" for value in score.values)
    return f"{values} ({len(score.values)} values; ± over {score.spread})" if score.spread else values


def _score_row(name: str, score: Score) -> dict[str, str]:
    numbers = {"headline": score.headline, "mean": score.mean, "std": score.std, "min": score.min}
    shown = {key: "–" if value is None else f"{value:.5g}" for key, value in numbers.items()}
    if score.spread:
        shown["std"] += f" ({score.spread})"
    return {"label": metric_label(name), "each": ", ".join(f"{value:.6g}" for value in score.values), **shown}


def _seed(source: Located) -> dict[str, Any]:
    told = dump(source.record)
    parts = ("model", "sampler", "cost", "efficiency", "images", "against", "environment")
    return {
        "title": "Record" if source.record.seed is None else f"Seed {source.record.seed}",
        "fields": {part: told[part] for part in parts if told[part] is not None},
        "origin": source.origin,
        "json": json.dumps(told, indent=1, ensure_ascii=False),
    }
