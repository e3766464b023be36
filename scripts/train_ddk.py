"""DDK on digits through the Python API: the same run as `diffdistill train ddk/digits`.

First make a teacher:  diffdistill pretrain pretrain/digits
"""

from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.time_distributions import Karras, LogNormal
from diffdistill.methods.ddk import DDK
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
    run="runs/digits-ddk",
    teacher="runs/digits-teacher",
    method=DDK(base=base, floor=0.2),  # classes further from the teacher are drawn more often
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
