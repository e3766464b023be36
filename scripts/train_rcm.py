"""rCM on digits through the Python API: the same run as `diffdistill train rcm/digits`.

First make a teacher:  diffdistill pretrain pretrain/digits
"""

from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.time_distributions import Karras, LogNormal
from diffdistill.methods.rcm import RCM
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.ema import EMAConfig
from diffdistill.training.trainer import Trainer

method = RCM(
    steps=FewSteps(init_ratio=8.0, init_noise="sigma"),
    levels=None,
    consistency_time_law=LogNormal(mean=-0.2, std=1.6),
    tangent_constant=5.0,
    warmup=100,  # iterations until the student is matched as well
    matching_weight=0.1,
    time_law=Karras(ratio_min=0.03, ratio_max=6.0, rho=5.0),
    fake_time_law=LogNormal(mean=-0.6, std=1.2),
    fake_updates=1,
)
config = RunConfig(
    run="runs/digits-rcm",
    teacher="runs/digits-teacher",
    method=method,
    optimizers={
        "generator": OptimizerConfig(lr=7e-4, betas=(0.9, 0.99), decay="linear", decay_start=0.1),
        "default": OptimizerConfig(lr=1e-3, decay="linear", decay_start=0.1),
    },
    ema=EMAConfig(halflife_images=2200, ramp=0),
    train=TrainConfig(steps=370, global_batch_size=64, num_threads=1, checkpoint_every=300),
)

if __name__ == "__main__":
    print(Trainer(config).run())
