"""AGD on digits through the Python API: the same run as `diffdistill train agd/digits`.

First make a teacher:  diffdistill pretrain pretrain/digits
Then sample it with:  diffdistill sample runs/digits-agd --guidance 3
"""

from diffdistill.diffusion.sampling import Heun
from diffdistill.methods.agd import AGD
from diffdistill.networks.adapters import AdapterConfig
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.trainer import Trainer

method = AGD(
    adapter=AdapterConfig(kind="cross_attention", width=128, heads=32, placement="all", proportional=True),
    steps=Heun(num_steps=18, rho=5.0),  # of the stored trajectories, and of the student
    guidance=(1.0, 3.25),  # each trajectory has a scale of its own
    trajectories=1200,
    weight="end_points",
)
config = RunConfig(
    run="runs/digits-agd",
    teacher="runs/digits-teacher",
    method=method,
    optimizers={
        "adapted": OptimizerConfig(
            name="adamw", lr=4e-3, betas=(0.9, 0.999), warmup_steps=50, decay="cosine", decay_start=0.0
        )
    },
    ema=None,
    health=None,
    train=TrainConfig(steps=1600, global_batch_size=64, num_threads=1, preview_every=0, checkpoint_every=800),
)

if __name__ == "__main__":
    print(Trainer(config).run())
