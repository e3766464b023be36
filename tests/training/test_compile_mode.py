"""`speed.compile_mode`: it reaches torch's compiler, steps are marked for CUDA graphs, what cannot go is refused."""

import shutil
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from torch import Tensor, nn

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM
from diffdistill.networks import MLPConfig
from diffdistill.settings.schema import UserError
from diffdistill.training.speed.options import CompileMode, SpeedConfig, apply_speed
from diffdistill.training.trainer import Trainer

ROUNDING = 1e-5  # of the largest number: kernels that are made of several operations add in another order
GRAPHS: tuple[CompileMode, ...] = ("reduce-overhead", "max-autotune")
MODES: tuple[CompileMode, ...] = ("default", *GRAPHS)


def small_denoiser() -> Denoiser:
    """Of random weights, so that every part matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Denoiser(MLPConfig(width=16, blocks=2).build((1, 4, 4), 3, 0.1), EDM(), "edm")
        for parameter in made.parameters():
            nn.init.normal_(parameter, 0, 0.2)
    return made


@pytest.mark.parametrize("mode", MODES)
def test_the_mode_reaches_torch_s_compiler(monkeypatch: pytest.MonkeyPatch, mode: CompileMode) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: asked.append(options))
    apply_speed(SpeedConfig(compile="inductor", compile_mode=mode), {"generator": small_denoiser()}, {})
    assert asked == [{"backend": "inductor", "mode": mode}]


@pytest.mark.parametrize("mode", GRAPHS)
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_a_mode_of_another_backend_is_refused(backend: Any, mode: CompileMode) -> None:
    with pytest.raises(UserError, match=rf"speed.compile_mode = '{mode}': inductor's alone, and speed.compile is"):
        apply_speed(SpeedConfig(compile=backend, compile_mode=mode), {"generator": small_denoiser()}, {})


@pytest.mark.parametrize("mode", MODES)
def test_graphs_of_a_network_whose_prompts_are_cut_are_refused(
    monkeypatch: pytest.MonkeyPatch, mode: CompileMode
) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: None)
    player = small_denoiser()
    player.net.cuts_text = True
    speed = SpeedConfig(compile="inductor", compile_mode=mode)
    if mode == "default":  # which makes no CUDA graph, and compiles for each shape
        apply_speed(speed, {}, {"teacher": player})
        return
    with pytest.raises(UserError, match=r"teacher's network MLP cuts its prompts to the longest of a batch.*default$"):
        apply_speed(speed, {}, {"teacher": player})


@pytest.mark.parametrize("mode", MODES)
def test_a_step_of_graphs_is_marked_once(
    monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig, mode: CompileMode
) -> None:
    """All calls of one step keep their results: of the teacher's two the second would write over the first's."""
    marks: list[int] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: None)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    settings = ("speed.compile=inductor", f"speed.compile_mode={mode}", "train.micro_batch_size=4")
    trainer = Trainer(make_config("dmd2", *settings), quiet=True)
    trainer.train_step()
    trainer.train_step()
    assert len(marks) == (0 if mode == "default" else 2)


def numbers_after_two_steps(trainer: Trainer) -> dict[str, Tensor]:
    trainer.train_step()
    trainer.train_step()
    return {f"{p}.{n}": t.clone() for p, player in trainer.trained.items() for n, t in player.state_dict().items()}


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES)
def test_a_run_of_each_mode_is_the_uncompiled_one_within_rounding(make_config: MakeConfig, mode: CompileMode) -> None:
    """With SGD, which hands on a difference as it is; Adam would divide it by as small a gradient."""
    if shutil.which("g++") is None:
        pytest.skip("inductor compiles by g++ here")
    sgd = [f"optimizers.{name}.name=sgd" for name in ("generator", "default")]
    expected = numbers_after_two_steps(Trainer(make_config("dmd2", *sgd), quiet=True))
    compiled = (f"speed.compile_mode={mode}", "speed.compile=inductor")
    found = numbers_after_two_steps(Trainer(make_config("dmd2", *sgd, *compiled), quiet=True))
    size = max(float(t.abs().max()) for t in expected.values())
    assert max(float((found[name] - t).abs().max()) for name, t in expected.items()) <= ROUNDING * size
