"""Evaluation while training: when it looks, what it keeps, and that it changes nothing of the training."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig

from diffdistill.eval.evaluation import evaluator as watch
from diffdistill.eval.evaluation.run import Evaluation, evaluate
from diffdistill.eval.records.record import Values, read_records
from diffdistill.models.load import load_model
from diffdistill.settings.schema import UserError
from diffdistill.storage.checkpoint import load_checkpoint
from diffdistill.training.trainer import Trainer

EVAL = "eval={protocol: digits-pixels, every: 2, num_images: 100}"
MANY = ("train.checkpoint_every=1", "train.keep_checkpoints=1")


def steps_of(run: Path) -> list[int | None]:
    return [record.cost.train_steps for record in read_records(run / "eval.jsonl") if record.cost]


def checkpoints(run: Path) -> list[str]:
    return sorted(folder.name for folder in (run / "checkpoints").glob("step-*"))


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """The distance that each step's student is to have; a step without one keeps its own."""
    wanted: dict[int, float] = {}

    def rigged(*args: object, **options: object) -> Evaluation | None:
        done = evaluate(*args, **options)  # type: ignore[arg-type]
        assert done is not None
        step = int(str(options["name"]).split()[-1])
        value = wanted.get(step)
        changed = done.record.metrics | ({} if value is None else {"fd-pixels": Values.of([value])})
        return replace(done, record=replace(done.record, metrics=changed))

    monkeypatch.setattr(watch, "evaluate", rigged)
    return wanted


def test_the_student_is_looked_at_every_so_many_steps_and_at_the_end(make_config: MakeConfig) -> None:
    config = make_config("dmd2", "train.steps=5", EVAL)
    Trainer(config, quiet=True).run()
    run = Path(config.run)
    assert steps_of(run) == [2, 4, 5]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    looked = [line for line in lines if "eval/fd-pixels" in line]
    assert [(line["step"], line["images"]) for line in looked] == [(2, 16), (4, 32), (5, 40)]
    assert set(looked[0]) >= {"seconds", "eval/fd-pixels", "eval/precision", "eval/recall"}
    assert not (run / ".features").exists() or not list((run / ".features").iterdir())


def test_the_records_are_of_the_average_and_carry_their_cost(make_config: MakeConfig) -> None:
    config = make_config("dmd2", "train.steps=2", EVAL)
    done = Trainer(config, quiet=True).run()
    (record,) = read_records(Path(config.run) / "eval.jsonl")
    assert record.model is not None
    assert record.model.source == str(done)
    assert record.model.sha256 == watch.hash_weights(load_model(done).denoiser)
    assert record.cost is not None
    assert (record.cost.train_steps, record.cost.train_images) == (2, 16)
    assert record.cost.train_seconds is not None
    assert record.protocol["num_images"] == 100


def test_looking_changes_no_bit_of_the_training(make_config: MakeConfig) -> None:
    plain, watched = (Trainer(make_config("dmd2", *more), quiet=True).run() for more in ((), (EVAL,)))
    before, after = load_checkpoint(plain).tensors, load_checkpoint(watched).tensors
    for group, tensors in before.items():
        assert all(torch.equal(tensor, after[group][name]) for name, tensor in tensors.items())


def test_the_best_checkpoint_stays_and_a_link_leads_to_it(make_config: MakeConfig, scores: dict[int, float]) -> None:
    scores |= {2: 0.3, 4: 0.1, 6: 0.2, 8: 0.1}
    config = make_config("dmd2", "train.steps=8", EVAL, *MANY)
    Trainer(config, quiet=True).run()
    run = Path(config.run)
    assert checkpoints(run) == ["step-00000004", "step-00000008"]  # of equal ones the first
    assert load_model(run / "checkpoints" / "best").source.resolve().name == "step-00000004"
    assert load_model(run).source.name == "step-00000008"


def test_a_look_that_finds_the_best_saves_it_at_once(make_config: MakeConfig, scores: dict[int, float]) -> None:
    scores |= {2: 0.1, 4: 0.3}
    config = make_config("dmd2", "train.steps=4", EVAL, "train.checkpoint_every=100")
    Trainer(config, quiet=True).run()
    assert checkpoints(Path(config.run)) == ["step-00000002", "step-00000004"]


def test_of_a_share_more_is_better(make_config: MakeConfig, scores: dict[int, float]) -> None:
    scores |= {2: 0.1, 4: 0.3}
    config = make_config("dmd2", "train.steps=4", EVAL, *MANY)
    trainer = Trainer(config, quiet=True)
    trainer.run()
    assert trainer.plan.evaluator.best(4) == "step-00000002"
    (first, second) = read_records(Path(config.run) / "eval.jsonl")
    by_recall = replace(trainer.plan.evaluator, best_by="recall")  # type: ignore[type-var]
    first = replace(first, metrics=first.metrics | {"recall": Values.of([0.1])})
    second = replace(second, metrics=second.metrics | {"recall": Values.of([0.3])})
    assert by_recall._best_step([first, second]) == 4


def test_a_run_that_goes_back_forgets_what_came_after(make_config: MakeConfig, scores: dict[int, float]) -> None:
    scores |= {2: 0.3, 4: 0.1, 5: 0.2}
    config = make_config("dmd2", "train.steps=5", EVAL, "train.checkpoint_every=1", "train.keep_checkpoints=9")
    Trainer(config, quiet=True).run()
    run = Path(config.run)
    assert (run / "checkpoints" / "best").resolve().name == "step-00000004"
    scores |= {4: 0.4, 5: 0.5}
    Trainer(config, quiet=True, resume="step-00000003").run()
    assert steps_of(run) == [2, 4, 5]
    assert (run / "checkpoints" / "best").resolve().name == "step-00000002"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("eval={protocol: nothing}", "protocol 'nothing': unknown"),
        ("eval={best_by: fid}", "eval.best_by = 'fid': digits-pixels measures fd-pixels, precision, recall"),
        ("eval={num_images: 101}", "num_images = 101: is no multiple of 10 classes"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(make_config: MakeConfig, setting: str, said: str) -> None:
    config = make_config("dmd2", setting)
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        Trainer(config, quiet=True)
    assert not Path(config.run).exists()


def test_a_protocol_of_other_images_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    protocol = tmp_path / "mine.yaml"
    metric = "{name: frechet, features: {name: pixels}}"
    reference = "{name: digits-train, dataset: digits, split: train}"
    protocol.write_text(
        f"name: mine\nnum_images: 10\nimage_shape: [3, 32, 32]\nreference: {reference}\n"
        f"metrics: [{metric}]\nlabels: {{policy: cyclic, num_classes: 10}}\n"
    )
    config = make_config("dmd2", f"eval={{protocol: {protocol}}}")
    with pytest.raises(UserError, match="makes 1 x 8 x 8 images; mine is for 3 x 32 x 32"):
        Trainer(config, quiet=True)


def test_a_resumed_run_may_look_otherwise(make_config: MakeConfig) -> None:
    config = make_config("dmd2", "train.steps=2", EVAL)
    Trainer(config, quiet=True).run()
    assert config.eval is not None
    more = replace(config, eval=replace(config.eval, every=1), train=replace(config.train, steps=3))
    Trainer(more, quiet=True, resume=True).run()
    assert steps_of(Path(config.run)) == [2, 3]
