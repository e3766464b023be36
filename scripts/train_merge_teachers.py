"""One student of two teachers on digits in Python: the same run as `diffdistill train merge_teachers/digits`.

First make a teacher:  diffdistill pretrain pretrain/digits
"""

from diffdistill.diffusion.sampling import Heun
from diffdistill.diffusion.time_distributions import LogNormal
from diffdistill.methods.merge_teachers import MergeTeachers
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.trainer import Trainer

method = MergeTeachers(
    steps=Heun(num_steps=18, rho=5.0),
    width=32,  # of a style's vector
    time_law=LogNormal(mean=-0.6, std=1.2),
    weight="edm",
    feature_weight=0.002,
    feature_taps=(0, 1, 2, 3, 4, 5),  # blocks whose outputs the student matches, too
)
config = RunConfig(
    run="runs/digits-merged",
    teacher="runs/digits-teacher",
    teachers={"early": "runs/digits-teacher/checkpoints/step-00000350", "late": "runs/digits-teacher"},
    method=method,
    optimizers={
        "student": OptimizerConfig(lr=1e-3, betas=(0.9, 0.99), warmup_steps=50, decay="cosine", decay_start=0.0)
    },
    ema=None,
    health=None,
    train=TrainConfig(steps=500, global_batch_size=128, num_threads=1, preview_every=0, checkpoint_every=250),
)

if __name__ == "__main__":
    print(Trainer(config).run())
