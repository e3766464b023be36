"""Sweeps: one config over a grid of values, run after run, then compared: a table, sweep.json and sweep.png.

Every combination is an ordinary run in <run>/<key>=<value>[,...], which can be resumed, sampled from and exported.
"""

import gc
import hashlib
import itertools
import json
import re
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path as FilePath
from typing import Any, Literal

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from diffdistill.commands.demo import evaluate_run
from diffdistill.commands.sweep_picture import Entry, draw_sweep, healthy_band, sample_sheet
from diffdistill.distributed.stopping import StopRequested, TrainingError
from diffdistill.settings.links import refuse_links
from diffdistill.settings.reading import read_log
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import Console, hide_secrets
from diffdistill.settings.values import apply_overrides, dump, parse_yaml
from diffdistill.storage.atomic import write_text_atomically
from diffdistill.storage.checkpoint import list_checkpoints
from diffdistill.training.config import RunConfig, parse_config, read_config
from diffdistill.training.reports.curves import band_of, read_metrics
from diffdistill.training.reports.log import METRICS, WARNINGS
from diffdistill.training.trainer import Trainer

RECORD, PICTURE, TRACE = "sweep.json", "sweep.png", "error.txt"
LONGEST_VALUE, LONGEST_NAME = 60, 200
SCORES = {"fd_pixels": "FD pixels", "precision": "precision", "recall": "recall"}


@dataclass(frozen=True)
class Axis:
    """One --sweep: a dotted key, and its values as YAML reads them."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Combination:
    """One point of the grid. name: its folder's; settings: overrides that make it."""

    name: str
    values: Mapping[str, Any]
    settings: tuple[str, ...]


@dataclass
class Outcome:
    """What came of a run. losses: means over the last tenth of the reports; health: the newest reading; scores: by
    the protocol digits-pixels, for digits models; warnings: how often a health signal left its band."""

    name: str
    values: Mapping[str, Any]
    status: Literal["pending", "done", "failed", "stopped"] = "pending"
    error: str | None = None
    step: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    health: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    warnings: int = 0

    @property
    def numbers(self) -> dict[str, float]:
        """All of them, by the names that are shown: scores, health, losses."""
        scores = {SCORES[name]: value for name, value in self.scores.items()}
        return scores | self.health | self.losses


def run_sweep(
    config: str | FilePath,
    overrides: Sequence[str],
    sweeps: Sequence[str],
    *,
    resume: bool = False,
    trusts_code: bool = False,
    console: Console | None = None,
    quiet: bool = False,
) -> list[Outcome]:
    """Train every combination of the values, one after another, and compare them.

    config: a YAML file.  sweeps: "key=value,value,...", a short key where it is unambiguous.  resume: go on with a
    sweep that was stopped: finished runs are kept.  Raises UserError, before anything is written, if any combination
    cannot be; TrainingError at the end, naming the runs that failed; StopRequested at once.
    """
    console = console or Console()
    base = apply_overrides(read_config(config), overrides)
    checked = parse_config(base, origin=str(config))
    folder, axes = FilePath(checked.run), parse_axes(sweeps, checked)
    grid = combinations(axes, folder)
    configs = check(grid, base, folder, resume=resume, trusts_code=trusts_code)
    outcomes = [Outcome(combination.name, combination.values) for combination in grid]
    refuse_links(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number, (outcome, settled) in enumerate(zip(outcomes, configs, strict=True), start=1):
        say(console, f"run {number} of {len(grid)}: {outcome.name}")
        try:
            train(outcome, settled, resume=resume, quiet=quiet, trusts_code=trusts_code)
        except BaseException:  # a signal, not a failure: the sweep ends here
            outcome.status = "stopped"
            say(
                console,
                f"the sweep stopped in run {number} of {len(grid)}; resume it with the same command and --resume",
            )
            raise
        finally:
            measure(outcome, FilePath(settled.run))
            write_record(folder / RECORD, axes, outcomes)
    compare(folder, axes, outcomes, console)
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if failed:
        listed = "".join(f"\n  {outcome.name}: {outcome.error}" for outcome in failed)
        raise TrainingError(f"{len(failed)} of {len(outcomes)} runs failed:{listed}")
    return outcomes


def parse_axes(sweeps: Sequence[str], config: RunConfig) -> list[Axis]:
    """The axes of the grid. Raises UserError on anything malformed, unknown, ambiguous or repeated."""
    places = [place for place in dotted_places(dump(config)) if place != "run"]
    axes: list[Axis] = []
    for sweep in sweeps:
        key, equals, text = sweep.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--sweep {sweep!r}: write key=value,value")
        values = parse_yaml(f"[{text}]", origin=f"--sweep {sweep!r}")
        if not values:
            raise UserError(f"--sweep {sweep!r}: gives no value")
        texts = [value_text(value) for value in values]
        repeated = sorted({text for text in texts if texts.count(text) > 1})
        if repeated:
            raise UserError(f"--sweep {sweep!r}: gives {repeated[0]} more than once")
        axes.append(Axis(resolve_key(key.strip(), places), tuple(values)))
    for first, second in itertools.permutations(axes, 2):
        if first.key == second.key or second.key.startswith(f"{first.key}."):
            raise UserError(f"--sweep: {first.key} and {second.key} set the same key; give one of them")
    return axes


def resolve_key(key: str, places: Sequence[str]) -> str:
    """The dotted place that a key means: itself, or the only one that ends with it.

    Raises UserError with the candidates.
    """
    if key == "run":
        raise UserError("--sweep run: every run of a sweep has its own folder already")
    found = [place for place in places if place.endswith(f".{key}")]
    if key in places or (not found and "." in key):  # an unknown dotted key is named by the schema
        return key
    if len(found) > 1:
        raise UserError(f"--sweep {key}: could be any of {', '.join(found)}; write one of them")
    if not found:
        close = get_close_matches(key, sorted({place.rpartition(".")[2] for place in places}), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise UserError(f"--sweep {key}: no such setting{hint}")
    return found[0]


def dotted_places(settings: Mapping[str, Any], place: str = "") -> list[str]:
    """Every key of nested settings as a dotted place, groups included."""
    found = []
    for key, value in settings.items():
        name = f"{place}.{key}" if place else key
        found += [name, *(dotted_places(value, name) if isinstance(value, Mapping) else [])]
    return found


def combinations(axes: Sequence[Axis], folder: FilePath) -> list[Combination]:
    """The grid, the last axis running fastest."""
    grid = []
    for values in itertools.product(*(axis.values for axis in axes)):
        chosen = {axis.key: value for axis, value in zip(axes, values, strict=True)}
        name = file_name(chosen)
        settings = [f"{key}={json.dumps(value, default=str)}" for key, value in chosen.items()]
        grid.append(Combination(name, chosen, (*settings, f"run={json.dumps(str(folder / name))}")))
    return grid


def value_text(value: Any) -> str:
    """A value as people write it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)


def file_name(values: Mapping[str, Any]) -> str:
    """key=value[,...], of letters, digits and ._+-=, only: what else stands there becomes _ and a hash that keeps
    different values apart."""
    parts = [f"{_safe(key)}={_safe(value_text(value))}" for key, value in values.items()]
    name = ",".join(parts)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 9]}-{_hash(name)}"


def check(
    grid: Sequence[Combination], base: dict[str, Any], folder: FilePath, *, resume: bool, trusts_code: bool
) -> list[RunConfig]:
    """Every combination's config. Raises UserError naming all that cannot be run; nothing is written."""
    if list_checkpoints(folder / "checkpoints"):
        raise UserError(f"{folder}: holds a run already; choose another `run` for the sweep")
    configs: list[RunConfig] = []
    faults: list[str] = []
    for combination in grid:
        try:
            configs.append(parse_config(apply_overrides(base, combination.settings), origin=combination.name))
        except UserError as error:
            faults.append(str(error))
    for combination, config in zip(grid, configs, strict=False) if not faults else ():
        try:
            Trainer(config, resume=resume, trusts_code=trusts_code)
        except UserError as error:
            faults.append(f"{combination.name}: {error}")
        except Exception:
            continue  # no room for it just now, say: it may fail when its turn comes, and is named then
    if faults:
        listed = "\n".join(faults).replace("\n", "\n  ")
        raise UserError(f"{len(faults)} of {len(grid)} combinations cannot be run; none was started\n  {listed}")
    return configs


def train(outcome: Outcome, config: RunConfig, *, resume: bool, quiet: bool, trusts_code: bool) -> None:
    """Run one combination; what goes wrong is recorded."""
    trace = FilePath(config.run) / TRACE
    try:
        trainer = Trainer(config, resume=resume, quiet=quiet, trusts_code=trusts_code)
        if trainer.step < config.train.steps:
            trainer.run()
        trainer.nonfinite.check_end(trainer.step)
        outcome.status = "done"
        trace.unlink(missing_ok=True)
    except StopRequested:
        raise
    except Exception as error:
        outcome.status, outcome.error = "failed", _one_line(error)
        with suppress(OSError):
            trace.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(trace, hide_secrets(traceback.format_exc()))
    finally:
        trainer = None  # type: ignore[assignment]  # before the next one needs the room
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(outcome: Outcome, folder: FilePath) -> None:
    """Read a run's numbers from its folder, and score it where it is done and a digits model."""
    metrics = read_metrics(folder / METRICS)
    for name, series in metrics.items():
        shown = name.removeprefix("health/").replace("/", " ").replace("_", " ")
        if name.endswith("/loss"):
            tail = series.values[-max(1, len(series.values) // 10) :]
            outcome.losses[shown] = float(tail.mean())
        elif band_of(name):
            outcome.health[shown] = float(series.values[-1])
        outcome.step = max(outcome.step, int(series.steps[-1]))
    outcome.warnings = len(read_log(folder / WARNINGS).splitlines())
    if outcome.status == "done":
        try:
            row = evaluate_run(str(folder)).to_dict()
            outcome.scores = {name: float(row[name]) for name in SCORES}
        except UserError:  # not a digits model
            outcome.scores = {}
        except Exception as error:
            outcome.error = f"not scored: {_one_line(error)}"


def write_record(file: FilePath, axes: Sequence[Axis], outcomes: Sequence[Outcome]) -> None:
    """sweep.json: the grid, and what is known of each run so far."""
    grid = {axis.key: list(axis.values) for axis in axes}
    record = {"format": 1, "grid": grid, "runs": [asdict(outcome) for outcome in outcomes]}
    write_text_atomically(file, json.dumps(record, indent=1, default=str) + "\n")


def compare(folder: FilePath, axes: Sequence[Axis], outcomes: Sequence[Outcome], console: Console) -> None:
    """The table and the picture. A picture that cannot be drawn is said; the numbers stand."""
    show_table(axes, outcomes, console)
    short = short_keys([axis.key for axis in axes])
    best = min((o.scores["fd_pixels"] for o in outcomes if o.scores), default=None)
    entries = []
    for outcome in outcomes:
        sheet = None
        if outcome.status == "done":
            with suppress(Exception):
                sheet = sample_sheet(folder / outcome.name)
        entries.append(
            Entry(
                caption=", ".join(f"{short[key]} = {value_text(value)}" for key, value in outcome.values.items()),
                note=_note(outcome),
                values=tuple(value_text(v) if not _is_number(v) else v for v in outcome.values.values()),
                numbers=outcome.numbers if outcome.status == "done" else {},
                sheet=sheet,
                is_failed=outcome.status == "failed",
                is_best=best is not None and outcome.scores.get("fd_pixels") == best,
            )
        )
    try:
        draw_sweep(folder / PICTURE, entries, keys=[short[axis.key] for axis in axes], title=f"sweep {folder}")
    except Exception as error:
        say(console, f"{PICTURE} cannot be drawn: {_one_line(error)}")
    say(console, f"wrote {folder}/{RECORD} and {PICTURE}")


def show_table(axes: Sequence[Axis], outcomes: Sequence[Outcome], console: Console) -> None:
    """Two tables, a line a run: scores and losses; health."""
    health = list(dict.fromkeys(name for outcome in outcomes for name in outcome.health))
    quality = [n for n in dict.fromkeys(n for outcome in outcomes for n in outcome.numbers) if n not in health]
    _table("scores (* best) and losses (mean over the last tenth)", ["status", *quality], axes, outcomes, console)
    _table("health (! outside its band) and number of warnings", [*health, "warnings"], axes, outcomes, console)


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key's last part, or all of it where two end alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: part if last.count(part) == 1 else key for key, part in zip(keys, last, strict=True)}


def say(console: Console, message: str) -> None:
    """A line for people."""
    console.print(message, markup=False, highlight=False, soft_wrap=True)


def _table(
    title: str, columns: Sequence[str], axes: Sequence[Axis], outcomes: Sequence[Outcome], console: Console
) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in short_keys([axis.key for axis in axes]).values():
        table.add_column(name, overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    for outcome in outcomes:
        values = [Text(value_text(value)) for value in outcome.values.values()]
        table.add_row(*values, *(_cell(name, outcome, outcomes) for name in columns))
    console.print(table)


def _cell(name: str, outcome: Outcome, outcomes: Sequence[Outcome]) -> str:
    if name in ("status", "warnings"):
        return str(getattr(outcome, name))
    value = outcome.numbers.get(name)
    if value is None:
        return "-"
    if name in SCORES.values():
        pick = min if name == SCORES["fd_pixels"] else max
        all_of_them = {other.numbers[name] for other in outcomes if name in other.numbers}
        return f"{value:.3f}{'*' if len(all_of_them) > 1 and value == pick(all_of_them) else ' '}"
    band = healthy_band(name)
    return f"{value:.3g}{' ' if band is None or band.low <= value <= band.high else '!'}"


def _note(outcome: Outcome) -> str:
    if outcome.status != "done":
        return f"{outcome.status} at step {outcome.step}: {outcome.error or ''}"
    shown = outcome.scores or dict(itertools.islice(outcome.losses.items(), 2))
    return ", ".join(f"{SCORES.get(name, name)} {value:.3g}" for name, value in shown.items())


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _one_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:300]
    is_expected = isinstance(error, (UserError, TrainingError))
    return hide_secrets(text if is_expected else f"{type(error).__name__}: {text}")


def _safe(text: str) -> str:
    kept = re.sub(r"[^A-Za-z0-9._+-]+", "_", text)
    return kept if kept == text and len(kept) <= LONGEST_VALUE else f"{kept[: LONGEST_VALUE - 9]}-{_hash(text)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
