"""Under a launcher that restarts, a killed process costs the steps since the last checkpoint, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accidents import end_of
from conftest import MakeConfig

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
