"""Regression on pairs, on digits, through the Python API: the same run as `diffdistill train regression/digits`.

First make a teacher:  diffdistill pretrain pretrain/digits
"""

from diffdistill.diffusion.sampling import FewSteps, Heun
from diffdistill.methods.regression import Regression
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.ema import EMAConfig
from diffdistill.training.trainer import Trainer

method = Regression(
    steps=FewSteps(init_ratio=20.0),  # where the teacher's ODE begins, too
    pairs=4000,
    pair_sampler=Heun(num_steps=18, rho=5),  # 35 evaluations a pair
)
config = RunConfig(
    run="runs/digits-regression",
    teacher="runs/digits-teacher",
    method=method,
    optimizers={"generator": OptimizerConfig(lr=1.5e-3, betas=(0.9, 0.99), warmup_steps=50, decay="linear")},
    ema=EMAConfig(halflife_images=4400, ramp=0),
    train=TrainConfig(steps=600, global_batch_size=128, num_threads=1, checkpoint_every=300),
)

if __name__ == "__main__":
    print(Trainer(config).run())
