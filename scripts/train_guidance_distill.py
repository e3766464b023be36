"""The w-conditioned student on digits in Python: the same run as `diffdistill train guidance_distill/digits`.

First make a teacher:  diffdistill pretrain pretrain/digits
"""

from diffdistill.diffusion.sampling import Heun
from diffdistill.diffusion.time_distributions import LogNormal
from diffdistill.methods.guidance_distill import GuidanceDistill
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.trainer import Trainer

method = GuidanceDistill(
    steps=Heun(num_steps=18, rho=5.0),
    guidance=(1.0, 4.0),
    width=64,  # of the encoding of w
    time_law=LogNormal(mean=-0.6, std=1.2),
    weight="eps",
)
config = RunConfig(
    run="runs/digits-guidance-distill",
    teacher="runs/digits-teacher",
    method=method,
    optimizers={
        "student": OptimizerConfig(lr=1e-3, betas=(0.9, 0.999), warmup_steps=50, decay="cosine", decay_start=0.0)
    },
    ema=None,
    health=None,
    train=TrainConfig(steps=500, global_batch_size=128, num_threads=1, preview_every=0, checkpoint_every=250),
)

if __name__ == "__main__":
    print(Trainer(config).run())
