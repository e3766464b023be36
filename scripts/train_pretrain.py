"""A digits teacher through the Python API: the same run as `diffdistill pretrain pretrain/digits`.

Then distil it:  python scripts/train_dmd2.py
"""

from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.sampling import Heun
from diffdistill.diffusion.time_distributions import LogNormal
from diffdistill.methods.pretrain import Pretrain
from diffdistill.models.spec import ModelConfig
from diffdistill.networks.unet import UNetConfig
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.ema import EMAConfig
from diffdistill.training.trainer import Trainer

config = RunConfig(
    run="runs/digits-teacher",
    method=Pretrain(
        time_law=LogNormal(mean=-0.6, std=1.2),  # of log(sigma / alpha)
        class_dropout=0.1,  # a tenth of the samples lose their class, so that guidance is possible
        teacher_sampler=Heun(num_steps=18, rho=5.0),
    ),
    model=ModelConfig(
        network=UNetConfig(channels=(16, 48), attention=(False, True), head_channels=48),
        path=EDM(sigma_min=0.02, sigma_max=20.0),
        predicts="edm",
        sigma_data=0.75,  # of digits in [-1, 1]
    ),
    optimizers={"teacher": OptimizerConfig(lr=2e-3, betas=(0.9, 0.99), warmup_steps=50, decay="linear")},
    ema=EMAConfig(halflife_images=44_000, ramp=0.05),
    train=TrainConfig(steps=1050, global_batch_size=128, num_threads=1, checkpoint_every=350),
)

if __name__ == "__main__":
    print(Trainer(config).run())
