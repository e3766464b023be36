"""pi-Flow on digits through the Python API: the same run as `diffdistill train pi_flow/digits`.

First make a teacher:  diffdistill pretrain pretrain/digits
"""

from diffdistill.diffusion.dx_policy import DXPolicy
from diffdistill.methods.pi_flow import PiFlow
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.ema import EMAConfig
from diffdistill.training.reports.health import HealthConfig
from diffdistill.training.trainer import Trainer

method = PiFlow(
    steps=DXPolicy(num_steps=1, substeps=64),
    places=8,
    window=0,
    states=4,
    mixing_steps=500,  # first the teacher's way, then the policy's own
)
config = RunConfig(
    run="runs/digits-pi-flow",
    teacher="runs/digits-teacher",
    method=method,
    optimizers={"default": OptimizerConfig(lr=1e-3, betas=(0.9, 0.99), clip_norm=2, decay="linear", decay_start=0.3)},
    ema=EMAConfig(halflife_images=2200, ramp=0),
    health=HealthConfig(warmup_steps=25),
    train=TrainConfig(steps=650, global_batch_size=64, num_threads=1),
)

if __name__ == "__main__":
    print(Trainer(config).run())
