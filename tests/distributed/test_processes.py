"""Several processes train as one: the same weights, one set of files, and one decision wherever one is to be taken."""

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from conftest import MakeConfig
from equal import WAYS, apart, measure
from support.fleet import run_together
from torch import Tensor, nn

from diffdistill.distillation.method import Batch, Draw, Loss, Players, Update
from diffdistill.distributed.processes import Processes, find_processes, others
from diffdistill.distributed.stopping import StopRequested, TrainingError
from diffdistill.eval.evaluation.workers import find_workers
from diffdistill.eval.records.record import read_records
from diffdistill.methods.pretrain import Pretrain
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import dump_yaml
from diffdistill.storage.checkpoint import list_checkpoints, load_checkpoint
from diffdistill.training.config import RunConfig
from diffdistill.training.objective import Objective, Replicas
from diffdistill.training.plan import check_batch
from diffdistill.training.reports.log import Log, Silence
from diffdistill.training.trainer import Trainer

ROUNDING = 1e-5  # of the largest weight, after some steps of Adam in float32


def run_on(count: int, config: RunConfig, *, resume: bool = False) -> None:
    run_together(count, lambda: Trainer(config, resume=resume, quiet=True).run())


def last_tensors(config: RunConfig) -> dict[str, Tensor]:
    last = load_checkpoint(list_checkpoints(Path(config.run) / "checkpoints")[-1])
    return {f"{group}.{name}": t for group, tensors in last.tensors.items() for name, t in tensors.items()}


def distance(first: RunConfig, second: RunConfig) -> float:
    """Between the ends of two runs, optimisers' states included, relative to the largest number."""
    one, other = last_tensors(first), last_tensors(second)
    assert one.keys() == other.keys()
    return apart({n: t.numpy() for n, t in one.items()}, {n: t.numpy() for n, t in other.items()})


LONG = [pytest.param(name, marks=pytest.mark.full) for name in ("score_field", "forget", "diversity", "merge_teachers")]


@pytest.mark.parametrize("name", ["f_distill", "sid (SiDA)", *LONG])  # the first have statistics of the whole batch
def test_two_and_four_processes_train_as_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick_teacher: Path, name: str
) -> None:
    monkeypatch.setattr("equal.STEPS", 6)
    for label in ("Adam, float64", "Adam, float64, sharded"):
        way = WAYS[label]
        assert max(measure(name, way, tmp_path / label, quick_teacher).values()) <= way.tolerance


def test_every_process_measures_one_law_of_labels(make_config: MakeConfig) -> None:
    """DDK's gaps are of the weights and the step alone: two processes have one law, and train as one."""
    alone, two = (make_config("ddk", "train.steps=4", "method.every=1", "method.samples=20") for _ in range(2))
    Trainer(alone, quiet=True).run()

    def run() -> None:
        trainer = Trainer(two, quiet=True)
        trainer.run()
        shares = trainer.players.label_law.shares
        first, second = trainer.processes.gather(shares).chunk(2)
        assert torch.equal(first, second)
        assert len(set(shares.tolist())) > 1  # it has moved

    run_together(2, run)
    assert distance(alone, two) <= ROUNDING


def test_dropout_is_the_same_on_two_processes_where_the_pieces_are(make_config: MakeConfig) -> None:
    network = "model.network={name: unet, channels: [8, 16], dropout: 0.2}"
    alone, two, without = (
        make_config("pretrain", network, "train.micro_batch_size=4", *more)
        for more in ((), (), ("model.network.dropout=0",))
    )
    Trainer(alone, quiet=True).run(), Trainer(without, quiet=True).run()
    run_on(2, two)
    assert distance(alone, two) <= ROUNDING
    assert distance(alone, without) > 10 * ROUNDING


def test_a_run_goes_on_with_another_number_of_processes(make_config: MakeConfig) -> None:
    whole, moved = make_config("dmd2", "train.steps=8"), make_config("dmd2", "train.steps=2")
    Trainer(whole, quiet=True).run()
    Trainer(moved, quiet=True).run()
    for steps, count in ((4, 2), (6, 4), (8, 1)):
        run_on(count, make_config("dmd2", f"train.steps={steps}", f"run={moved.run}"), resume=True)
    assert distance(whole, moved) <= ROUNDING
    reports = [json.loads(line) for line in (Path(moved.run) / "metrics.jsonl").read_text().splitlines()]
    assert [report["step"] for report in reports] == list(range(1, 9))


def test_what_is_reported_is_the_mean_over_all_processes(make_config: MakeConfig) -> None:
    configs = [make_config("dmd2") for _ in range(2)]
    Trainer(configs[0], quiet=True).run()
    run_on(2, configs[1])
    one, two = (
        [json.loads(line) for line in (Path(config.run) / "metrics.jsonl").read_text().splitlines()]
        for config in configs
    )
    assert [report["step"] for report in two] == [1, 2, 3, 4]
    for first, second in zip(one, two, strict=True):
        numbers = [name for name in first if name.startswith(("generator/", "fake/"))]
        assert {name: second[name] for name in numbers} == pytest.approx({n: first[n] for n in numbers}, rel=1e-4)


def test_the_processes_share_the_evaluation_of_the_student(make_config: MakeConfig) -> None:
    overrides = ("train.steps=2", "eval={protocol: digits-pixels, every: 1, num_images: 600}")
    configs = [make_config("dmd2", *overrides) for _ in range(2)]
    Trainer(configs[0], quiet=True).run()
    run_on(2, configs[1])
    one, two = (read_records(Path(config.run) / "eval.jsonl") for config in configs)
    assert [record.environment.num_processes for record in two] == [2, 2]
    for first, second in zip(one, two, strict=True):
        assert second.metrics["fd-pixels"].values == pytest.approx(first.metrics["fd-pixels"].values, rel=1e-3)
    best = [(Path(config.run) / "checkpoints" / "best").resolve().name for config in configs]
    assert best[0] == best[1]


def stopped_by_one(config: RunConfig, rank: int, step: int) -> tuple[str, int]:
    """Receive a signal in one process alone, during one iteration."""
    train_step = Trainer.train_step

    def interrupted(self: Trainer, log: Log | None = None) -> None:
        train_step(self, log)
        if self.step == step and self.processes.rank == rank:
            signal.raise_signal(signal.SIGTERM)

    Trainer.train_step = interrupted  # type: ignore[method-assign]  # in this process, which ends with the test
    with pytest.raises(StopRequested) as stopped:
        Trainer(config, quiet=True).run()
    return str(stopped.value), stopped.value.exit_code


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_all_at_one_step_with_all_saved(make_config: MakeConfig, rank: int) -> None:
    whole, config = make_config("dmd2"), make_config("dmd2")
    ends = run_together(2, lambda: stopped_by_one(config, rank, 3))
    assert {code for _, code in ends} == {143}
    assert all("stopped by SIGTERM at step 3; saved" in message for message, _ in ends)
    run_on(2, config, resume=True)
    run_on(2, whole)
    assert distance(whole, config) == 0


class Told(Silence):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def poisoned(config: RunConfig, rank: int, factor: float) -> tuple[bool, dict[str, int], list[str]]:
    """One step with a loss that is not finite in one process. Whether the player stayed as it was, what was said."""
    loss, log = Pretrain.teacher_loss, Told()

    def bad(self: Pretrain, players: Players, draw: Draw, batch: Batch) -> Loss:
        made = loss(self, players, draw, batch)
        return Loss(made.total * factor, made.logs, made.carry)

    trainer = Trainer(config, quiet=True)
    if trainer.processes.rank == rank:
        Pretrain.teacher_loss = bad  # type: ignore[method-assign]  # in this process, which ends with the test
    before = [p.detach().clone() for p in trainer.trained["teacher"].parameters()]
    trainer.train_step(log)
    after = trainer.trained["teacher"].parameters()
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), trainer.nonfinite.skips, log.lines


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_in_one_process_is_skipped_by_all(make_config: MakeConfig, factor: float) -> None:
    config = make_config("pretrain")
    for is_same, skips, said in run_together(2, lambda: poisoned(config, 1, factor)):
        assert is_same
        assert skips == {"teacher_loss": 1}
        assert said[0].startswith(f"step 0, player teacher: teacher_loss (total = {factor})")
        assert said[0].endswith("is not finite in process 1; this update is skipped")


def averaged(*, micro_batches: int) -> list[list[float] | None]:
    """Gradients that both, one, and none of two processes have, after some micro-batches."""
    processes = find_processes("cpu")
    player = nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in range(3)])
    update = Update(("player",), "loss")
    averaging = Replicas(processes, (update,), {"player": player})

    def loss() -> Loss:
        total = (player[0] * torch.tensor([1.0, 2.0]) * (1 + processes.rank)).sum()
        return Loss(total + (player[1] * torch.tensor([5.0, 7.0])).sum() if processes.rank == 1 else total)

    for number in range(1, micro_batches + 1):
        with averaging.of(update, is_last=number == micro_batches) as ask:
            ask(loss).total.backward()
    return [None if p.grad is None else p.grad.tolist() for p in player]


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradients_are_means_and_one_that_a_process_lacks_counts_as_zero_there(micro_batches: int) -> None:
    n = float(micro_batches)
    expected = [[1.5 * n, 3.0 * n], [2.5 * n, 3.5 * n], None]
    assert run_together(2, partial(averaged, micro_batches=micro_batches)) == [expected] * 2


def test_what_is_replicated_is_on_one_device() -> None:
    """torch refuses a module that is on two."""
    objective = Objective([nn.Linear(2, 2, device="meta")])
    assert {parameter.device.type for parameter in objective.parameters()} == {"meta"}


def test_what_is_no_fault_of_another_process_is_raised_as_it_is() -> None:
    def fault() -> str:
        find_processes("cpu")
        with pytest.raises(RuntimeError) as raised, others():
            raise RuntimeError("a connection of layers that do not fit")
        return type(raised.value).__name__

    assert run_together(2, fault) == ["RuntimeError", "RuntimeError"]
    with pytest.raises(RuntimeError, match=r"^gloo$"), others():
        raise RuntimeError("gloo")


def test_processes_speak_once_an_update(make_config: MakeConfig) -> None:
    """Micro-batches add up in each process; only the last one's backward pass sends."""

    configs = {size: make_config("pretrain", f"train.micro_batch_size={size}") for size in (1, 4)}

    def sent(micro_batch: int) -> int:
        trainer = Trainer(configs[micro_batch], quiet=True)
        (objective,) = trainer.assembly.averaging._wrapped.values()  # type: ignore[attr-defined]
        seen: list[int] = []

        def count(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            seen.append(bucket.index())
            return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

        objective.register_comm_hook(None, count)
        trainer.train_step()
        return len(seen)

    assert run_together(2, lambda: sent(4)) == run_together(2, lambda: sent(1)) == [1, 1]


def test_the_others_begin_with_the_weights_of_the_first() -> None:
    def begun() -> float:
        processes = find_processes("cpu")
        layer = nn.Linear(1, 1)
        nn.init.constant_(layer.weight, float(processes.rank))
        processes.begin_equal([layer])
        return float(layer.weight)

    assert run_together(2, begun) == [0.0, 0.0]


def begin_apart(config: RunConfig) -> str:
    """Go on where the second process sees an older list of files than the first."""
    with pytest.MonkeyPatch.context() as patched:
        if os.environ["RANK"] == "1":
            patched.setattr("diffdistill.training.resume.list_checkpoints", lambda folder: list_checkpoints(folder)[:1])
        with pytest.raises(UserError) as raised:
            Trainer(config, resume=True, quiet=True)
    return str(raised.value)


def test_processes_that_would_go_on_from_different_checkpoints_are_refused(make_config: MakeConfig) -> None:
    config = make_config("pretrain", "train.steps=2", "train.checkpoint_every=1")
    Trainer(config, quiet=True).run()
    first, second = run_together(2, lambda: begin_apart(config))
    said = "--resume: the processes see different checkpoints; the newest for this one is"
    assert re.fullmatch(rf"{said} step-00000002 \([0-9a-f]{{8}}\)", first)
    assert re.fullmatch(rf"{said} step-00000001 \([0-9a-f]{{8}}\)", second)


def failed_first(config: RunConfig) -> tuple[str, str]:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(
        "diffdistill.training.trainer.save_checkpoint", full
    )  # in this process, which ends with the test
    trainer = Trainer(config, quiet=True)
    with pytest.raises((OSError, TrainingError)) as raised:
        trainer.run()
    return type(raised.value).__name__, str(raised.value)


def test_where_the_first_process_cannot_save_the_others_stop_as_well(make_config: MakeConfig) -> None:
    config = make_config("pretrain", "train.steps=1")
    (first, why), (second, told) = run_together(2, lambda: failed_first(config))
    assert (first, second) == ("OSError", "TrainingError")
    assert "No space left" in why
    assert told == "the main process failed; see its message"


def test_a_batch_that_cannot_be_shared_out_is_refused(make_config: MakeConfig) -> None:
    train = make_config("pretrain").train  # 8 images
    check_batch(train, 4)
    with pytest.raises(UserError, match="must be a multiple of the 3 processes"):
        check_batch(train, 3)
    in_threes = make_config("pretrain", "train.micro_batch_size=3", "train.global_batch_size=12").train
    check_batch(in_threes, 4)
    with pytest.raises(UserError, match=r"= 12, 4 in each of 3 processes: must be a multiple of .*size = 3"):
        check_batch(in_threes, 3)


def test_one_process_alone_tells_nobody_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("there is nobody")

    for name in ("all_reduce", "all_gather", "broadcast"):
        monkeypatch.setattr(torch.distributed, name, never)
    alone, values = Processes(torch.device("cpu")), torch.ones(2)
    update = Update(("player",), "loss")
    with Replicas(alone, (update,), {"player": nn.Linear(1, 1)}).of(update, is_last=True) as ask:
        assert ask(lambda: Loss(values.sum())).total == 2
    alone.begin_equal([nn.Linear(1, 1)])
    alone.wait()
    done: list[int] = []
    alone.on_main_first(partial(done.append, 1))
    assert done == [1]
    assert (alone.gather(values) is values, alone.largest(3), alone.ranks_where(True), alone.ranks_where(False)) == (
        True,
        3,
        [0],
        [],
    )
    assert alone.means({"a": 2.0}) == {"a": 2.0}


@pytest.mark.parametrize("find", [find_processes, find_workers])
def test_an_environment_that_is_no_launcher_s_is_one_line(
    monkeypatch: pytest.MonkeyPatch, find: Callable[[], object]
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    AcceleratorState._reset_state(True)
    with pytest.raises(TrainingError, match=r"the processes cannot connect: .*MASTER_ADDR"):
        find()
    AcceleratorState._reset_state(True)


COUNTED = """
import atexit
from pathlib import Path

def count() -> None:
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    print("threads of groups:", names.count("pt_gloo_runloop"), flush=True)

atexit.register(count)  # the first that is registered is the last that is called
from diffdistill.__main__ import main
main()
"""


def launch(config: RunConfig, file: Path, *options: str, count: int = 2) -> "subprocess.CompletedProcess[str]":
    """`torchrun` with the command line, as users start it; in the end it says which threads of groups are left."""
    file.write_text(dump_yaml(config))
    script = file.with_name("counted.py")
    script.write_text(COUNTED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [*launcher, str(script), "train", str(file), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize("shard", ["none", "all"])
def test_the_command_line_trains_under_a_launcher(make_config: MakeConfig, tmp_path: Path, shard: str) -> None:
    """A thread of a group that outlives the interpreter aborts the process, once in ten starts on a busy machine."""
    alone, two = make_config("sim"), make_config("sim", f"speed.shard={shard}")
    Trainer(alone, quiet=True).run()
    done = launch(two, tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("threads of groups: 0") == 2, done.stdout
    assert done.stdout.count("done: ") == 1
    assert distance(alone, two) <= ROUNDING
