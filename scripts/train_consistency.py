"""Consistency distillation (iCD) on digits through the Python API: the same run as `train consistency/digits`.

First make a teacher:  diffdistill pretrain pretrain/digits
"""

from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.time_distributions import LogNormal
from diffdistill.distillation.curricula import Doubling
from diffdistill.methods.consistency import Consistency
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.ema import EMAConfig
from diffdistill.training.trainer import Trainer

method = Consistency(
    steps=FewSteps(init_ratio=20.0, init_noise="sigma"),
    time_law=LogNormal(mean=-0.2, std=1.6),
    curriculum=Doubling(first=10, last=160),  # intervals between the levels of a pair, doubled four times in the run
)
config = RunConfig(
    run="runs/digits-consistency",
    teacher="runs/digits-teacher",
    method=method,
    optimizers={
        "generator": OptimizerConfig(name="radam", lr=1e-3, betas=(0.9, 0.99), decay="linear", decay_start=0.5)
    },
    ema=EMAConfig(halflife_images=4400, ramp=0),
    health=None,
    train=TrainConfig(steps=900, global_batch_size=64, num_threads=1),
)

if __name__ == "__main__":
    print(Trainer(config).run())
