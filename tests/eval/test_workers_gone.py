"""A process of an evaluation that is gone is named by the others."""

import os

import pytest
from support.fleet import run_together

from diffdistill.distributed.stopping import TrainingError
from diffdistill.eval.evaluation.workers import find_workers


def wait_in_the_first() -> str:
    workers = find_workers("cpu")
    if os.environ["RANK"] == "1":
        return ""  # and ends
    with pytest.raises(TrainingError) as raised:
        workers.wait()
    return str(raised.value)


def test_an_evaluation_says_that_another_process_is_gone() -> None:
    told = run_together(2, wait_in_the_first)[0]
    assert "another process has exited" in told
    assert "give the command again" in told
    assert "--resume" not in told
