"""Diversity-rewarded distillation on digits, in Python: the same run as `diffdistill train diversity/digits`.

First make a teacher:  diffdistill pretrain pretrain/digits
"""

from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.time_distributions import Karras, LogNormal
from diffdistill.methods.diversity import Diversity
from diffdistill.methods.sid import SiD
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.ema import EMAConfig
from diffdistill.training.reports.health import HealthConfig
from diffdistill.training.trainer import Trainer

base = SiD(
    alpha=1.0,
    steps=FewSteps(init_ratio=2.5),
    time_law=Karras(ratio_min=0.03, ratio_max=6.0, rho=5.0),
    fake_time_law=LogNormal(mean=-0.6, std=1.2),
)
config = RunConfig(
    run="runs/digits-diversity",
    teacher="runs/digits-teacher",
    method=Diversity(base=base, samples_per_condition=4),  # of the teacher's bottleneck
    optimizers={
        "generator": OptimizerConfig(lr=6e-4, decay="linear"),
        "fake": OptimizerConfig(lr=1e-3, decay="linear"),
    },
    ema=EMAConfig(halflife_images=4400, ramp=0),
    health=HealthConfig(warmup_steps=25),
    train=TrainConfig(steps=600, global_batch_size=64, num_threads=1),
)

if __name__ == "__main__":
    print(Trainer(config).run())
