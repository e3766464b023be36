"""What an evaluation leaves behind: one line of JSON that says how every number came about.

Records are read strictly: an unknown key, a lying type, NaN or a half line is a fault that names file and line. Only
records whose protocols are equal, field by field, may be ranked together: `Record.protocol_id` tells them apart.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, lru_cache
from pathlib import Path as FilePath
from statistics import fmean, stdev
from typing import Annotated, Any, Literal, NoReturn

from pydantic import Field, JsonValue

from diffdistill.eval.metrics.against import AboveFloor, EndPoints
from diffdistill.eval.metrics.settings import better
from diffdistill.settings.limits import MAX_LINE_BYTES, MAX_RECORDS_BYTES, MAX_REPEATS, MAX_SAMPLING_STEPS
from diffdistill.settings.links import open_plain
from diffdistill.settings.lock import hold
from diffdistill.settings.numbers import NonNegativeInt, Number, Seed
from diffdistill.settings.reading import read_text
from diffdistill.settings.schema import NonNegative, PositiveInt, UserError, field, schema
from diffdistill.settings.text import why_not_utf8
from diffdistill.settings.values import dump, validate
from diffdistill.storage.atomic import naming

Count = NonNegativeInt
MetricName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_.-]*$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Sentence = Annotated[str, Field(max_length=20_000)]


@schema
class Values:
    """One metric: a value for each repeat, and their min, mean and sample standard deviation (null for one repeat).

    within: of each repeat, the standard deviation inside it: over KID's subsets, over the Inception Score's splits.
    Raises ValidationError if these do not follow from the values.
    """

    values: Annotated[tuple[Number, ...], Field(min_length=1, max_length=MAX_REPEATS)]
    min: Number
    mean: Number
    std: NonNegative | None
    within: tuple[NonNegative, ...] | None = None

    @staticmethod
    def of(values: Sequence[float], *, within: Sequence[float] | None = None) -> "Values":
        """values: at least one, finite.  within: as many, or None."""
        return Values(values=tuple(values), **_summary(values), within=tuple(within) if within else None)

    def __post_init__(self) -> None:
        if self.within is not None and len(self.within) != len(self.values):
            raise ValueError(f"within = {list(self.within)}: one for each of {list(self.values)}")
        for name, known in _summary(self.values).items():
            told = getattr(self, name)
            both = told is not None and known is not None
            if not (math.isclose(told, known, rel_tol=1e-9, abs_tol=1e-12) if both else told is known):
                raise ValueError(f"{name} = {told}: of {list(self.values)} it is {known}")


@schema
class ModelRecord:
    """source: where the images come from, a run, a checkpoint, a folder.  sha256: of the weights or of the images.
    parameters: of the network.  around_sha256: of the weights or files of what stands around it, by part, as in vae.
    licence: an SPDX name."""

    source: str
    sha256: Sha256 | None = None
    parameters: Count | None = None
    around_sha256: dict[str, Sha256] = field(default_factory=dict)
    teacher: str | None = None
    licence: str | None = None


@schema
class SamplerRecord:
    """num_evaluations: of the network for one image, a guided one counted once.  settings: the sampler's other ones."""

    name: str
    num_evaluations: PositiveInt | None = None
    guidance: Number | None = None
    settings: dict[str, JsonValue] = field(default_factory=dict)


@schema
class Cost:
    """What training took, as far as it is known.  seconds: of the clock."""

    train_steps: Count | None = None
    train_images: Count | None = None
    train_seconds: NonNegative | None = None
    train_cpu_seconds: NonNegative | None = None
    gpu_hours: NonNegative | None = None


@schema
class Efficiency:
    """What sampling takes, as eval/evaluation/efficiency.py measures it: medians after a warm-up.

    num_evaluations: of the network for one image, a guided one counted twice.  latency_ms: one image at batch 1.
    throughput: images a second at throughput_batch.  peak_memory_bytes: the device's, at that batch.  includes: what
    ran beside the network (text encoder, VAE).  repeats: timed ones; warm_up: those before them.
    """

    num_evaluations: PositiveInt
    parameters: Count
    latency_ms: NonNegative
    throughput: NonNegative
    throughput_batch: PositiveInt
    peak_memory_bytes: Count | None
    device: str
    dtype: str
    compile: bool
    includes: tuple[str, ...]
    warm_up: Count
    repeats: PositiveInt
    threads: PositiveInt | None = None


@schema
class Images:
    """count: images of one repeat.  seeds: [first, end) of each repeat, end excluded.  grid: a PNG, relative to the
    record's file.  features_sha256: by features, of all repeats' rows in order."""

    count: Count
    seeds: Annotated[tuple[tuple[Seed, Seed], ...], Field(max_length=MAX_SAMPLING_STEPS)] = ()
    grid: str | None = None
    features_sha256: dict[str, Sha256] = field(default_factory=dict)


@schema
class Against:
    """The distance to a teacher, or to any other model.

    place, sha256: of the model, its weights.  sampler: of it.  protocol: every field of how both were judged.
    seeds: [first, end) of the student's images; floor and end points have the model's of the same.  independent_seeds:
    of those of the model that both are compared with.  metrics: by name.  end_points: None where the student is files.
    confidence: of every interval; replicates: the halves that those of `metrics` come from.
    """

    place: str
    sha256: Sha256 | None = None
    sampler: SamplerRecord | None = None
    protocol: dict[str, JsonValue]
    num_images: PositiveInt
    seeds: tuple[Seed, Seed]
    independent_seeds: tuple[Seed, Seed]
    metrics: Annotated[dict[MetricName, AboveFloor], Field(min_length=1)]
    end_points: EndPoints | None = None
    confidence: Annotated[float, Field(gt=0, lt=1)]
    replicates: PositiveInt


@schema
class Environment:
    """Where and how it was measured.  date: ISO 8601, UTC.  commit: of this package's source, if it is a checkout."""

    date: str
    versions: dict[str, str]
    commit: str | None
    command: str
    device: str
    dtype: str
    tf32: bool
    wall_seconds: NonNegative
    num_processes: PositiveInt = 1
    batch_size: PositiveInt | None = None


@schema
class Source:
    """Where a reported number was read.  place: as in "Table 2"."""

    title: str
    url: str
    place: str


@schema
class Record:
    """One line: `measured` here, or `reported` by someone else.

    protocol: every field of the protocol, with its name; of a reported one, what is known.  metrics: by name.
    against: how far the model is from its teacher, where that was asked.
    Raises ValidationError if a measured record lacks its environment, or a reported one its source.
    """

    schema: Literal[1] = 1
    kind: Literal["measured", "reported"]
    name: Annotated[str, Field(min_length=1, max_length=200)]
    method: str | None = None
    seed: Seed | None = None
    protocol: dict[str, JsonValue]
    metrics: Annotated[dict[MetricName, Values], Field(min_length=1)]
    model: ModelRecord | None = None
    sampler: SamplerRecord | None = None
    cost: Cost | None = None
    efficiency: Efficiency | None = None
    images: Images | None = None
    against: Against | None = None
    environment: Environment | None = None
    source: Source | None = None
    notes: Sentence = ""

    def __post_init__(self) -> None:
        if not isinstance(self.protocol.get("name"), str):
            raise ValueError("protocol.name: is required, and is a text")
        needed = ("model", "images", "environment") if self.kind == "measured" else ("source",)
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"{name}: a {self.kind} record needs it")

    @cached_property
    def protocol_id(self) -> str:
        """Equal for two records if and only if they may be ranked together."""
        return protocol_id(self.protocol)

    def headline(self, metric: str) -> float:
        """What is shown first: the mean over the repeats, or of a distance their minimum where the protocol says so."""
        values = self.metrics[metric]
        return values.min if takes_minimum(self.protocol, metric) else values.mean


def takes_minimum(protocol: Mapping[str, Any], metric: str) -> bool:
    """Whether of a metric's repeats the minimum counts: only of what is better when lower."""
    return protocol.get("headline") == "min" and better(metric) == "lower"


def protocol_id(protocol: dict[str, Any]) -> str:
    """SHA-256 of a protocol's canonical JSON: keys sorted, no blanks, 1.0 written as 1.

    protocol: plain JSON types.  Raises ValueError for NaN and infinity.
    """
    return _id_of_text(json.dumps(protocol, allow_nan=False))


@lru_cache(maxsize=256)
def _id_of_text(protocol: str) -> str:
    """Of a board's ten thousand records most have one of a few protocols, written the same."""
    return hash_json(json.loads(protocol))


def hash_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, as `protocol_id`."""
    text = json.dumps(_canonical(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_records(file: str | FilePath) -> list[Record]:
    """All records of a JSONL file, in order; blank lines are passed over.

    Raises UserError naming the file and the line of the first that is no record.
    """
    try:
        text = read_text(file, limit=MAX_RECORDS_BYTES)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: {why_not_utf8(error)}") from None
    lines = enumerate(text.split("\n"), start=1)
    return [parse_record(line, origin=f"{file}, line {number}") for number, line in lines if line.strip()]


def parse_record(text: str, *, origin: str) -> Record:
    """One line as a record.  origin: where it stands, for errors.  Raises UserError naming every fault."""
    if len(text) > MAX_LINE_BYTES:
        raise UserError(f"{origin}: not a record: {len(text):,} characters; at most {MAX_LINE_BYTES:,} are read")
    try:
        data = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeats)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin}: not a record: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{origin}: not a record: must be an object, not {type(data).__name__}")
    if data.get("schema") != 1:
        raise UserError(f"{origin}: schema = {data.get('schema')!r}: this version reads schema 1")
    return validate(Record, data, origin=origin)


def append_record(file: str | FilePath, record: Record) -> None:
    """Add one line, whole or not at all, whoever else is writing.

    The file is locked, written once, and synced; what a failed write has left is cut off again.
    Raises UserError if the file cannot be opened or ends in half a line, OSError if there is no room.
    """
    line = json.dumps(dump(record), allow_nan=False, ensure_ascii=False).encode() + b"\n"
    file = FilePath(file)
    with ExitStack() as held:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(hold(file.with_name(f".{file.name}.lock"), waiting=lambda: None))
            descriptor = held.enter_context(open_plain(file, "ab+", buffering=0)).fileno()
        except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise UserError(f"{file}: cannot be written: {error.strerror}") from None
        end = os.lseek(descriptor, 0, os.SEEK_END)
        if end and _last_byte(descriptor, end) != b"\n":
            raise UserError(f"{file}: its last line is cut short; end it with a line break, or remove it")
        with naming(file):
            _write_whole(descriptor, line, end)


def _last_byte(descriptor: int, end: int) -> bytes:
    os.lseek(descriptor, end - 1, os.SEEK_SET)
    return os.read(descriptor, 1)


def _write_whole(descriptor: int, line: bytes, end: int) -> None:
    """`line` at the end of the file, on the disk; or the file as it was."""
    try:
        written = 0
        while written < len(line):
            written += os.write(descriptor, line[written:])
        os.fsync(descriptor)
    except BaseException:
        os.ftruncate(descriptor, end)
        raise


def _summary(values: Sequence[float]) -> dict[str, Any]:
    return {"min": min(values), "mean": fmean(values), "std": stdev(values) if len(values) > 1 else None}


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"repeated key {next(key for key, count in counts.items() if count > 1)!r}")
    return found
