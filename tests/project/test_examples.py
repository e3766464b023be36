"""The examples run: splats learn through their renderer, and an image is protected within its ball."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.closed_forms import random
from torch import Tensor

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.path import VPCosine
from diffdistill.inference.draw import sample_images
from diffdistill.models.load import load_model
from diffdistill.networks import NETWORKS
from diffdistill.networks.analytic import gaussian_denoiser
from diffdistill.training.trainer import Trainer

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    """A module of the folder."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example of splats, whose network is registered for one test."""
    for table in ("_registered", "_found"):
        monkeypatch.setattr(NETWORKS, table, dict(getattr(NETWORKS, table)))
    return example("splats")


def test_splats_learn_through_their_renderer(scene: ModuleType, quick_teacher: Path, tmp_path: Path) -> None:
    config = scene.config
    train = replace(config.train, steps=3, global_batch_size=4, preview_every=100)
    trainer = Trainer(replace(config, run=str(tmp_path / "run"), teacher=str(quick_teacher), train=train), quiet=True)
    splats = trainer.trained["generator"].net
    before = {name: value.detach().clone() for name, value in splats.named_parameters()}
    trainer.run()
    assert set(before) == {"place", "size", "colour"}
    assert all(not torch.equal(value, before[name]) for name, value in splats.named_parameters())
    assert sample_images(load_model(tmp_path / "run"), count=2).isfinite().all()


def test_a_splat_is_drawn_where_the_camera_sees_it(scene: ModuleType) -> None:
    splats = scene.SplatsConfig(splats=1).build((1, 9, 9), 2, 0.0)
    splats.place.data[1], splats.colour.data[1] = torch.tensor([0.5, -0.5]), 1.0
    noise = torch.zeros(1, 1, 9, 9)
    noise[..., 8, 8] = 1  # of no weight for the camera, which stands still then
    image = splats(noise, torch.zeros(1), Cond(label=torch.tensor([1])))[0, 0].detach()
    assert divmod(int(image.argmax()), 9) == (6, 2)
    assert float(image.max()) == pytest.approx(0)


# Diff-Protect

PROTECT = example("protect_image")
ENCODER = random(4, 6, seed=3)
CENTRE = random(4, seed=4)


def slopes(covariance: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """SDS's gradient by the image, and that of half of |eps_hat - eps|^2 through the denoiser too; eps is zero."""
    teacher, t = gaussian_denoiser(VPCosine(), CENTRE, covariance), torch.full((1,), 0.2, dtype=torch.float64)
    eps = torch.zeros(1, 4, dtype=torch.float64)
    found = PROTECT.slope(x, lambda image: image @ ENCODER.T, teacher, t, eps)
    image = x.clone().requires_grad_()
    x_t = teacher.path.diffuse(image @ ENCODER.T, eps, t)
    error = 0.5 * (teacher.convert(teacher(x_t, t, NO_COND), "eps", x_t, t) - eps).square().sum()
    return found, torch.autograd.grad(error, image)[0]


def test_the_cheap_gradient_has_the_full_one_s_direction_on_isotropic_gaussians_alone() -> None:  # F1
    x = random(1, 6, seed=5)
    cheap, full = slopes(0.5 * torch.eye(4, dtype=torch.float64), x)
    torch.testing.assert_close(cheap / cheap.norm(), full / full.norm(), rtol=1e-9, atol=1e-12)
    basis = torch.linalg.qr(random(4, 4, seed=6))[0]
    spread = torch.tensor([0.01, 0.1, 1, 20], dtype=torch.float64)
    cheap, full = slopes(basis @ torch.diag(spread) @ basis.T, x)
    assert 0 < float((cheap * full).sum() / (cheap.norm() * full.norm())) < 0.99


def test_a_protected_image_stays_in_its_ball_and_goes_down_the_field_or_up() -> None:
    teacher = gaussian_denoiser(VPCosine(), CENTRE, 0.5 * torch.eye(4, dtype=torch.float64))
    image = 0.4 * random(1, 6, seed=5)

    def distance(x: Tensor) -> float:
        return float((x @ ENCODER.T - CENTRE).norm())

    made = {
        sign: PROTECT.protect(image, lambda x: x @ ENCODER.T, teacher, num_steps=40, direction=sign)
        for sign in (-1.0, 1.0)
    }
    for protected in made.values():
        assert float((protected - image).abs().max()) <= PROTECT.protect.__kwdefaults__["radius"] + 1e-12
    assert distance(made[-1.0]) < distance(image) < distance(made[1.0])
