"""What the Trainer costs: its DMD2 step against the same step in a bare loop, interleaved in one run.

python scripts/bench_training_step.py [--rounds 8] [--steps 10] [--out bench.json]

The bare loop has the same networks, losses, fused optimisers and EMA, and torch.randn for its noise; it has no counted
draws, clipping, non-finite guard, logging or signals. Peak memory is of one process each.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peak import peak_bytes

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.step_random import integer_of
from diffdistill.distillation.method import Batch
from diffdistill.training.config import find_config, load_config
from diffdistill.training.trainer import Trainer


def make_trainer(folder: Path) -> Trainer:
    """A DMD2 run on digits from an untrained teacher: speed does not depend on the weights."""
    quick = ["train.steps=1", "train.preview_every=0"]
    if not (folder / "teacher").exists():
        Trainer(load_config(find_config("pretrain/digits"), [f"run={folder}/teacher", *quick]), quiet=True).run()
    settings = [f"run={folder}/student", f"teacher={folder}/teacher", "train.steps=1000000", "train.preview_every=0"]
    return Trainer(load_config(find_config("dmd2/digits"), settings), quiet=True)


class BareLoop:
    """The step that one would write by hand around the method's losses."""

    def __init__(self, trainer: Trainer) -> None:
        source, self.device = trainer.plan.source, trainer.device
        self.method, self.players = trainer.method, trainer.players
        self.images = source.rows(torch.arange(len(source))).to(self.device)
        self.labels = source.labels.to(self.device)
        self.is_half = trainer.config.train.precision == "bf16"
        self.optimizers = {
            name: torch.optim.Adam(module.parameters(), lr=1e-4, betas=(0.0, 0.999), fused=True)
            for name, module in trainer.trained.items()
        }
        self.average = [p.detach().clone() for p in trainer.players.generator.parameters()]
        self.problem, self.batch, self.step = trainer.problem, trainer.config.train.global_batch_size, 0

    def train_step(self) -> None:
        """One iteration of DMD2."""
        draw = self.draw()
        rows = torch.randint(len(self.images), (self.batch,), device=self.device)
        batch = Batch(self.images[rows], Cond(label=self.labels[rows]))
        for update in self.method.updates:
            if self.step % update.every:
                continue
            for name in self.optimizers:
                self.players[name].requires_grad_(name in update.players)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_half):
                loss = getattr(self.method, update.loss)(self.players, draw, batch)
            loss.total.backward()
            draw |= loss.carry
            for name in update.players:
                self.optimizers[name].step()
                self.optimizers[name].zero_grad()
            if "generator" in update.players:
                torch._foreach_lerp_(self.average, [p.data for p in self.players.generator.parameters()], 0.01)
        self.step += 1

    def draw(self) -> dict[str, torch.Tensor]:
        """The method's random numbers from torch's own generator."""
        method, path, batch = self.method, self.problem.path, self.batch
        laws = {"": method.generator_time_law, "fake ": method.fake_time_law}
        laws |= dict.fromkeys(("gan ", "gan real ", "gan fake "), method.gan_time_law)
        times = {f"{call}t": law(self.uniform(), path) for call, law in laws.items()}
        shape, noises = self.problem.image_shape, ("z", *(f"{call}eps" for call in laws))
        noise = {name: torch.randn(batch, *shape, device=self.device) for name in noises}
        label = integer_of(self.uniform(), self.problem.num_classes)
        return {**times, **noise, "label": label, "step": torch.tensor(0)}

    def uniform(self) -> torch.Tensor:
        return torch.rand(self.batch, dtype=torch.float64, device=self.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak-of", choices=["trainer", "bare"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder))
        loops = {"trainer": trainer, "bare": BareLoop(make_trainer(Path(folder)))}
        if options.peak_of:
            for _ in range(options.steps):
                loops[options.peak_of].train_step()
            print(peak_bytes())
            return
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        for round_number in range(options.rounds + 1):  # the first round warms up
            for name, loop in loops.items():
                start = time.perf_counter()
                for _ in range(options.steps):
                    loop.train_step()
                if round_number:
                    seconds[name].append((time.perf_counter() - start) / options.steps)
    ratios = [t / b for t, b in zip(seconds["trainer"], seconds["bare"], strict=True)]
    result = {
        "its_per_second": {name: 1 / statistics.median(values) for name, values in seconds.items()},
        "time_ratio_trainer_over_bare": {"median": statistics.median(ratios), "all": ratios},
        "peak_bytes": {name: peak(name, options.steps) for name in loops},
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def peak(name: str, steps: int) -> int:
    """Peak resident bytes of a process of its own."""
    command = [sys.executable, __file__, "--peak-of", name, "--steps", str(steps)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


if __name__ == "__main__":
    main()
