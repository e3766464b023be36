"""A few steps of a trainer, and its weights."""

from torch import Tensor

from diffdistill.training.config import RunConfig
from diffdistill.training.trainer import Trainer

ACCUMULATION = 1e-6  # float32's rounding, of sums taken in another order


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {
        f"{player}.{name}": value.clone()
        for player, module in trainer.trained.items()
        for name, value in module.state_dict().items()
    }


def trained(config: RunConfig, steps: int) -> Trainer:
    trainer = Trainer(config)
    for _ in range(steps):
        trainer.train_step()
    return trainer
