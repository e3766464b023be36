"""A score field on digits through the Python API: the same run as `diffdistill train score_field/digits`.

First make a teacher:  diffdistill pretrain pretrain/digits
"""

from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.time_distributions import Karras, LogNormal
from diffdistill.methods.score_field import ScoreField
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.ema import EMAConfig
from diffdistill.training.reports.health import HealthConfig
from diffdistill.training.trainer import Trainer

method = ScoreField(
    steps=FewSteps(init_ratio=4.0),
    subtract="fake",  # the law of the generator's images: with nothing else does the teacher's come to rest
    weight="sigma/alpha",  # the plain difference of the two denoisers
    fake_updates=2,
    time_law=Karras(ratio_min=0.03, ratio_max=4.0, rho=5.0),
    fake_time_law=LogNormal(mean=-0.6, std=1.2),
)
config = RunConfig(
    run="runs/digits-score-field",
    teacher="runs/digits-teacher",
    method=method,
    optimizers={
        "generator": OptimizerConfig(lr=6e-4, decay="linear"),
        "default": OptimizerConfig(lr=1e-3, decay="linear"),
    },
    ema=EMAConfig(halflife_images=4400, ramp=0),
    health=HealthConfig(warmup_steps=25),
    train=TrainConfig(steps=1200, global_batch_size=64, num_threads=1, checkpoint_every=300),
)

if __name__ == "__main__":
    print(Trainer(config).run())
