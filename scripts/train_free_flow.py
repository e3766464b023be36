"""FreeFlow on digits through the Python API: the same run as `diffdistill train free_flow/digits`.

First make a teacher:  diffdistill pretrain pretrain/digits
"""

from diffdistill.diffusion.time_distributions import Karras, LogNormal, UShaped
from diffdistill.methods.free_flow import FreeFlow
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.ema import EMAConfig
from diffdistill.training.trainer import Trainer

method = FreeFlow(
    prediction_time_law=UShaped(a=0.1),  # nearly even
    normaliser="nu",
    time_law=Karras(ratio_min=0.03, ratio_max=6.0, rho=5.0),
    fake_time_law=LogNormal(mean=-0.6, std=1.2),
)
config = RunConfig(
    run="runs/digits-free-flow",
    teacher="runs/digits-teacher",
    method=method,
    optimizers={
        "generator": OptimizerConfig(lr=1e-3, betas=(0.9, 0.99), decay="linear", decay_start=0.5),
        "default": OptimizerConfig(lr=1e-3, decay="linear", decay_start=0.5),
    },
    ema=EMAConfig(halflife_images=2200, ramp=0),
    train=TrainConfig(steps=370, global_batch_size=64, num_threads=1, checkpoint_every=200),
)

if __name__ == "__main__":
    print(Trainer(config).run())
