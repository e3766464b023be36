"""MSD on digits through the Python API: `diffdistill train msd/digits --sweep student_index=0,1`, then `join`.

First make a teacher:  diffdistill pretrain pretrain/digits
"""

from dataclasses import replace

from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.time_distributions import Karras, LogNormal
from diffdistill.distillation.partition import KMeans
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.msd import MSD
from diffdistill.models.load import join_students
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.ema import EMAConfig
from diffdistill.training.trainer import Trainer

base = DMD2(  # how each student is distilled
    steps=FewSteps(init_ratio=4.0),
    fake_updates=2,
    generator_time_law=Karras(ratio_min=0.03, ratio_max=4.0, rho=5.0),
    fake_time_law=LogNormal(mean=-0.6, std=1.2),
    gan_time_law=Karras(ratio_min=0.03, ratio_max=6.0, rho=5.0),
    gan_weight=0.2,
    gan_fake_weight=0.1,
)
method = MSD(base=base, num_students=2, student_index=0, partition=KMeans())
rates = {name: OptimizerConfig(lr=lr, decay="linear") for name, lr in (("generator", 6e-4), ("default", 1e-3))}
train = TrainConfig(steps=500, global_batch_size=64, num_threads=1, checkpoint_every=250)
ema = EMAConfig(halflife_images=4400, ramp=0)
places = {"run": "runs/digits-msd", "teacher": "runs/digits-teacher"}
config = RunConfig(**places, method=method, optimizers=rates, ema=ema, train=train)

if __name__ == "__main__":  # one after another here; in processes of their own they run side by side
    students = [replace(config, run=f"{config.run}/{k}", method=replace(method, student_index=k)) for k in range(2)]
    print(join_students("runs/digits-msd", [Trainer(student).run() for student in students]))
