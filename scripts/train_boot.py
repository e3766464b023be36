"""BOOT on digits through the Python API: the same run as `diffdistill train boot/digits`.

First make a teacher:  diffdistill pretrain pretrain/digits
"""

from diffdistill.diffusion.time_distributions import Karras
from diffdistill.methods.boot import Boot
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.ema import EMAConfig
from diffdistill.training.trainer import Trainer

method = Boot(
    time_law=Karras(ratio_min=0.02, ratio_max=20.0, rho=7.0),  # the teacher's own range of noise, from end to end
    delta=0.1,  # ten steps from noise to image
)
config = RunConfig(
    run="runs/digits-boot",
    teacher="runs/digits-teacher",
    method=method,
    optimizers={"generator": OptimizerConfig(lr=1e-3, betas=(0.9, 0.99), decay="linear")},
    ema=EMAConfig(halflife_images=4400, ramp=0),
    train=TrainConfig(steps=540, global_batch_size=64, num_threads=1, checkpoint_every=200),
)

if __name__ == "__main__":
    print(Trainer(config).run())
