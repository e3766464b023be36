"""TDM on digits through the Python API: the same run as `diffdistill train tdm/digits`.

First make a teacher:  diffdistill pretrain pretrain/digits
"""

from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.time_distributions import Karras
from diffdistill.methods.tdm import TDM
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.ema import EMAConfig
from diffdistill.training.reports.health import HealthConfig
from diffdistill.training.trainer import Trainer

law = Karras(ratio_min=0.03, ratio_max=20.0, rho=5.0)
method = TDM(
    steps=FewSteps(init_ratio=20.0, init_noise="sigma", later_ratios=(4.0, 1.2, 0.4), later_noise="ddim"),
    time_law=law,  # of each step the levels between its ends
    fake_time_law=law,
)
config = RunConfig(
    run="runs/digits-tdm",
    teacher="runs/digits-teacher",
    method=method,
    optimizers={
        "generator": OptimizerConfig(lr=6e-4, betas=(0.0, 0.999), decay="linear", decay_start=0.5),
        "fake": OptimizerConfig(lr=1e-3, betas=(0.0, 0.999), decay="linear", decay_start=0.5),
    },
    ema=EMAConfig(halflife_images=4400, ramp=0),
    health=HealthConfig(warmup_steps=25),
    train=TrainConfig(steps=500, global_batch_size=64, num_threads=1),
)

if __name__ == "__main__":
    print(Trainer(config).run())
