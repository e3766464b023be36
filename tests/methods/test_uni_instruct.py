"""Uni-Instruct: exact gradients of eight divergences on two families, SiD as special cases, clamps, who is reached."""

from collections.abc import Callable

import pytest
import torch
from conftest import MakeConfig
from support.closed_forms import generator_gradient, mixture_on_the_line, normal_nodes, numbers, pairs
from support.ring import INIT_RATIO, NUM_MODES, TIME_LAW, train_ring
from support.short_runs import ACCUMULATION, trained, weights
from support.tiny_players import PATH, scene
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.time_distributions import KarrasIndex
from diffdistill.distillation.divergences import SLOPES, WEIGHTS, Divergence
from diffdistill.distillation.losses import gan_generator_loss
from diffdistill.distillation.method import Problem
from diffdistill.distillation.score_distillation import SampleWeight, start_players
from diffdistill.methods.sid import SiD
from diffdistill.methods.uni_instruct import UniInstruct
from diffdistill.settings.schema import UserError, schema
from diffdistill.training.trainer import Trainer

DIVERGENCES: dict[Divergence, Callable[[Tensor], Tensor]] = {
    "rkl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "sf": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
    "sh": lambda r: 1 - r.sqrt(),
    "jf": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: (1 - r) ** 2 / r,
    "pearson": lambda r: (r - 1) ** 2,
}
every_divergence = pytest.mark.parametrize("name", DIVERGENCES)


@every_divergence
def test_the_slope_is_the_weight_s_by_the_logarithm_of_the_ratio(name: Divergence) -> None:
    r = numbers(0.2, 1.0, 3.1).requires_grad_()
    h = WEIGHTS[name](r)
    (first,) = torch.autograd.grad(h.sum() + 0 * r.sum(), r)
    torch.testing.assert_close(SLOPES[name](r).detach(), (r * first / h).detach(), rtol=1e-12, atol=0)


# The gradient of a divergence of the images themselves


class Family:
    """A teacher's law and the generator shift + scale y, y of `latent`; laws on the line (shares, means, variances).

    Nodes over (y, eps, ln sigma), so that an integral over the levels is a sum as well.
    """

    def __init__(self, teacher: tuple, latent: tuple, shift: float, scale: float, levels: int = 60) -> None:
        self.teacher, self.latent, self.shift, self.scale = teacher, latent, shift, scale
        nodes, node_weights = normal_nodes(24)
        shares, means, variances = latent
        y = torch.cat([m + v**0.5 * nodes for m, v in zip(means, variances, strict=True)])
        y_weights = torch.cat([share * node_weights for share in shares])
        y, eps, of_pair = pairs((y, y_weights), (nodes, node_weights))
        log_sigma = torch.linspace(-5.5, 5.5, levels, dtype=torch.float64)
        step = float(log_sigma[1] - log_sigma[0])
        self.z, self.eps = (value.repeat(levels)[:, None] for value in (y, eps))
        self.t = log_sigma.exp().repeat_interleave(len(y))
        self.weights = of_pair.repeat(levels) * step

    def law(self, shift: float, scale: float) -> tuple:
        shares, means, variances = self.latent
        return shares, tuple(shift + scale * m for m in means), tuple(scale**2 * v for v in variances)

    def exact(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """The gradient of E_q f(p/q) at no noise, by (shift, scale), on a grid, by autograd."""
        grid = torch.linspace(-12, 12, 8001, dtype=torch.float64)
        shift, scale = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (self.shift, self.scale))

        def log_density(law: tuple) -> Tensor:
            parts = [
                torch.as_tensor(w).log() - (grid - m) ** 2 / (2 * v) - 0.5 * (2 * torch.pi * torch.as_tensor(v)).log()
                for w, m, v in zip(*law, strict=True)
            ]
            return torch.stack(parts).logsumexp(0)

        q = log_density(self.law(shift, scale))  # type: ignore[arg-type]
        divergence = torch.trapezoid(q.exp() * f((log_density(self.teacher) - q).exp()), grid)
        return torch.stack(torch.autograd.grad(divergence, (shift, scale)))

    def gradient(self, name: Divergence, *, is_stopped: bool = False) -> Tensor:
        """The method's own, from exact scores and the exact ratio, times what it leaves out: 2 and the mean of h."""
        teacher, fake = (mixture_on_the_line(*law) for law in (self.teacher, self.law(self.shift, self.scale)))
        judge = LogRatio(teacher.net, fake.net, is_stopped)
        fake.net.features = lambda x, time_input, cond: torch.cat([x, EDM().time_of_input(time_input)[:, None]], 1)
        method = UniInstruct(
            divergence=name,
            steps=FewSteps(init_noise="unit"),
            gan_weight=0.0,
            ratio_bins=0,
            ratio_min=1e-12,
            ratio_max=1e12,
            weight="snr",  # `exact` for levels even in ln sigma, whose step the weights of the nodes hold
        )
        found = generator_gradient(
            method, self, self.shift, self.scale, fake=fake, teacher=teacher, discriminator=judge
        )
        x_t = self.shift + self.scale * self.z + self.t[:, None] * self.eps
        h = WEIGHTS[name](judge(torch.cat([x_t, self.t[:, None]], 1)).clamp(-10, 10).exp())
        return 2 * h.mean() * found


class LogRatio(nn.Module):
    """The best discriminator at every level.  is_stopped: without its gradient by x_t."""

    def __init__(self, teacher: nn.Module, fake: nn.Module, is_stopped: bool) -> None:
        super().__init__()
        self.laws, self.is_stopped = (teacher, fake), is_stopped

    def forward(self, features: Tensor) -> Tensor:
        x_t, t = features[:, :1], features[:, 1].detach()
        p, q = (law.log_prob(x_t.detach() if self.is_stopped else x_t, t, NO_COND) for law in self.laws)
        return p - q


GAUSSIAN = ((1.0,), (0.0,), (1.0,))
FAMILIES = {
    "Gaussians": (((1.0,), (0.3,), (0.75**2,)), GAUSSIAN, -0.1, 0.8),
    "mixtures": (((0.3, 0.7), (-0.6, 0.5), (0.4, 0.5)), ((0.6, 0.4), (-0.4, 0.5), (0.4, 0.35)), 0.05, 1.05),
}


@pytest.mark.parametrize("family", FAMILIES)
@every_divergence
def test_the_gradient_is_that_of_the_divergence_of_the_images_themselves(name: Divergence, family: str) -> None:
    at = Family(*FAMILIES[family])
    expected = at.exact(DIVERGENCES[name])
    # The levels end at exp(-5.5) and exp(5.5): their squares are what is left out.
    torch.testing.assert_close(at.gradient(name), expected, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["kl", "js", "jf", "pearson"])
def test_a_ratio_without_its_gradient_is_wrong_in_the_width(name: Divergence) -> None:
    at = Family(*FAMILIES["Gaussians"])
    error = (at.gradient(name, is_stopped=True) - at.exact(DIVERGENCES[name])).abs()
    assert error[1] > 0.1 * at.exact(DIVERGENCES[name])[1].abs()


# SiD's own settings


def both(method: UniInstruct, alpha: float) -> tuple[list[Tensor], list[Tensor]]:
    """Loss and gradients of the generator, of this method and SiD with an alpha; a head that says r = 1."""
    players, draw, batch = scene(method)
    for parameter in players.discriminator.parameters() if method.has_discriminator else ():
        parameter.data.zero_()
    sid = SiD(alpha=alpha, loss_scale=1.0, weight="nu" if method.weight == "exact" else method.weight)
    found = []
    for kind in (method, sid):
        loss = kind.generator_loss(players, draw | {"is_gan_on": torch.tensor(False)}, batch).total
        found.append([loss, *torch.autograd.grad(loss, list(players.generator.parameters()))])
    return found[0], found[1]


@pytest.mark.parametrize("weight", ["nu", "one", "1/sigma"])
def test_reverse_kl_without_a_gan_is_sid_at_one_half_bit_for_bit(weight: SampleWeight) -> None:
    for a, b in zip(*both(UniInstruct(divergence="rkl", gan_weight=0.0, weight=weight), 0.5), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "alpha"), [("kl", 1.0), ("pearson", 1.5), ("sh", 0.75), ("js", 0.75), ("neyman", 0.0)]
)
def test_where_the_ratio_is_one_everywhere_each_divergence_is_sid_at_its_alpha(name: Divergence, alpha: float) -> None:
    for a, b in zip(*both(UniInstruct(divergence=name, gan_weight=0.0, weight="nu"), alpha), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


# The ratio


class Fixed(nn.Module):
    """A discriminator that says these logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, features: Tensor) -> Tensor:
        return self.logits


def test_where_a_clamp_holds_the_ratio_alpha_is_reverse_kl_s() -> None:
    method = UniInstruct(divergence="kl", ratio_bins=0)
    h, alpha, _ = method._weight(scene(method)[0], {}, numbers(-50.0, -1.0, 1.0, 50.0))
    ratio = numbers(0.1, torch.e**-1, torch.e, 20.0)
    torch.testing.assert_close(h, ratio / ratio.mean())
    assert alpha.tolist() == [0.5, 1.0, 1.0, 0.5]


def test_a_piece_of_a_batch_is_normalised_by_the_means_of_the_whole() -> None:
    method, bins, logits = UniInstruct(divergence="js", ratio_bins=4), torch.tensor([0, 0, 1, 1]), numbers(-2, 0, 1, 2)
    players = scene(method)[0]
    whole = method._weight(players, {"bin": bins}, logits)
    everyone = {"all ratio": logits.exp().clamp(0.1, 20), "all bin": bins}
    piece = method._weight(players, {"bin": bins[:2], **everyone}, logits[:2])
    for found, expected in zip(piece[:2], whole[:2], strict=True):
        assert torch.equal(found, expected[:2])


def test_the_discriminator_sees_the_sample_at_the_level_of_the_scores() -> None:
    method = UniInstruct(divergence="js", gan_weight=0.3)
    players, draw, batch = scene(method)
    loss = method.generator_loss(players, draw, batch)
    x_t = PATH.diffuse(loss.carry["x"], draw["eps"], draw["t"])
    expected = gan_generator_loss(
        players.discriminator(players.fake.features(x_t, draw["t"], Cond(label=draw["label"])))
    )
    torch.testing.assert_close(loss.logs["gan"], expected.detach(), rtol=1e-12, atol=0)
    whole = loss.logs["identity"] + 0.3 * draw["z"][0].numel() * expected.detach()
    torch.testing.assert_close(loss.total.detach(), whole)


def test_the_exact_weight_is_of_the_levels_whatever_their_law() -> None:
    method = UniInstruct(divergence="rkl", gan_weight=0.0)
    players, draw, batch = scene(method)
    by_ratio = UniInstruct(divergence="rkl", gan_weight=0.0, weight="snr")
    one = {name: value[:1] if value.ndim else value for name, value in draw.items()}
    plain, found = (kind.generator_loss(players, one, batch).total for kind in (by_ratio, method))
    torch.testing.assert_close(found, plain * draw["slope"][0], rtol=1e-12, atol=0)
    assert (draw["slope"][1:] != draw["slope"][0]).all()


def test_one_level_is_no_integral() -> None:
    """Its slope is 0 everywhere: the generator would learn nothing."""
    one = KarrasIndex(low=500, high=500)
    with pytest.raises(
        UserError, match="weight = exact: integrates over noise levels, and time_law has a single one; use snr"
    ):
        scene(UniInstruct(time_law=one))
    scene(UniInstruct(time_law=one, weight="snr"))


# Who is asked and who learns


@pytest.mark.parametrize("who", ["teacher", "fake", "discriminator"])
def test_the_gradient_passes_through_every_network_that_judges(who: str) -> None:
    method = UniInstruct(divergence="kl", gan_weight=0.0, gan_features="teacher", ratio_bins=0)
    players, draw, batch = scene(method)

    def gradient() -> Tensor:
        loss = method.generator_loss(players, draw, batch).total
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(players.generator.parameters()))])

    whole, original = gradient(), players[who].forward
    players[who].forward = lambda x, *rest, **named: original(x.detach(), *rest, **named)
    assert (gradient() - whole).norm() > 1e-3 * whole.norm()


def test_both_sides_are_guided() -> None:
    """A fake score that is the teacher, asked with its scale, has no gap from it."""
    method = UniInstruct(divergence="rkl", gan_weight=0.0, guidance=3.0, fake_guidance="same")
    players, draw, batch = scene(method)
    players.fake.load_state_dict(players.teacher.state_dict())
    assert method.generator_loss(players, draw, batch).total == 0
    alone = UniInstruct(divergence="rkl", gan_weight=0.0, guidance=3.0)
    assert alone.generator_loss(players, draw, batch).total != 0


def test_two_micro_batches_of_8_train_as_one_batch_of_16(make_config: MakeConfig) -> None:
    sgd = [f"optimizers.{player}={{name: sgd, lr: 1e-2, betas: [0, 0.999]}}" for player in ("generator", "default")]
    common = ("method.ratio_memory=0.5", "method.fake_updates=1", "train.global_batch_size=16", *sgd)
    start = weights(Trainer(make_config("uni_instruct", *common)))
    whole = trained(make_config("uni_instruct", *common), 2)
    parts = trained(make_config("uni_instruct", *common, "train.micro_batch_size=8"), 2)
    size = max(float(value.abs().max()) for value in weights(whole).values())
    moved = max(float((value - start[name]).abs().max()) for name, value in weights(whole).items())
    apart = max(float((value - weights(parts)[name]).abs().max()) for name, value in weights(whole).items())
    assert moved > 1000 * ACCUMULATION * size
    assert apart <= ACCUMULATION * size


@schema
class OnTheRing(UniInstruct):
    """With a discriminator that fits the ring's networks."""

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        head = nn.Sequential(nn.Linear(128, 64), nn.SiLU(), nn.Linear(64, 1), nn.Flatten(0))
        return start_players(problem) | {"discriminator": head}


def ring_method(divergence: Divergence) -> OnTheRing:
    return OnTheRing(
        divergence=divergence,
        steps=FewSteps(init_ratio=INIT_RATIO),
        fake_updates=3,
        gan_weight=0.0,
        gan_fake_weight=0.01,  # the trunk is the fake score's, which has to stay exact; Adam scales the head's step
        time_law=TIME_LAW,
        fake_time_law=TIME_LAW,
        gan_time_law=TIME_LAW,
    )


@pytest.mark.full
def test_forward_kl_learns_every_mode_of_the_ring_in_its_class() -> None:
    """With the bars of the others but for the distance: the ratio is learned too, and its noise is in the gradient."""
    result = train_ring(ring_method("kl"), num_steps=600)
    assert result.coverage == NUM_MODES, result
    assert result.accuracy >= 0.99, result
    assert result.quality >= 0.95, result
    assert result.energy <= 0.005, result
