"""Under a launcher that restarts, a killed process costs the steps since the last checkpoint, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig
from fault_injection import end_of

from diffdistill.settings.values import dump_yaml
from diffdistill.storage.checkpoint import list_checkpoints

DYING = """
import os, signal, sys
from pathlib import Path
import torch
from diffdistill.commands import cli
from diffdistill.training import trainer

torch.set_num_threads(1)
step = trainer.Trainer.train_step

def dying_step(self, log=None):
    killed = Path(os.environ["KILLED"])
    if self.step == 7 and self.processes.rank == 1 and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, log)

trainer.Trainer.train_step = dying_step
cli.main()
"""
"""The command line; the second process kills itself, once, before the eighth step."""


LATE = """
import os, pathlib, signal, time
from diffdistill.distributed import meeting
from diffdistill.distributed.processes import find_processes

folder, rank, start = pathlib.Path(os.environ["FOLDER"]), os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
wait = meeting._wait_for_all

def timed(limit):
    if (start, rank) == ("0", "1"):
        os.kill(os.getpid(), signal.SIGKILL)
    if (start, rank) == ("1", "0"):
        time.sleep(2)
    began = time.monotonic()
    store = wait(limit)
    (folder / rank).write_text(f"{time.monotonic() - began}")
    return store

meeting._wait_for_all = timed
assert find_processes("cpu").largest(int(rank)) == 1
(folder / f"{rank}.met").touch()
"""
"""A process of two: the second dies before they meet, and the first then comes late."""


@pytest.mark.full
def test_processes_that_torchrun_starts_again_wait_for_each_other_and_not_for_the_dead(tmp_path: Path) -> None:
    program = tmp_path / "late.py"
    program.write_text(LATE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    environment = os.environ | {"FOLDER": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(program)], capture_output=True, text=True, check=False, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / f"{rank}.met").exists() for rank in range(2))
    assert float((tmp_path / "1").read_text()) > 1


@pytest.mark.full
def test_a_killed_process_is_replaced_and_the_run_ends_as_an_undisturbed_one(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    program = tmp_path / "dying.py"
    program.write_text(DYING)
    ends = []
    for name in ("undisturbed", "disturbed"):
        run, killed, file = tmp_path / name, tmp_path / f"killed-{name}", tmp_path / f"{name}.yaml"
        if name == "undisturbed":
            killed.touch()
        config = make_config("dmd2", f"run={run}", "train.steps=10", "train.checkpoint_every=3", "trackers=[]")
        file.write_text(dump_yaml(config))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [*launcher, "--max-restarts=2", str(program), "train", str(file), "--resume"]
        environment = os.environ | {
            **{"KILLED": str(killed), "OMP_NUM_THREADS": "1"},
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else torchrun hands out addresses of the dead
        }
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=900)
        assert done.returncode == 0, done.stderr
        assert killed.exists()
        assert list_checkpoints(run / "checkpoints")[-1].name == "step-00000010"
        ends.append(end_of(run))
    assert [name for name, tensor in ends[0].items() if not torch.equal(tensor, ends[1][name])] == []
