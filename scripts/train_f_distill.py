"""f-distill on digits through the Python API: the same run as `diffdistill train f_distill/digits`.

First make a teacher:  diffdistill pretrain pretrain/digits
"""

from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.time_distributions import Karras, LogNormal
from diffdistill.methods.f_distill import FDistill
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.ema import EMAConfig
from diffdistill.training.trainer import Trainer

noise_levels = Karras(ratio_min=0.03, ratio_max=6.0, rho=5.0)
method = FDistill(
    divergence="js",
    steps=FewSteps(init_ratio=2.5),  # 1 NFE, from noise 2.5 times as strong as the signal
    fake_updates=2,  # the critics follow the generator, two steps to its one
    generator_time_law=noise_levels,
    fake_time_law=LogNormal(mean=-0.6, std=1.2),
    gan_time_law=noise_levels,
    gan_weight=0.15,
    gan_fake_weight=0.1,
    gan_features="teacher",  # those of the fake score pull a longer run away from the teacher
)
config = RunConfig(
    run="runs/digits-f-distill",
    teacher="runs/digits-teacher",
    method=method,
    optimizers={
        "generator": OptimizerConfig(lr=6e-4, decay="linear"),
        "default": OptimizerConfig(lr=1e-3, decay="linear"),
    },
    ema=EMAConfig(halflife_images=4400, ramp=0),
    train=TrainConfig(steps=600, global_batch_size=64, num_threads=1, checkpoint_every=300),
)

if __name__ == "__main__":
    print(Trainer(config).run())
