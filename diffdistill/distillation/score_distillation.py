"""What score-distillation methods share: the numbers of a step, the roll-out, fields, weights, the fake score's loss.

Two kinds of generator loss are built of this. A field (`matching_field`) is computed without gradient and pushed
through the generator. A loss through the networks keeps the graph from x to x_t and through both frozen score networks.

A draw holds, by name: for each noising "<call>t" and "<call>eps"; for each generated sample "<sample>z",
"<sample>label" and "<sample>fresh i"; and one "step". A call or a sample's name is "" or ends in a space.
It may hold "<sample>label for <role>", where a role is told another class than the sample's, and "times" [B, calls],
where the levels of the generator's calls are drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from diffdistill.diffusion.augmentation import augment
from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.guidance.check import check_guidance
from diffdistill.diffusion.path import Path, expand
from diffdistill.diffusion.sampling import StepInput, StepSampler
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import TimeDistribution
from diffdistill.distillation.levels import DrawnLevels
from diffdistill.distillation.losses import (
    DenoisingWeight,
    denoising_loss,
    gan_discriminator_loss,
    sample_normaliser,
    zero_nonfinite,
)
from diffdistill.distillation.method import Batch, Draw, Loss, Players, Problem, shapes_of
from diffdistill.distillation.scales import FakeScale, Scale, Scales, draw_scales, other_than_one, scale_in, scale_of
from diffdistill.settings.limits import MAX_CHOSEN
from diffdistill.settings.schema import UserError

Features = Literal["fake", "teacher"]
"""Whose features a discriminator's head reads."""

GanTaps = Annotated[tuple[int | str, ...], Field(min_length=1, max_length=MAX_CHOSEN)] | Literal["fastgen"] | None
"""The blocks that it reads, by number or name, or "middle", each by a head of its own; "fastgen": those of FastGen's
list for the network (networks/taps.py); null: the bottleneck alone."""

Role = Literal["generator", "teacher", "fake", "fake loss"]
"""Who is told a condition: what makes the sample, the teacher or the fake score that judges it, or the fake score as it
learns from it. A discriminator's is that of the network whose features it reads."""

SampleWeight = Literal["nu", "one", "alpha", "alpha^2", "alpha/sigma", "snr", "1/sigma", "1/sigma^2"]
"""The weight of one sample in a loss through the networks: 1/nu, or a function of its time (snr: alpha^2/sigma^2)."""

TIME_POWERS = {
    "one": (0, 0),
    "alpha": (1, 0),
    "alpha^2": (2, 0),
    "alpha/sigma": (1, -1),
    "snr": (2, -2),
    "1/sigma": (0, -1),
    "1/sigma^2": (0, -2),
}
"""The powers of alpha_t and sigma_t in each weight of time."""


def start_players(problem: Problem, **guidances: FakeScale) -> dict[str, nn.Module]:
    """Generator and fake score, which start as the teacher or as in an earlier run.

    guidances: the scales that will be asked of these networks, by the setting's name.
    Raises UserError without a teacher, and for a scale other than 1 where it never saw "no class" and is told no scale.
    """
    copies = problem.copies("generator", "fake")
    assert problem.teacher is not None
    for name, scale in guidances.items():
        if scale != "same":  # it is asked of the teacher already
            check_guidance(problem.teacher, f"method.{name}", scale)
    return copies


def tapped(problem: Problem, players: Mapping[str, nn.Module], features: Features) -> Denoiser:
    """The network whose features the head reads; the fake score may be smaller than its teacher."""
    network = problem.teacher if features == "teacher" else players["fake"]
    assert isinstance(network, Denoiser)
    return network


def check_trained(gan_fake_weight: float, *, is_asked: bool, why: str) -> None:
    """Raise ValueError where a discriminator is asked whose own loss has no weight.  why: it is asked."""
    if is_asked and not gan_fake_weight:
        raise ValueError(f"gan_fake_weight: 0 leaves the discriminator untrained, and {why}; give it a weight")


def draw_step(
    rng: StepRandom,
    problem: Problem,
    steps: StepSampler,
    laws: Mapping[str, TimeDistribution],
    *,
    samples: Sequence[str] = ("",),
    levels: DrawnLevels | None = None,
    scales: Scales | None = None,
    fake_class_dropout: float = 0.0,
    samples_per_condition: int = 1,
) -> dict[str, Tensor]:
    """The random numbers of one step: one noising for each entry of `laws`, and the start of each sample.

    The index of the generator's step is one for the whole batch; the simulated steps before it have noise of their own.
    levels: of its calls, where they are not those of `steps`.  scales: settings, by name; the ranges are drawn.
    fake_class_dropout: where `fake_guidance` is among them and is not 1, the share of the last sample's labels that the
    fake score's loss does not see: so it learns their law as a whole as well (Zhou et al. 2024, arXiv:2406.01561).
    samples_per_condition: k; sample i of the batch has the class of group i // k.
    """
    labels = [f"{sample}label" for sample in samples]
    uniforms = rng.uniforms([*(f"{call}t" for call in laws), *labels])
    if samples_per_condition > 1:
        uniforms |= rng.grouped(samples_per_condition).uniforms(labels)
    drawn = {label: problem.label_of(uniforms[label]) for label in labels}
    drawn |= {"times": levels.draw(rng, problem.path, steps)} if levels else {}
    if fake_class_dropout and needs_no_class(problem, scale_of(scales or {}, "fake_guidance")):
        is_dropped = rng.uniform("fake class dropout") < fake_class_dropout
        drawn[f"{labels[-1]} for fake loss"] = torch.where(is_dropped, problem.num_classes, drawn[labels[-1]])
    num_calls = drawn["times"].shape[1] if levels else steps.num_evaluations
    noises = [
        f"{sample}{noise}" for sample in samples for noise in ("z", *(f"fresh {i}" for i in range(num_calls - 1)))
    ]
    return {
        **drawn,
        **draw_scales(rng, scales or {}),
        **{f"{call}t": law(uniforms[f"{call}t"], problem.path) for call, law in laws.items()},
        **rng.normals([*noises, *(f"{call}eps" for call in laws)], problem.image_shape),
        "step": torch.tensor(rng.shared_integer("step", num_calls)),
    }


def needs_no_class(problem: Problem, scale: Scale) -> bool:
    """Whether a score that is asked with this scale must know "no class"; one that takes w as its input need not."""
    takes_scale = problem.teacher is not None and not problem.teacher.net.has_null_condition
    return other_than_one(scale) is not None and not takes_scale


def check_groups(problem: Problem, samples_per_condition: int) -> None:
    """Raise UserError where a group of samples would reach into the next batch, which has other classes."""
    if problem.batch_size % samples_per_condition:
        raise UserError(
            f"method.samples_per_condition = {samples_per_condition}: must divide train.global_batch_size = "
            f"{problem.batch_size}"
        )


def condition(players: Players, draw: Draw, sample: str = "", *, role: Role = "generator") -> Cond:
    """The drawn classes as a condition for one role; empty if the teacher takes none."""
    label = draw[f"{sample}label"]
    cond: Cond = players.teacher.class_cond(draw.get(f"{sample}label for {role}", label))
    return cond


def generate(players: Players, draw: Draw, steps: StepSampler, sample: str = "", *, cond: Cond | None = None) -> Tensor:
    """The generator's image of the drawn step, [B, ...], its input simulated without gradient as at inference.

    cond: None for the drawn classes.  Yin et al. 2024, arXiv:2405.14867, section 4.4.
    """
    cond = condition(players, draw, sample) if cond is None else cond
    start = call_input(players, draw, steps, sample, cond=cond)
    x: Tensor = players.generator(start.x, start.t, cond)
    return x


@torch.no_grad()
def call_input(players: Players, draw: Draw, steps: StepSampler, sample: str = "", *, cond: Cond) -> StepInput:
    """What the generator's drawn call is given, simulated as at inference."""
    return steps.roll_out(
        players.generator,
        draw[f"{sample}z"],
        cond,
        step=int(draw["step"]),
        fresh_noise=lambda i: draw[f"{sample}fresh {i}"],
        times=draw.get("times"),
    )


def sample_at_hand(players: Players, draw: Draw, steps: StepSampler) -> Tensor:
    """The step's sample as data: what the generator's loss carried over, or where it did not step, made now."""
    if "x" in draw:
        return draw["x"]
    with torch.no_grad():
        return generate(players, draw, steps)


def fake_sample(
    players: Players, draw: Draw, steps: StepSampler, *, is_dropped: Tensor | None = None
) -> tuple[Tensor, Cond]:
    """A sample of its own for the fake score's loss, without gradient, and its condition.

    is_dropped: [B], of samples that have no condition, neither when they are made nor afterwards.
    It is moved by EDM's augmentation where the draw holds "fake motion": on this side only, never the generator's.
    """
    cond, made_with = condition(players, draw, "fake ", role="fake loss"), None
    if is_dropped is not None:
        cond = made_with = players.fake.drop_condition(cond, is_dropped)
    with torch.no_grad():
        x = generate(players, draw, steps, "fake ", cond=made_with)
    if "fake motion" in draw:
        x, labels = augment(x, draw["fake motion"])
        cond = replace(cond, augmentation=labels)
    return x, cond


def sample_weight(weight: SampleWeight, path: Path, x: Tensor, t: Tensor, teacher: Tensor, *, minimum: float) -> Tensor:
    """The factor of each sample's loss, [B], of which no gradient is taken.

    x: samples [B, ...]; t: [B]; teacher: its estimate at x noised to t; minimum: of nu, see `sample_normaliser`.
    """
    if weight == "nu":
        return 1 / sample_normaliser(x, teacher, minimum).flatten()
    alpha_power, sigma_power = TIME_POWERS[weight]
    return (path.alpha(t) ** alpha_power * path.sigma(t) ** sigma_power).to(x.device)


def shielded(x: Tensor) -> Tensor:
    """x as it is; a sample whose gradient is not finite in every pixel will push nothing, as in `zero_nonfinite`."""
    if x.requires_grad:
        x.register_hook(zero_nonfinite)
    return x


def mean_of_finite(values: Tensor) -> Tensor:
    """The mean over the batch of one loss a sample [B], those that are not finite counted as zero.

    If none is finite the mean is not either, for the trainer's guard to name.
    """
    return zero_nonfinite(values[:, None]).mean()


def judged_sample(
    players: Players, draw: Draw, steps: StepSampler, *, guidance: float | Tensor, weight: SampleWeight, minimum: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where a loss through the networks begins: x, x_t and D_teacher [B, ...] with graph, and the sample's weight [B].

    A sample for which the gradient turns out not to be finite will push nothing.
    """
    x, t, path = shielded(generate(players, draw, steps)), draw["t"], players.teacher.path
    x_t = path.diffuse(x, draw["eps"], t)
    teacher = players.teacher(x_t, t, condition(players, draw, role="teacher"), guidance=guidance)
    return x, x_t, teacher, sample_weight(weight, path, x, t, teacher, minimum=minimum)


def score_identity(x: Tensor, teacher: Tensor, fake: Tensor, residual: Tensor, *, alpha: float | Tensor) -> Tensor:
    """gap^T (D_residual - x) + (1 - alpha) ||gap||^2 of each sample, [B], with gap = D_teacher - D_fake.

    With residual = fake it is gap^T (D_teacher - x) - alpha ||gap||^2.  All [B, ...], with graph; alpha: one, or [B].
    Where kappa_3 enters is not verified: SiD-LSG's code has kappa_2 = kappa_3, so that it makes no difference.
    """
    gap = (teacher - fake).flatten(1)
    return (gap * (residual - x).flatten(1)).sum(1) + (1 - alpha) * gap.square().sum(1)


def fake_with_logits(
    players: Players, draw: Draw, x_t: Tensor, *, scales: Scales, features: Features | None, taps: GanTaps = None
) -> tuple[Tensor, Tensor]:
    """D_fake at x_t, and the discriminator's logits there, [B] or [B, heads], both with their graph to x_t.

    features: whose the head reads; None: there is no discriminator, and there are no logits.
    """
    cond, t = condition(players, draw, role="fake"), draw["t"]
    if features == "fake" and scale_of(scales, "fake_guidance") == 1:
        fake, read = players.fake.with_features(x_t, t, cond, taps=taps)
        return fake, players.discriminator(read)
    fake = players.fake(x_t, t, cond, guidance=scale_in(draw, scales, "fake_guidance"))
    if features is None:
        return fake, x_t.new_zeros(0)
    judge, judged = players[features], condition(players, draw, role=features)
    assert isinstance(judge, Denoiser)
    return fake, players.discriminator(judge.features(x_t, t, judged, taps=taps))


def check_followed(players: Mapping[str, nn.Module]) -> None:
    """Raise UserError where the fake score is no network like the generator, whose weights it would follow."""
    if shapes_of(players["fake"]) != shapes_of(players["generator"]):
        raise UserError("method.fake_follows: fake score and generator have different networks; use 0")


@torch.no_grad()
def follow(players: Players, share: float) -> None:
    """Move the fake score's weights this share of the way to the generator's: implicit distribution alignment.

    Ge et al. 2025 (SenseFlow), arXiv:2506.00523.
    """
    for own, other in zip(players.fake.parameters(), players.generator.parameters(), strict=True):
        own.lerp_(other, share)


def matching_field(x: Tensor, fake: Tensor, teacher: Tensor, *, minimum: float) -> Tensor:
    """(D_fake - D_teacher) / nu: down it, the samples' law moves to the teacher's (reverse KL).

    x: samples [B, ...]; fake, teacher: both estimates at the same noised x; minimum: of nu, see `sample_normaliser`.
    Yin et al. 2024, arXiv:2311.18828, eq. 7 and 8.
    """
    return (fake - teacher) / sample_normaliser(x, teacher, minimum)


@torch.no_grad()
def guided_field(
    players: Players, draw: Draw, x: Tensor, *, scales: Scales, minimum: float, alpha_power: int = 0
) -> Tensor:
    """DMD2's field at x noised to the draw's t: `matching_field` of both scores, each with its own scale.

    A sample whose field is not finite pushes nothing.  alpha_power: of alpha_t, by which it is weighed.
    """
    alpha = players.teacher.path.alpha(draw["t"])
    fake, real = guided_estimates(players, draw, x, scales=scales)
    return zero_nonfinite(matching_field(x, fake, real, minimum=minimum) * expand(alpha**alpha_power, x))


def guided_estimates(players: Players, draw: Draw, x: Tensor, *, scales: Scales) -> tuple[Tensor, Tensor]:
    """D_fake and D_teacher [B, ...] at x noised to the draw's t, each with its own scale."""
    path, t = players.teacher.path, draw["t"]
    guidance, fake_guidance = (scale_in(draw, scales, name) for name in ("guidance", "fake_guidance"))
    x_t = path.diffuse(x, draw["eps"], t)
    real = players.teacher(x_t, t, condition(players, draw, role="teacher"), guidance=guidance)
    fake = players.fake(x_t, t, condition(players, draw, role="fake"), guidance=fake_guidance)
    return fake, real


def head_logits(
    players: Players,
    draw: Draw,
    features: Features,
    images: Tensor,
    calls: Sequence[str],
    cond: Cond,
    *,
    taps: GanTaps = None,
) -> Tensor:
    """The discriminator's head on a bottleneck, or heads on these taps, each call at noise of its own, in one pass.

    images: [len(calls) B, ...], call by call; cond: theirs.  Returns logits, one a sample, or [B, heads].
    """
    t = torch.cat([draw[f"{call}t"] for call in calls])
    eps = torch.cat([draw[f"{call}eps"] for call in calls])
    noised = players.teacher.path.diffuse(images, eps, t)
    logits: Tensor = players.discriminator(tapped_by(players, features).features(noised, t, cond, taps=taps))
    return logits


def tapped_by(players: Players, features: Features) -> Denoiser:
    """The network whose features the head reads."""
    network = players[features]
    assert isinstance(network, Denoiser)
    return network


def critics_loss(
    players: Players,
    draw: Draw,
    batch: Batch,
    x: Tensor,
    *,
    weight: DenoisingWeight,
    gan_weight: float | None,
    features: Features,
    taps: GanTaps = None,
    r1: tuple[float, float] = (0.0, 0.0),
) -> Loss:
    """Denoising on the generator's samples x (as data), plus the discriminator's share on real and generated images.

    x: [B, ...] of the draw's labels.  gan_weight None: there is no discriminator.
    r1: weight and noise of the approximate R1 penalty, MSE(l(real), l(real + noise n)), n being the draw's "gan r1",
    both at the same noise of the discriminator's; in the discrimination, so under gan_weight too.
    Yin et al. 2024, arXiv:2405.14867, equation 2 and section 4.2.
    """
    cond = condition(players, draw, role="fake loss")
    denoising = denoising_loss(players.fake, x, draw["fake eps"], draw["fake t"], cond, weight=weight)
    if gan_weight is None:
        return Loss(denoising, {"denoising": denoising.detach()})
    resolve, told = tapped_by(players, features).resolve, condition(players, draw, role=features)
    images, both = torch.cat([batch.images, x.detach()]), Cond.cat(resolve(batch.cond), resolve(told))
    logits = head_logits(players, draw, features, images, ("gan real ", "gan fake "), both, taps=taps)
    real, fake = logits.chunk(2)
    discrimination = gan_discriminator_loss(real, fake)
    accuracy = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
    logs = {"denoising": denoising.detach(), "gan": discrimination.detach(), "accuracy": accuracy}
    if r1[0]:
        moved = batch.images + r1[1] * draw["gan r1"]
        penalty = F.mse_loss(real, head_logits(players, draw, features, moved, ("gan real ",), batch.cond, taps=taps))
        discrimination, logs["r1"] = discrimination + r1[0] * penalty, penalty.detach()
    return Loss(denoising + gan_weight * discrimination, logs)
