"""The rules by which two estimates become one: closed forms, diffusers' own arithmetic, and who uses them."""

from collections.abc import Callable

import pytest
import torch
from diffusers import QwenImagePipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.guidance.policies import AdaptiveGuidance, CFGPlusPlus, Guided, Interval
from diffdistill.diffusion.guidance_rules import LINEAR, GuidanceRule, Renormalised, Rescaled
from diffdistill.diffusion.path import Flow, Path, Prediction, VPCosine
from diffdistill.diffusion.router import RoutedDenoiser
from diffdistill.diffusion.sampling import DDIM, TCD, FewSteps, Heun, OneCall, Sampler
from diffdistill.networks.unet import UNetConfig
from diffdistill.settings.schema import UserError

RULES = [Renormalised(), Renormalised(over="row"), Renormalised(over="patch"), Rescaled(share=0.7)]
LABEL = Cond(label=torch.tensor([0, 2]))


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 4, 8, 8)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def denoiser(rule: GuidanceRule, path: Path | None = None, predicts: Prediction = "eps", seed: int = 0) -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Denoiser(UNetConfig(channels=(8, 8)).build((1, 8, 8), 3, 0.1), path or VPCosine(), predicts)
        for parameter in made.parameters():  # networks start with an output of zero
            torch.nn.init.normal_(parameter, std=0.2)
    made.run_with(guidance_rule=rule)
    return made.requires_grad_(False).double().eval()


def packed(x: Tensor) -> Tensor:
    return QwenImagePipeline._pack_latents(x, *x.shape)


def along_rows(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(("over", "seen"), [("row", along_rows), ("patch", packed)])
def test_renormalised_is_as_the_pipelines_of_lumina_and_qwen_image(over: str, seen: Callable[[Tensor], Tensor]) -> None:
    without, with_cond, w = noise(0), noise(1), 3.5
    c, mixed = seen(with_cond), seen(without + w * (with_cond - without))
    expected = mixed * (torch.norm(c, dim=-1, keepdim=True) / torch.norm(mixed, dim=-1, keepdim=True))
    found = seen(Renormalised(over=over)(without, with_cond, w))  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_renormalised_may_shrink_alone_as_the_pipeline_of_longcat_image() -> None:
    without, with_cond, w = 3 * noise(0), noise(1), 0.8
    c, mixed = packed(with_cond), packed(without + w * (with_cond - without))
    ratio = torch.norm(c, dim=-1, keepdim=True) / torch.norm(mixed, dim=-1, keepdim=True)
    assert bool((ratio > 1).any())
    assert bool((ratio < 1).any())
    found = packed(Renormalised(over="patch", only_shrinks=True)(without, with_cond, w))
    torch.testing.assert_close(found, mixed * ratio.clamp(max=1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("w", [0.3, 2.0, -1.0])
def test_renormalised_keeps_the_direction_and_takes_the_norm(w: float) -> None:
    without, with_cond = noise(0), noise(1)
    found, linear = (rule(without, with_cond, w).flatten(1) for rule in (Renormalised(), LINEAR))
    torch.testing.assert_close(found.norm(dim=1), with_cond.flatten(1).norm(dim=1))
    torch.testing.assert_close(torch.cosine_similarity(found, linear), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_rescaled_is_diffusers_own(share: float) -> None:
    without, with_cond = noise(0), noise(1)
    linear = LINEAR(without, with_cond, 5.0)
    found = Rescaled(share=share)(without, with_cond, 5.0)
    torch.testing.assert_close(found, rescale_noise_cfg(linear, with_cond, share), atol=1e-12, rtol=0)
    if share == 0:
        assert torch.equal(found, linear)
    if share == 1:
        torch.testing.assert_close(found.flatten(1).std(1), with_cond.flatten(1).std(1))


@pytest.mark.parametrize("rule", [LINEAR, *RULES])
def test_at_one_every_rule_is_the_conditional_estimate_and_zeros_stay_finite(rule: GuidanceRule) -> None:
    without, with_cond = noise(0), noise(1)
    torch.testing.assert_close(rule(without, with_cond, torch.ones(2, 1, 1, 1)), with_cond)
    zero = torch.zeros(2, 4, 8, 8)
    assert torch.equal(rule(zero, zero, 2.0), zero)


def test_patches_need_even_sides() -> None:
    with pytest.raises(ValueError, match=r"even sides, not of \[2, 4, 7, 8\]"):
        Renormalised(over="patch")(noise(0, 2, 4, 7, 8), noise(1, 2, 4, 7, 8), 2.0)


@pytest.mark.parametrize(("path", "predicts"), [(VPCosine(), "eps"), (VPCosine(), "v"), (Flow(), "flow")])
@pytest.mark.parametrize("rule", RULES)
def test_a_denoiser_combines_what_its_network_said(path: Path, predicts: Prediction, rule: GuidanceRule) -> None:
    net, x, t = denoiser(rule, path, predicts), noise(0, 2, 1, 8, 8), torch.full((2,), 0.5, dtype=torch.float64)
    said = [net.net(x, path.time_input(t), Cond(label=label)) for label in (torch.tensor([3, 3]), LABEL.label)]
    scales = torch.tensor([2.0, 4.0], dtype=torch.float64)
    expected = path.to_x0(rule(*said, scales.reshape(2, 1, 1, 1)), predicts, x, t)
    torch.testing.assert_close(net(x, t, LABEL, guidance=scales), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_the_numbers_one_and_zero_ask_for_one_estimate(rule: GuidanceRule) -> None:
    x, t = noise(0, 2, 1, 8, 8), torch.full((2,), 0.5)
    for w in (0.0, 1.0):
        assert torch.equal(*(denoiser(r)(x, t, LABEL, guidance=w) for r in (rule, LINEAR)))


class ByHand:
    """Guidance by 3 under a rule, without asking the denoiser for any."""

    def __init__(self, rule: GuidanceRule) -> None:
        self.rule = rule

    def begin(self, denoiser: Denoiser, cond: Cond) -> Guided:
        path = denoiser.path

        def estimate(x: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
            null = denoiser.unconditional(cond)
            both = (path.from_x0(denoiser(x, t, c), "eps", x, t) for c in (null, cond))
            return path.to_x0(self.rule(*both, 3.0), "eps", x, t)

        return estimate


SAMPLERS = [Heun(num_steps=3), DDIM(num_steps=3), FewSteps(later_ratios=(1.0,)), TCD(num_steps=2), OneCall()]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
def test_every_sampler_follows_the_model_s_rule(sampler: Sampler) -> None:
    start = noise(0, 2, 1, 8, 8)
    linear, ruled, by_hand = (
        sampler(denoiser(rule), start, LABEL, guidance=guidance, fresh_noise=lambda i: noise(9 + i, 2, 1, 8, 8))
        for rule, guidance in ((LINEAR, 3.0), (Rescaled(), 3.0), (LINEAR, ByHand(Rescaled())))
    )
    torch.testing.assert_close(ruled, by_hand, atol=1e-8, rtol=1e-7)
    assert not torch.allclose(ruled, linear, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", [LINEAR, Renormalised()])
def test_policies_follow_it(rule: GuidanceRule) -> None:
    start, ddim = noise(0, 2, 1, 8, 8), DDIM(num_steps=3)
    plain = ddim(denoiser(rule), start, LABEL, guidance=3.0)
    everywhere = Interval(scale=3.0, ratio_low=0.0, ratio_high=1e9)
    for policy in (everywhere, AdaptiveGuidance(scale=3.0, threshold=2.0)):
        torch.testing.assert_close(ddim(denoiser(rule), start, LABEL, guidance=policy), plain, atol=1e-9, rtol=1e-9)


def test_cfg_plus_plus_is_of_the_linear_rule_alone() -> None:
    with pytest.raises(UserError, match=r"cfg\+\+ is for linearly guided models"):
        CFGPlusPlus(scale=0.6).begin(denoiser(Rescaled()), LABEL)


def test_students_behind_a_router_are_guided_by_their_rule() -> None:
    students = [denoiser(Renormalised(), seed=0), denoiser(Renormalised(), seed=0)]
    routed = RoutedDenoiser(students, lambda cond: torch.tensor([0, 1]))
    x, t = noise(0, 2, 1, 8, 8), torch.full((2,), 0.5)
    expected = students[0](x, t, LABEL, guidance=3.0)
    torch.testing.assert_close(routed(x, t, LABEL, guidance=3.0), expected)
