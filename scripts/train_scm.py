"""sCM on digits through the Python API: the same run as `diffdistill train scm/digits`.

First make a teacher:  diffdistill pretrain pretrain/digits
"""

from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.time_distributions import LogNormal
from diffdistill.methods.scm import SCM
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.ema import EMAConfig
from diffdistill.training.trainer import Trainer

method = SCM(
    steps=FewSteps(init_ratio=20.0, init_noise="sigma"),
    time_law=LogNormal(mean=-0.6, std=1.6),
    tangent="clip",
    warmup=50,  # iterations until f is asked to be constant along the teacher's trajectory
    adaptive_weight=False,
)
config = RunConfig(
    run="runs/digits-scm",
    teacher="runs/digits-teacher",
    method=method,
    optimizers={"default": OptimizerConfig(lr=6e-4, betas=(0.9, 0.99), decay="linear", decay_start=0.1)},
    ema=EMAConfig(halflife_images=2200, ramp=0),
    health=None,
    train=TrainConfig(steps=640, global_batch_size=64, num_threads=1),
)

if __name__ == "__main__":
    print(Trainer(config).run())
