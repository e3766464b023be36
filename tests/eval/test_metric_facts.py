"""A metric owns what is true of its numbers; records, boards, tables and the choice of the best checkpoint ask it."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.judged import NoiseImages

from diffdistill.eval.board.leaderboard import Located, make_board
from diffdistill.eval.board.page import board_page
from diffdistill.eval.evaluation.table import number, show_differences
from diffdistill.eval.features.extractors import Hps, LaionAesthetic, OpenClip, Pixels
from diffdistill.eval.metrics import settings
from diffdistill.eval.metrics.compare import Difference
from diffdistill.eval.metrics.facts import PUBLISHED, Fact
from diffdistill.eval.metrics.settings import CLASSES, FACTS, better, fact_of, metric_label, primary_metric
from diffdistill.eval.protocols.packaged import DIGITS_PIXELS
from diffdistill.eval.records.record import Environment, Images, Record, Source, Values, takes_minimum
from diffdistill.settings.terminal import Console


@pytest.mark.parametrize(
    ("metric", "side"),
    [
        *(
            (name, "lower")
            for name in ("fid", "fd-pixels", "kid-x", "cmmd", "mmd-x", "fid-teacher", "fd-rest-x", "forgotten-share-x")
        ),
        *((name, "higher") for name in ("recall", "precision", "density", "coverage", "is", "is-x", "clip-score")),
        *((name, "higher") for name in ("diversity", "geneval", "vbench", "image-reward")),
        *((name, "higher") for name in ("pickscore", "hps-v2.1", "hps-v2.0", "laion-aesthetic")),
        *((name, "unknown") for name in ("energy-pixels", "clip-distance", "fidelity", "recall_at_5", "image")),
    ],
)
def test_what_is_better_is_known_or_said_to_be_unknown(metric: str, side: str) -> None:
    assert better(metric) == side


@pytest.mark.parametrize(
    ("metric", "label"),
    [
        ("fid", "FID"),
        ("fd-resnet20-cifar", "FD resnet20-cifar"),
        ("fd-rest-resnet20-cifar", "FD of the rest resnet20-cifar"),
        ("clip-score", "CLIP score"),
        ("recall", "recall"),
        ("image-reward", "image reward"),
        ("hps-v2.1", "HPS v2.1"),
        ("energy-pixels", "energy pixels"),
    ],
)
def test_a_metric_is_spoken_with_its_features_as_they_are_called(metric: str, label: str) -> None:
    assert metric_label(metric) == label


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_states_the_facts_of_all_its_names(kind: type) -> None:
    own = {
        settings.ClipScore: OpenClip(model="ViT-B-32", pretrained="openai"),
        settings.Preference: Hps(),
        settings.Aesthetic: LaionAesthetic(),
    }
    classes = {"forgotten": (3,)} if kind in (settings.FrechetRest, settings.ForgottenShare) else {}
    made = kind(features=own.get(kind, Pixels()), **classes)
    assert {fact_of(key) for key in made.keys} <= set(kind.facts)  # type: ignore[attr-defined]


def test_no_two_metrics_share_a_name() -> None:
    names = [fact.name for fact in FACTS]
    assert len(set(names)) == len(names)
    assert set(PUBLISHED) <= set(FACTS)


@pytest.mark.parametrize(
    ("metrics", "primary"),
    [
        (("kid-x", "fd-x", "recall"), "fd-x"),
        (("recall", "mmd-x", "cmmd"), "cmmd"),
        (("energy", "recall", "precision"), "recall"),
        (("energy", "entropy"), "energy"),
    ],
)
def test_a_board_is_ranked_by_what_is_known(metrics: tuple[str, ...], primary: str) -> None:
    assert primary_metric(metrics) == primary


@pytest.mark.parametrize(("metric", "shown"), [("kid-x", "0.12346"), ("fid", "0.123"), ("energy", "0.123")])
def test_digits_are_those_of_the_metric(metric: str, shown: str) -> None:
    assert number(metric, 0.123456) == shown


def located(name: str, **metrics: float) -> Located:
    record = Record(
        kind="measured",
        name=name,
        protocol={"name": "p", "headline": "min"},
        metrics={key: Values.of([value, value + 1]) for key, value in metrics.items()},
        model=NoiseImages(DIGITS_PIXELS).model,
        images=Images(count=2),
        environment=Environment(
            date="2026-01-01",
            versions={},
            commit=None,
            command="",
            device="cpu",
            dtype="float32",
            tf32=False,
            wall_seconds=1.0,
        ),
    )
    return Located(record, Path("here.jsonl"), 1)


def test_nothing_is_ranked_by_a_metric_that_nobody_knows() -> None:
    board = make_board([located("a", energy=1.0), located("b", energy=2.0)])
    (group,) = board.measured
    assert [entry.rank for entry in group.entries] == [None, None]
    assert not takes_minimum(group.protocol, "energy")
    page = board_page(board, title="t")
    assert "energy: the better direction is unknown" in page
    assert "energy: higher is better" not in page


@pytest.fixture
def _facts_are_read_anew() -> Iterator[None]:
    """What is known of a metric is kept."""
    settings.fact_of.cache_clear()
    yield
    settings.fact_of.cache_clear()


@pytest.mark.usefixtures("_facts_are_read_anew")
def test_a_metric_that_is_known_is_ranked_by_its_own_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "FACTS", (*FACTS, Fact("energy", "lower", "energy", priority=0)))
    (group,) = make_board([located("a", energy=2.0, fid=1.0), located("b", energy=1.0, fid=2.0)]).measured
    assert group.primary == "energy"
    assert [entry.name for entry in group.entries] == ["b", "a"]


def test_a_difference_of_an_unknown_metric_has_no_winner() -> None:
    told = io.StringIO()
    found = {name: Difference(1.0, 3.0, -2.0, -3.0, -1.0) for name in ("energy", "recall", "fid")}
    console = Console(file=told, width=200)
    show_differences(found, ("x", "y"), replace(DIGITS_PIXELS), console, confidence=0.95)
    ends = [line.split()[-2] for line in told.getvalue().splitlines() if line.startswith("│")]
    assert ends == ["unknown", "B", "A"]


def test_a_published_metric_that_is_unknown_is_shown_all_the_same() -> None:
    record = located("a", energy=1.0).record
    source = Source(title="T", url="https://example.org", place="Table 1")
    reported = replace(record, kind="reported", model=None, images=None, environment=None, source=source)
    (group,) = make_board([Located(reported, Path("here.jsonl"), 1)]).reported
    assert group.metrics == ("energy",)
