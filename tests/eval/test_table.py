"""The tables of an evaluation on a terminal."""

from dataclasses import replace

import pytest
from support.boards import measured

from diffdistill.eval.evaluation.run import Evaluation
from diffdistill.eval.evaluation.table import rows_of, show_differences, show_evaluations
from diffdistill.eval.metrics.compare import Difference
from diffdistill.eval.protocols.packaged import find_protocol
from diffdistill.eval.records.record import Record, Values
from diffdistill.settings.terminal import Console

METRICS = {
    "fd-resnet20-cifar": Values.of([2.5, 2.25, 3.0]),
    "kid-resnet20-cifar": Values.of([0.01234, 0.01236, 0.01235]),
    "precision": Values.of([0.81, 0.82, 0.83]),
    "recall": Values.of([0.61, 0.62, 0.63]),
    "is-resnet20-cifar": Values.of([8.0, 9.0, 10.0]),
}


def record(name: str, headline: str = "mean") -> Record:
    protocol = {"headline": headline, "repeats": 3, "num_images": 1000, "reference": {"split": "train"}}
    made = measured(name, 1.0, protocol=protocol)
    return replace(made, metrics=METRICS)


def printed(names: list[str], width: int) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show_evaluations([Evaluation(record(name), (), 1.25) for name in names], console)
    return console.export_text()


@pytest.mark.parametrize("width", [80, 200])
def test_no_number_is_cut_off_on_a_narrow_terminal(width: int) -> None:
    text = printed(["a [student] of mine", "teacher"], width)
    assert "…" not in text
    for cell in ("0.01235 ± 0.00001", "0.820 ± 0.010", "2.583 ± 0.382", "a [student] of mine", "FD resnet20-cifar"):
        assert cell in text, cell


def test_differences_fit_a_narrow_terminal() -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    found = {name: Difference(1.0, 2.0, -1.0, -1.5, -0.5) for name in METRICS}
    show_differences(found, ("runs/a", "runs/b"), find_protocol("digits-pixels"), console, confidence=0.95)
    text = console.export_text()
    assert "…" not in text
    assert text.count("-1.500 .. -0.500") == len(METRICS) - 1


def test_of_the_repeats_the_minimum_counts_for_distances_alone() -> None:
    (row,) = rows_of([Evaluation(record("student", headline="min"), (), None)])
    assert row["fd_resnet20_cifar"] == 2.25
    assert row["is_resnet20_cifar"] == pytest.approx(9.0)
    assert row["precision"] == pytest.approx(0.82)
