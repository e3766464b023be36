"""DMD2 on digits through the Python API: the same run as `diffdistill train dmd2/digits`.

First make a teacher:  diffdistill pretrain pretrain/digits
"""

from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.time_distributions import Karras, LogNormal
from diffdistill.methods.dmd2 import DMD2
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.ema import EMAConfig
from diffdistill.training.reports.health import HealthConfig
from diffdistill.training.trainer import Trainer

method = DMD2(
    steps=FewSteps(init_ratio=4.0),  # 1 NFE, from noise 4 times as strong as the signal
    fake_updates=2,  # the fake score follows the generator, two steps to its one
    generator_time_law=Karras(ratio_min=0.03, ratio_max=4.0, rho=5.0),
    fake_time_law=LogNormal(mean=-0.6, std=1.2),
    gan_time_law=Karras(ratio_min=0.03, ratio_max=6.0, rho=5.0),
    gan_weight=0.2,
    gan_fake_weight=0.1,
    gan_features="teacher",  # not the fake score's, as in the paper: docs/what-decides-quality.md
)
config = RunConfig(
    run="runs/digits-dmd2",
    teacher="runs/digits-teacher",
    method=method,
    optimizers={
        "generator": OptimizerConfig(lr=6e-4, decay="linear"),
        "default": OptimizerConfig(lr=1e-3, decay="linear"),
    },
    ema=EMAConfig(halflife_images=4400, ramp=0),
    health=HealthConfig(warmup_steps=25),
    train=TrainConfig(steps=1200, global_batch_size=64, num_threads=1, checkpoint_every=300),
)

if __name__ == "__main__":
    print(Trainer(config).run())
