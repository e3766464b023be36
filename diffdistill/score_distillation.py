"""What score-distillation methods share: the numbers of a step, the roll-out, the matching field, the critics' loss.

A draw holds, by name: for each noising "<call>t" and "<call>eps"; for each generated sample "<sample>z",
"<sample>label" and "<sample>fresh i"; and one "step". A call or a sample's name is "" or ends in a space.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Cond
from diffdistill.draws import Draws
from diffdistill.losses import DenoisingWeight, denoising_loss, gan_discriminator_loss, sample_normaliser
from diffdistill.method import Batch, Draw, Loss, Players, Setting
from diffdistill.sampling import StepSampler
from diffdistill.schema import UserError
from diffdistill.timesteps import TimeLaw

Features = Literal["fake", "teacher"]
"""Whose bottleneck a discriminator's head reads."""


def start_players(setting: Setting, **guidances: float) -> dict[str, nn.Module]:
    """Generator and fake score, which start as the teacher or as in an earlier run.

    guidances: the scales that will be asked of these networks, by the setting's name.
    Raises UserError without a teacher, and for a scale other than 1 where it never saw "no class".
    """
    copies = setting.copies("generator", "fake")
    assert setting.teacher is not None
    for name, guidance in guidances.items():
        if guidance != 1 and not setting.teacher.net.knows_unconditional:
            raise UserError(f"method.{name}: {guidance} needs a teacher trained with class_dropout > 0; use 1")
    return copies


def draw_step(
    rng: Draws, setting: Setting, steps: StepSampler, laws: Mapping[str, TimeLaw], *, samples: Sequence[str] = ("",)
) -> dict[str, Tensor]:
    """The random numbers of one step: one noising for each entry of `laws`, and the start of each sample.

    The index of the generator's step is one for the whole batch; the simulated steps before it have noise of their own.
    """
    labels = [f"{sample}label" for sample in samples]
    uniforms = rng.uniforms([*(f"{call}t" for call in laws), *labels])
    noises = [f"{sample}{noise}" for sample in samples for noise in ("z", *_fresh_names(steps))]
    return {
        **{f"{call}t": law(uniforms[f"{call}t"], setting.path) for call, law in laws.items()},
        **rng.normals([*noises, *(f"{call}eps" for call in laws)], setting.image_shape),
        **{label: setting.label_of(uniforms[label]) for label in labels},
        "step": torch.tensor(rng.shared_integer("step", steps.num_evaluations)),
    }


def _fresh_names(steps: StepSampler) -> list[str]:
    return [f"fresh {i}" for i in range(steps.num_evaluations - 1)]


def condition(players: Players, draw: Draw, sample: str = "") -> Cond:
    """The drawn classes as a condition; empty if the teacher takes none."""
    cond: Cond = players.teacher.class_cond(draw[f"{sample}label"])
    return cond


def generate(players: Players, draw: Draw, steps: StepSampler, sample: str = "") -> Tensor:
    """The generator's image of the drawn step, [B, ...], its input simulated without gradient as at inference.

    Yin et al. 2024, arXiv:2405.14867, section 4.4.
    """
    cond, step = condition(players, draw, sample), int(draw["step"])
    with torch.no_grad():
        start = steps.roll_out(
            players.generator,
            draw[f"{sample}z"],
            cond,
            step=step,
            fresh_noise=lambda i: draw[f"{sample}fresh {i}"],
        )
    x: Tensor = players.generator(start.x, start.t, cond)
    return x


def matching_field(x: Tensor, fake: Tensor, teacher: Tensor, *, minimum: float) -> Tensor:
    """(D_fake - D_teacher) / nu: down it, the samples' law moves to the teacher's (reverse KL).

    x: samples [B, ...]; fake, teacher: both estimates at the same noised x; minimum: of nu, see `sample_normaliser`.
    Yin et al. 2024, arXiv:2311.18828, eq. 7 and 8.
    """
    return (fake - teacher) / sample_normaliser(x, teacher, minimum)


def head_logits(
    players: Players, draw: Draw, features: Features, images: Tensor, calls: Sequence[str], cond: Cond
) -> Tensor:
    """The discriminator's head on a bottleneck, each call at noise of its own, in one pass.

    images: [len(calls) B, ...], call by call; cond: theirs.  Returns logits, one a sample.
    """
    t = torch.cat([draw[f"{call}t"] for call in calls])
    eps = torch.cat([draw[f"{call}eps"] for call in calls])
    noised = players.teacher.path.diffuse(images, eps, t)
    tapped = players[features](noised, t, cond, want="features")
    logits: Tensor = players.discriminator(tapped)
    return logits


def critics_loss(
    players: Players,
    draw: Draw,
    batch: Batch,
    x: Tensor,
    *,
    weight: DenoisingWeight,
    gan_weight: float | None,
    features: Features,
) -> Loss:
    """Denoising on the generator's samples x (as data), plus the discriminator's share on real and generated images.

    x: [B, ...] of the draw's labels.  gan_weight None: there is no discriminator.
    Yin et al. 2024, arXiv:2405.14867, equation 2 and section 4.2.
    """
    cond = condition(players, draw)
    denoising = denoising_loss(players.fake, x, draw["fake eps"], draw["fake t"], cond, weight=weight)
    if gan_weight is None:
        return Loss(denoising, {"denoising": denoising.detach()})
    images, both = torch.cat([batch.images, x.detach()]), Cond.cat(batch.cond, cond)
    logits = head_logits(players, draw, features, images, ("gan real ", "gan fake "), both)
    real, fake = logits.chunk(2)
    discrimination = gan_discriminator_loss(real, fake)
    accuracy = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
    logs = {"denoising": denoising.detach(), "gan": discrimination.detach(), "accuracy": accuracy}
    return Loss(denoising + gan_weight * discrimination, logs)
