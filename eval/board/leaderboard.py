"""The leaderboard: records grouped by protocol, seeds gathered, and a rank only among equals.

Two numbers stand in one ranking only if their protocols are equal field by field. Published numbers are shown beside
measured ones, never ranked with them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from statistics import fmean, stdev
from typing import Any, Literal

from diffdistill.eval.metrics.settings import better, primary_metric
from diffdistill.eval.protocols.packaged import PROTOCOLS
from diffdistill.eval.records.record import Record, read_records, takes_minimum
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import differences, dump

REPORTED = FilePath(__file__).with_name("reported.jsonl")
"""Published numbers and where they were read."""


@dataclass(frozen=True)
class Located:
    """A record and where it stands: its file, and its number there, from 1."""

    record: Record
    file: FilePath
    number: int

    @property
    def origin(self) -> str:
        return f"{self.file}, record {self.number}"


@dataclass(frozen=True)
class Score:
    """One metric of one entry.

    values: all of them, seed by seed.  headline: what is shown first and ranked: over seeds the mean of each seed's
    own, which is the mean of its repeats, or their minimum where the protocol says so.  std: sample standard deviation
    over `spread`, which is seeds if there are several, else repeats; None for a single value.
    """

    values: tuple[float, ...]
    headline: float
    mean: float
    std: float | None
    spread: Literal["seeds", "repeats"] | None

    @property
    def min(self) -> float:
        return min(self.values)

    @property
    def max(self) -> float:
        return max(self.values)

    @staticmethod
    def of(repeats: Sequence[Sequence[float]], *, headline: Callable[[Sequence[float]], float] = fmean) -> "Score":
        """repeats: the values of each seed, at least one of each.  headline: of one seed's repeats."""
        values = tuple(value for seed in repeats for value in seed)
        first = fmean(headline(seed) for seed in repeats)
        mean = fmean(fmean(seed) for seed in repeats)
        if len(repeats) > 1:
            return Score(values, first, mean, stdev(headline(seed) for seed in repeats), "seeds")
        if len(values) > 1:
            return Score(values, first, mean, stdev(values), "repeats")
        return Score(values, first, mean, None, None)


@dataclass(frozen=True)
class Entry:
    """One line of a table: a model under a protocol, with all its seeds.

    rank: among the entries of its group, from 1, equal headlines sharing one; None where nothing is ranked.
    """

    sources: tuple[Located, ...]
    scores: dict[str, Score]
    rank: int | None = None

    @property
    def first(self) -> Record:
        return self.sources[0].record

    @property
    def name(self) -> str:
        return self.first.name

    @property
    def seeds(self) -> list[int]:
        return [source.record.seed for source in self.sources if source.record.seed is not None]


@dataclass(frozen=True)
class Group:
    """All entries of one protocol, best first by `primary`; published ones in the order of their file.

    differs: for protocols that share this one's name, the fields in which they differ from it: (field, here, there).
    """

    kind: Literal["measured", "reported"]
    protocol: dict[str, Any]
    protocol_id: str
    primary: str
    metrics: tuple[str, ...]
    entries: tuple[Entry, ...]
    differs: tuple[tuple[str, Any, Any], ...] = ()

    @property
    def name(self) -> str:
        return str(self.protocol["name"])

    @property
    def task(self) -> str:
        """What the protocol is about, under which published set-ups are listed together."""
        return str(self.protocol.get("task", self.name))


@dataclass(frozen=True)
class Board:
    measured: tuple[Group, ...]
    reported: tuple[Group, ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.measured + self.reported


def read_board(files: Sequence[str | FilePath], *, with_reported: bool | None = True) -> Board:
    """The board of some JSONL files, and of the published numbers that come along.

    with_reported: None shows those where a protocol of the records comes along as well: nothing that is published is
    to be compared with one's own pictures.  Raises UserError on a file that is no record, and on records that
    contradict each other.
    """
    found = [located for file in files for located in locate(FilePath(file))]
    if not found:
        raise UserError(f"{', '.join(map(str, files))}: no records")
    if with_reported is None:
        with_reported = any(located.record.protocol["name"] in PROTOCOLS for located in found)
    return make_board([*found, *(locate(REPORTED) if with_reported else ())])


def locate(file: FilePath) -> list[Located]:
    """The records of a file, with their place."""
    return [Located(record, file, number) for number, record in enumerate(read_records(file), start=1)]


def make_board(found: Iterable[Located]) -> Board:
    """Group, gather, rank. Raises UserError on two records of one model and seed that differ."""
    by_protocol: dict[tuple[str, str], list[Located]] = {}
    for located in found:
        by_protocol.setdefault((located.record.kind, located.record.protocol_id), []).append(located)
    groups = [make_group(located) for located in by_protocol.values()]
    measured = [group for group in groups if group.kind == "measured"]
    return Board(
        measured=tuple(_with_differences(group, measured) for group in measured),
        reported=tuple(group for group in groups if group.kind == "reported"),
    )


def make_group(found: Sequence[Located]) -> Group:
    """One table. Raises UserError if the records are not of one kind and one protocol: those cannot be ranked."""
    first = found[0].record
    for located in found[1:]:
        if (located.record.kind, located.record.protocol_id) != (first.kind, first.protocol_id):
            apart = [place for place, _, _ in differences(first.protocol, located.record.protocol)]
            reason = f"their protocols differ in {', '.join(apart)}" if apart else "one is measured, the other reported"
            raise UserError(f"{found[0].origin} and {located.origin} cannot be ranked together: {reason}")
    entries = gather(found)
    metrics = tuple(dict.fromkeys(name for entry in entries for name in entry.scores))
    primary = primary_metric(metrics)
    ranked = rank(entries, primary) if first.kind == "measured" else entries
    return Group(first.kind, first.protocol, first.protocol_id, primary, metrics, tuple(ranked))


def gather(found: Sequence[Located]) -> list[Entry]:
    """Entries in order of appearance: records of one model that differ in their seeds become one."""
    models: dict[str, list[Located]] = {}
    for located in found:
        record = located.record
        source = record.source.url if record.source else None
        identity = (record.name, record.method, dump(record.sampler) if record.sampler else None, source)
        models.setdefault(repr(identity), []).append(located)
    return [_entry(_without_copies(same)) for same in models.values()]


def rank(entries: Sequence[Entry], metric: str) -> list[Entry]:
    """Best headline first; those without the metric last and without rank, as are all by a metric of which nobody
    knows what is better."""
    if better(metric) == "unknown":
        return list(entries)
    sign = 1 if better(metric) == "lower" else -1
    scored = [entry for entry in entries if metric in entry.scores]
    scored.sort(key=lambda entry: sign * entry.scores[metric].headline)
    ranked: list[Entry] = []
    for number, entry in enumerate(scored, start=1):
        ties = ranked and ranked[-1].scores[metric].headline == entry.scores[metric].headline
        ranked.append(Entry(entry.sources, entry.scores, ranked[-1].rank if ties else number))
    return [*ranked, *(entry for entry in entries if metric not in entry.scores)]


def _entry(sources: Sequence[Located]) -> Entry:
    metrics = [source.record.metrics for source in sources]
    scores = {}
    for name in dict.fromkeys(name for held in metrics for name in held):
        headline = min if takes_minimum(sources[0].record.protocol, name) else fmean
        scores[name] = Score.of([held[name].values for held in metrics if name in held], headline=headline)
    asked = [against_values(source.record) for source in sources]
    for name in dict.fromkeys(name for held in asked for name in held):
        scores[name] = Score.of([(held[name],) for held in asked if name in held])
    return Entry(tuple(sources), scores)


def against_values(record: Record) -> dict[str, float]:
    """How far a record's model is from its teacher, as columns: the first distance, its floor, and the end points'."""
    if record.against is None:
        return {}
    against = record.against
    metric = primary_metric(list(against.metrics))
    found = {
        f"to-teacher-{metric}": against.metrics[metric].student.value,
        f"floor-{metric}": against.metrics[metric].floor.value,
    }
    return found | ({"same-noise-rms": against.end_points.same_noise.value} if against.end_points else {})


def _without_copies(sources: Sequence[Located]) -> list[Located]:
    """One record a seed. Raises UserError if two of the same seed tell different things."""
    kept: dict[int | None, Located] = {}
    for source in sources:
        other = kept.setdefault(source.record.seed, source)
        if other.record.against is None and source.record.against is not None:
            kept[source.record.seed] = source
        if other is not source and _told(other.record) != _told(source.record):
            raise UserError(
                f"{other.origin} and {source.origin}: both are {source.record.name!r} with seed {source.record.seed}, "
                "and they differ; give them different names or seeds, or remove one"
            )
    return list(kept.values())


def _told(record: Record) -> Any:
    """What a second measurement of the same must repeat: all but when, where, how fast, and against what else."""
    told = dump(record)
    return {key: value for key, value in told.items() if key not in ("against", "environment", "efficiency", "notes")}


def _with_differences(group: Group, others: Sequence[Group]) -> Group:
    namesake = next((other for other in others if other.name == group.name and other is not group), None)
    if namesake is None:
        return group
    apart = tuple(differences(group.protocol, namesake.protocol))
    return Group(group.kind, group.protocol, group.protocol_id, group.primary, group.metrics, group.entries, apart)
