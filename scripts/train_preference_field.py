"""The preference field on digits through the Python API: the same run as `train preference_field/digits`.

First make a teacher and a student:  diffdistill pretrain pretrain/digits;  diffdistill train dmd2/digits
"""

from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.time_distributions import Karras, LogNormal
from diffdistill.methods.preference_field import PreferenceField
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.ema import EMAConfig
from diffdistill.training.reports.health import HealthConfig
from diffdistill.training.trainer import Trainer

method = PreferenceField(
    steps=FewSteps(init_ratio=4.0),
    reward="contrast",
    strength=0.2,  # of the pull to the winners; 0 is dmd2
    fake_updates=2,
    time_law=Karras(ratio_min=0.03, ratio_max=4.0, rho=5.0),
    fake_time_law=LogNormal(mean=-0.6, std=1.2),
)
config = RunConfig(
    run="runs/digits-preference-field",
    teacher="runs/digits-teacher",
    init="runs/digits-dmd2",
    method=method,
    optimizers={
        "generator": OptimizerConfig(lr=3e-4, decay="linear"),
        "default": OptimizerConfig(lr=6e-4, decay="linear"),
    },
    ema=EMAConfig(halflife_images=4400, ramp=0),
    health=HealthConfig(warmup_steps=25),
    train=TrainConfig(steps=400, global_batch_size=64, num_threads=1),
)

if __name__ == "__main__":
    print(Trainer(config).run())
