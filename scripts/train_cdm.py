"""CDM on digits through the Python API: the same run as `diffdistill train cdm/digits`.

First make a teacher:  diffdistill pretrain pretrain/digits
"""

from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.time_distributions import Karras, LogNormal
from diffdistill.distillation.decoupled import Decoupled
from diffdistill.distillation.levels import DrawnLevels
from diffdistill.methods.cdm import CDM
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.ema import EMAConfig
from diffdistill.training.trainer import Trainer

noise_levels = Karras(ratio_min=0.03, ratio_max=6.0, rho=5.0)
of_steps = Karras(ratio_min=0.1, ratio_max=15.0, rho=5.0)
method = CDM(
    steps=FewSteps(
        init_ratio=20.0, later_ratios=(4.0, 1.2, 0.4), later_noise="ddim"
    ),  # what the student makes images by
    levels=DrawnLevels(num_steps=(1, 6), time_law=of_steps),  # what it is trained on
    guidance=1.5,
    decoupled=Decoupled(time_law=noise_levels),  # guidance at cleaner noise than the step's input
    time_law=noise_levels,
    fake_time_law=LogNormal(mean=-0.6, std=1.2),
    off_trajectory_law=of_steps,
    fake_follows=0.002,
)
config = RunConfig(
    run="runs/digits-cdm",
    teacher="runs/digits-teacher",
    method=method,
    optimizers={name: OptimizerConfig(lr=lr, decay="linear") for name, lr in (("generator", 6e-4), ("default", 1e-3))},
    ema=EMAConfig(halflife_images=4400, ramp=0),
    train=TrainConfig(steps=500, global_batch_size=64, checkpoint_every=300, num_threads=1),
)

if __name__ == "__main__":
    print(Trainer(config).run())
