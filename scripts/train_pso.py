"""PSO on digits through the Python API: the same run as `diffdistill train pso/digits`.

First make a teacher and a student:  diffdistill pretrain pretrain/digits;  diffdistill train dmd2/digits
"""

from diffdistill.diffusion.sampling import FewSteps
from diffdistill.methods.pso import PSO
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.ema import EMAConfig
from diffdistill.training.trainer import Trainer

config = RunConfig(
    run="runs/digits-pso",
    teacher="runs/digits-teacher",
    init="runs/digits-dmd2",  # the student, and the reference that it is held to
    method=PSO(steps=FewSteps(init_ratio=4.0), winners="reward", reward="contrast"),
    optimizers={"generator": OptimizerConfig(lr=1e-4, betas=(0.9, 0.999))},
    ema=EMAConfig(halflife_images=2500, ramp=0),
    health=None,
    train=TrainConfig(steps=200, global_batch_size=64, num_threads=1),
)

if __name__ == "__main__":
    print(Trainer(config).run())
