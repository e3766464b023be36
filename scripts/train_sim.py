"""SIM on digits through the Python API: the same run as `diffdistill train sim/digits`.

First make a teacher:  diffdistill pretrain pretrain/digits
"""

from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.time_distributions import Karras, LogNormal
from diffdistill.methods.sim import SIM
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.ema import EMAConfig
from diffdistill.training.trainer import Trainer

method = SIM(
    steps=FewSteps(init_ratio=2.5),  # 1 NFE, from noise 2.5 times as strong as the signal
    distance="pseudo_huber",
    time_law=Karras(ratio_min=0.03, ratio_max=6.0, rho=5.0),  # where teacher and fake score are compared
    fake_time_law=LogNormal(mean=-0.6, std=1.2),
)
config = RunConfig(
    run="runs/digits-sim",
    teacher="runs/digits-teacher",
    method=method,
    optimizers={
        "generator": OptimizerConfig(lr=6e-4, decay="linear"),
        "fake": OptimizerConfig(lr=1e-3, decay="linear"),
    },
    ema=EMAConfig(halflife_images=4400, ramp=0),
    train=TrainConfig(steps=500, global_batch_size=64, num_threads=1, checkpoint_every=300),
)

if __name__ == "__main__":
    print(Trainer(config).run())
