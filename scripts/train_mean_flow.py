"""MeanFlow on digits through the Python API: the same run as `diffdistill train mean_flow/digits`.

First make a teacher:  diffdistill pretrain pretrain/digits
"""

from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.time_distributions import LogNormal
from diffdistill.methods.mean_flow import MeanFlow
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.ema import EMAConfig
from diffdistill.training.trainer import Trainer

method = MeanFlow(
    steps=FewSteps(init_ratio=20.0, init_noise="sigma"),
    time_law=LogNormal(mean=0.0, std=1.4),
    share_equal=0.25,  # the teacher knows r = t already
    power=0,
)
config = RunConfig(
    run="runs/digits-mean-flow",
    teacher="runs/digits-teacher",
    method=method,
    optimizers={"default": OptimizerConfig(lr=1.5e-3, betas=(0.9, 0.99), decay="linear", decay_start=0.5)},
    ema=EMAConfig(halflife_images=1100, ramp=0),
    health=None,
    train=TrainConfig(steps=900, global_batch_size=32, num_threads=1),
)

if __name__ == "__main__":
    print(Trainer(config).run())
