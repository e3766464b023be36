"""DisBack on digits through the Python API: the same run as `diffdistill train disback/digits`.

First make a teacher:  diffdistill pretrain pretrain/digits
"""

from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.time_distributions import Karras, LogNormal
from diffdistill.methods.disback import DisBack
from diffdistill.methods.dmd2 import DMD2
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.ema import EMAConfig
from diffdistill.training.trainer import Trainer

base = DMD2(  # how the student is distilled from each target
    steps=FewSteps(init_ratio=4.0),
    fake_updates=2,
    generator_time_law=Karras(ratio_min=0.03, ratio_max=4.0, rho=5.0),
    fake_time_law=LogNormal(mean=-0.6, std=1.2),
    gan_time_law=Karras(ratio_min=0.03, ratio_max=6.0, rho=5.0),
    gan_weight=0.2,
    gan_fake_weight=0.1,
    gan_features="teacher",
)
method = DisBack(
    base=base,
    path_length=3,  # scores recorded between the teacher's and the untrained student's
    recording_interval=20,
    recording_lr=1e-3,
    recording_time_law=LogNormal(mean=-0.6, std=1.2),
    backtracking_interval=30,  # generator updates against each of them, the most degraded first
)
rates = {name: OptimizerConfig(lr=lr, decay="linear") for name, lr in (("generator", 6e-4), ("default", 1e-3))}
train = TrainConfig(steps=560, global_batch_size=64, num_threads=1, checkpoint_every=300)
ema = EMAConfig(halflife_images=4400, ramp=0)
places = {"run": "runs/digits-disback", "teacher": "runs/digits-teacher"}
config = RunConfig(**places, method=method, optimizers=rates, ema=ema, train=train)

if __name__ == "__main__":
    print(Trainer(config).run())
