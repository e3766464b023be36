"""RF++ on digits through the Python API: the same run as `diffdistill train rectified_flow/digits`.

First make a teacher:  diffdistill pretrain pretrain/digits
"""

from diffdistill.diffusion.sampling import FewSteps, Heun
from diffdistill.methods.rectified_flow import RectifiedFlow
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.ema import EMAConfig
from diffdistill.training.trainer import Trainer

method = RectifiedFlow(
    steps=FewSteps(init_ratio=20.0, init_noise="sigma", later_noise="fixed"),
    pairs=4000,  # of noise and what the teacher's ODE makes of it, before training
    pair_sampler=Heun(num_steps=18, rho=5.0),
)
config = RunConfig(
    run="runs/digits-rectified-flow",
    teacher="runs/digits-teacher",
    method=method,
    optimizers={
        "generator": OptimizerConfig(lr=1.5e-3, betas=(0.9, 0.99), warmup_steps=50, decay="linear", decay_start=0.5)
    },
    ema=EMAConfig(halflife_images=4400, ramp=0),
    train=TrainConfig(steps=600, global_batch_size=128, num_threads=1),
)

if __name__ == "__main__":
    print(Trainer(config).run())
