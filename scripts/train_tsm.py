"""Teacher score matching on digits through the Python API: the same run as `diffdistill train tsm/digits`.

First make a teacher:  diffdistill pretrain pretrain/digits
"""

from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.sampling import Heun
from diffdistill.diffusion.time_distributions import LogNormal
from diffdistill.methods.tsm import TSM
from diffdistill.models.spec import ModelConfig
from diffdistill.networks.unet import UNetConfig
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.ema import EMAConfig
from diffdistill.training.trainer import Trainer

model = ModelConfig(  # a third of the teacher's size
    network=UNetConfig(channels=(8, 24), attention=(False, True), head_channels=24),
    path=EDM(sigma_min=0.02, sigma_max=20),
    sigma_data=0.75,
)
config = RunConfig(
    run="runs/digits-small",
    teacher="runs/digits-teacher",
    method=TSM(time_law=LogNormal(mean=-0.6, std=1.2), student_sampler=Heun(num_steps=18, rho=5)),
    model=model,
    optimizers={"student": OptimizerConfig(lr=2e-3, betas=(0.9, 0.99), warmup_steps=50, decay="linear")},
    ema=EMAConfig(halflife_images=44_000, ramp=0.05),
    train=TrainConfig(steps=600, global_batch_size=128, num_threads=1, checkpoint_every=300),
)

if __name__ == "__main__":
    print(Trainer(config).run())
