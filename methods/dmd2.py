"""DMD2: Improved Distribution Matching Distillation for Fast Image Synthesis.  Yin et al. 2024, arXiv:2405.14867.

Implemented: the normalised field with the guided teacher, `fake_updates` fake-score steps to each generator step,
the GAN on diffused bottleneck features, several steps by backward simulation, and the original DMD's regression on
stored teacher pairs (arXiv:2311.18828). `gan_features: fake` is the paper; `teacher` is what some others do.
Not implemented: LPIPS as the regression's distance (it is the mean squared error here).
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from diffdistill.denoiser import Cond
from diffdistill.draws import Draws, integer_of
from diffdistill.losses import (
    DenoisingWeight,
    denoising_loss,
    field_loss,
    gan_discriminator_loss,
    gan_generator_loss,
    sample_normaliser,
    zero_nonfinite,
)
from diffdistill.method import Batch, Draw, Loss, Method, Players, Setting, Update
from diffdistill.networks.discriminator import make_head
from diffdistill.path import expand
from diffdistill.sampling import AnySampler, FewSteps, Heun
from diffdistill.schema import NonNegative, Positive, PositiveInt, UserError, field, schema
from diffdistill.timesteps import AnyTimeLaw, Karras, LogNormal


@schema
class DMD2(Method):
    """Settings, in the paper's terms. Weights of 0 switch a part off, and its networks are then not built."""

    name: Literal["dmd2"] = "dmd2"
    steps: FewSteps = field(default_factory=FewSteps)
    guidance: float = 1.0  # w of D_u + w (D_c - D_u), on the teacher alone
    fake_updates: PositiveInt = 5  # exactly this many to one generator update
    generator_time_law: AnyTimeLaw = field(default_factory=Karras)
    fake_time_law: AnyTimeLaw = field(default_factory=LogNormal)
    gan_time_law: AnyTimeLaw = field(default_factory=Karras)
    fake_weight: DenoisingWeight = "edm"
    alpha_power: Literal[0, 1] = 0  # 1: the paper's equation; 0: every released code
    normaliser_minimum: Positive = 1e-5
    gan_weight: NonNegative = 3e-3  # lambda_g, in the generator's loss
    gan_fake_weight: NonNegative = 1e-2  # lambda_d, in the fake score's loss
    gan_features: Literal["fake", "teacher"] = "fake"
    regression_weight: NonNegative = 0.0
    regression_pairs: PositiveInt = 1000
    regression_sampler: AnySampler = field(default_factory=Heun)

    student = "generator"

    @property
    def needs_images(self) -> bool:
        return self.gan_weight > 0

    @property
    def updates(self) -> tuple[Update, ...]:
        critics = ("fake", "discriminator") if self.gan_weight else ("fake",)
        return (Update(("generator",), "generator_loss", self.fake_updates), Update(critics, "fake_loss"))

    def sampler(self, setting: Setting) -> FewSteps:
        return self.steps

    def players(self, setting: Setting) -> dict[str, nn.Module]:
        copies = setting.copies("generator", "fake")
        teacher = setting.teacher
        assert teacher is not None
        if self.guidance != 1 and not teacher.net.knows_unconditional:
            raise UserError(f"method.guidance: {self.guidance} needs a teacher trained with class_dropout > 0; use 1")
        return copies | ({"discriminator": make_head(teacher, setting.image_shape)} if self.gan_weight else {})

    def prepare(self, setting: Setting, seed: int) -> dict[str, Tensor]:
        """Teacher pairs for the regression: noise, image, label."""
        if not self.regression_weight:
            return {}
        teacher = setting.teacher
        assert teacher is not None
        rng = Draws(seed, 0, torch.arange(self.regression_pairs))
        noise = rng.normal("pair noise", setting.image_shape)
        label = rng.integers("pair label", max(setting.num_classes, 1))  # all classes, whatever the run is about
        with torch.no_grad():
            image = torch.cat(
                [
                    self.regression_sampler(
                        teacher,
                        noise[i : i + 256],
                        teacher.class_cond(label[i : i + 256]),
                        guidance=self.guidance,
                    )
                    for i in range(0, len(noise), 256)
                ]
            )
        return {"noise": noise, "image": image, "label": label}

    def draw(self, rng: Draws, setting: Setting) -> dict[str, Tensor]:
        laws = {"": self.generator_time_law, "fake ": self.fake_time_law}
        if self.gan_weight:
            laws |= dict.fromkeys(("gan ", "gan real ", "gan fake "), self.gan_time_law)
        uniforms = rng.uniforms([*(f"{call}t" for call in laws), "label", "pair"])
        pair = {"pair": integer_of(uniforms["pair"], self.regression_pairs)} if self.regression_weight else {}
        # One step index for the whole batch; the simulated steps before it have noise of their own.
        fresh = [f"fresh {i}" for i in range(self.steps.num_evaluations - 1)]
        return {
            **{f"{call}t": law(uniforms[f"{call}t"], setting.path) for call, law in laws.items()},
            **rng.normals(["z", *(f"{call}eps" for call in laws), *fresh], setting.image_shape),
            "label": setting.label_of(uniforms["label"]),
            **pair,
            "step": torch.tensor(rng.shared_integer("step", self.steps.num_evaluations)),
        }

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Distribution matching, plus the GAN's and the regression's share.  Equations 1, 4 and section 4.2."""
        x = self._generate(players, draw)
        field_value = self.field(players, draw, x)
        matching = field_loss(x, field_value)
        total, logs = matching, {"matching": matching.detach(), "field": field_value.abs().mean()}
        if self.gan_weight:
            adversarial = gan_generator_loss(self._logits(players, draw, x, ("gan",), self._cond(players, draw)))
            total = total + self.gan_weight * adversarial
            logs["gan"] = adversarial.detach()
        if self.regression_weight:
            pair = {name: value[draw["pair"]] for name, value in batch.stored.items()}
            start = self.steps.roll_out(players.generator, pair["noise"], step=0)
            estimate = players.generator(start.x, start.t, players.teacher.class_cond(pair["label"]))
            regression = mse_loss(estimate, pair["image"])
            total = total + self.regression_weight * regression
            logs["regression"] = regression.detach()
        return Loss(total, logs, carry={"x": x.detach()})

    @torch.no_grad()
    def field(self, players: Players, draw: Draw, x: Tensor) -> Tensor:
        """(D_fake - D_teacher) / nu at x noised: down it, the samples' law moves to the teacher's."""
        path, t, cond = players.teacher.path, draw["t"], self._cond(players, draw)
        x_t = path.diffuse(x, draw["eps"], t)
        real = players.teacher(x_t, t, cond, guidance=self.guidance)
        fake = players.fake(x_t, t, cond)
        field_value = (fake - real) / sample_normaliser(x, real, self.normaliser_minimum)
        return zero_nonfinite(field_value * expand(path.alpha(t) ** self.alpha_power, x))

    def fake_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Denoising on the generator's samples, plus the discriminator's share.  Equation 2 and section 4.2."""
        x, cond = draw.get("x"), self._cond(players, draw)
        if x is None:
            with torch.no_grad():
                x = self._generate(players, draw)
        denoising = denoising_loss(players.fake, x, draw["fake eps"], draw["fake t"], cond, weight=self.fake_weight)
        total, logs = denoising, {"denoising": denoising.detach()}
        if self.gan_weight:
            both = Cond.cat(batch.cond, cond)
            logits = self._logits(players, draw, torch.cat([batch.images, x]), ("gan real", "gan fake"), both)
            real, fake = logits.chunk(2)
            discrimination = gan_discriminator_loss(real, fake)
            total = total + self.gan_fake_weight * discrimination
            logs |= {
                "gan": discrimination.detach(),
                "accuracy": ((real > 0).float().mean() + (fake < 0).float().mean()) / 2,
            }
        return Loss(total, logs)

    def _generate(self, players: Players, draw: Draw) -> Tensor:
        """The output of the drawn step, its input simulated without gradient as at inference.  Section 4.4."""
        cond, step = self._cond(players, draw), int(draw["step"])
        with torch.no_grad():
            start = self.steps.roll_out(
                players.generator, draw["z"], cond, step=step, fresh_noise=lambda i: draw[f"fresh {i}"]
            )
        x: Tensor = players.generator(start.x, start.t, cond)
        return x

    def _logits(self, players: Players, draw: Draw, images: Tensor, calls: tuple[str, ...], cond: Cond) -> Tensor:
        """The head on the bottleneck of the fake score (or teacher), each call at noise of its own, in one pass."""
        t = torch.cat([draw[f"{call} t"] for call in calls])
        eps = torch.cat([draw[f"{call} eps"] for call in calls])
        noised = players.teacher.path.diffuse(images, eps, t)
        logits: Tensor = players.discriminator(players[self.gan_features](noised, t, cond, want="features"))
        return logits

    def _cond(self, players: Players, draw: Draw) -> Cond:
        cond: Cond = players.teacher.class_cond(draw["label"])
        return cond
