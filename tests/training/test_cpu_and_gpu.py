"""The same run on the CPU and on a GPU: the same random integers, and weights that differ by rounding."""

from collections.abc import Callable

import pytest
import torch

from diffdistill.diffusion.step_random import StepRandom
from diffdistill.training.config import RunConfig
from diffdistill.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

BOUND = 1e-3  # of the largest weight, after a few steps of Adam, whose first ones are as large as the rate allows


def test_random_numbers_are_the_same() -> None:
    index = torch.arange(1000)
    for name in ("label", "t"):
        on_cpu = StepRandom(3, 7, index).uniforms([name])[name]
        assert torch.equal(on_cpu, StepRandom(3, 7, index.cuda()).uniforms([name])[name].cpu())


@pytest.mark.parametrize("method", ["dmd2", "sid", "sim", "scm", "regression"])
def test_a_run_is_the_same_up_to_rounding(make_config: MakeConfig, method: str) -> None:
    ends = []
    for device in ("cpu", "auto"):
        trainer = Trainer(make_config(method, f"train.device={device}"), quiet=True)
        for _ in range(3):
            trainer.train_step()
        ends.append({name: value.cpu() for name, value in trainer.players.generator.state_dict().items()})
        assert trainer.device.type == ("cpu" if device == "cpu" else "cuda")
    on_cpu, on_gpu = ends
    assert on_cpu.keys() == on_gpu.keys()
    for name, value in on_cpu.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, on_gpu[name], rtol=0, atol=BOUND * float(value.abs().max()))
        else:
            assert torch.equal(value, on_gpu[name]), name
