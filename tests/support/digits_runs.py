"""Runs of DMD2 on digits, and what they say while they train."""

from pathlib import Path

from diffdistill.distributed.stopping import TrainingError
from diffdistill.training.config import find_config, load_config
from diffdistill.training.reports.log import Silence
from diffdistill.training.trainer import Trainer

COMMON = ("train.preview_every=0", "train.num_threads=1", "trackers=[]")


def train_digits_teacher(folder: Path) -> Path:
    """600 steps of pretrain/digits: a minute. Returns the run's folder."""
    Trainer(
        load_config(find_config("pretrain/digits"), [f"run={folder}", "train.steps=600", *COMMON]), quiet=True
    ).run()
    return folder


class DigitsRun:
    """A run of dmd2/digits that is trained part by part.  said: its warnings so far, and the error that ended it."""

    def __init__(self, teacher: Path, folder: Path, *overrides: str) -> None:
        places = (f"run={folder}", f"teacher={teacher}")
        self.trainer = Trainer(load_config(find_config("dmd2/digits"), [*places, *COMMON, *overrides]), quiet=True)
        self.said: list[str] = []

    def train(self, until: int, *, until_said: str | None = None) -> None:
        """To a step, looking at the health every 50; not further than a warning that holds these words."""
        log = _Log(self.said)
        try:
            while self.trainer.step < until and not (until_said is not None and self.has_said(until_said)):
                self.trainer.train_step(log)
                if self.trainer.step % 50 == 0:
                    self.trainer.report(log)
        except TrainingError as error:
            self.said.append(str(error))

    def has_said(self, words: str) -> bool:
        return any(words in line for line in self.said)


class _Log(Silence):
    """Keeps warnings; the rest of a run's log is not looked at."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    def warn(self, message: str) -> None:
        self.lines.append(message)
