"""Hyper-SD on digits through the Python API: the same run as `diffdistill train hyper_sd/digits`.

First make a teacher:  diffdistill pretrain pretrain/digits
"""

from diffdistill.diffusion.sampling import DDIM, TCD
from diffdistill.diffusion.time_distributions import Karras, LogNormal
from diffdistill.distillation.segments import Stage
from diffdistill.methods.hyper_sd import HyperSD
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.ema import EMAConfig
from diffdistill.training.trainer import Trainer

method = HyperSD(
    stages=(
        Stage(segments=4, num_steps=270),  # along the teacher's own DDIM
        Stage(segments=2, num_steps=100, grid_steps=4),  # along the jumps of the stage before
        Stage(segments=1, num_steps=100, grid_steps=2),
        Stage(segments=1, grid_steps=2, score_weight=1.0),  # score distillation of the one step
    ),
    steps=TCD(num_steps=1, grid=DDIM(num_steps=16, spacing="karras")),
    ends="fixed",
    score_time_law=Karras(ratio_min=0.03, ratio_max=6.0, rho=5.0),
    fake_time_law=LogNormal(mean=-0.6, std=1.2),
)
config = RunConfig(
    run="runs/digits-hyper-sd",
    teacher="runs/digits-teacher",
    method=method,
    optimizers={"default": OptimizerConfig(lr=1e-3, betas=(0.0, 0.99), decay="linear")},
    ema=EMAConfig(halflife_images=4400, ramp=0),
    train=TrainConfig(steps=670, global_batch_size=64, num_threads=1, checkpoint_every=250),
)

if __name__ == "__main__":
    print(Trainer(config).run())
