"""DisBack: Distribution Backtracking for Diffusion Distillation.  Zhang et al. 2024, arXiv:2408.15991.

Implemented: degradation recording (the teacher is trained on the images of the
initial generator, and copies of it on the way there are kept) and backtracking (the base method distils from each copy
in turn, the most degraded first, and at last from the teacher), around any method with a fake score.
The released code loads its copies under names that match no weight, without strictness, and so keeps the teacher as
the target; here every load is strict.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diffdistill.diffusion.denoiser import Denoiser, device_of, freeze
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, LogNormal
from diffdistill.distillation.losses import DenoisingWeight, denoising_loss
from diffdistill.distillation.method import Batch, Draw, Method, Players, Problem, Update, shapes_of
from diffdistill.distillation.wrapper import Wrapper, default_base, methods_above
from diffdistill.networks.lora import lora_of
from diffdistill.settings.limits import MAX_SAMPLING_STEPS
from diffdistill.settings.schema import Positive, PositiveInt, UserError, field, schema
from diffdistill.storage.checkpoint import flatten, load_strictly, select_group

if TYPE_CHECKING:
    AnyBase = Method
else:
    AnyBase = methods_above("disback")


@schema
class DisBack(Wrapper):
    """The path phi_0 (the teacher), phi_1, ..., phi_N (nearly the score of the initial generator), then back along it.

    base: the method that distils from each target.  path_length: N; 0 is the base method, bit for bit.
    recording_interval: training steps from one of the path to the next.  recording_lr, recording_time_law,
    recording_weight: of that training.  backtracking_interval: generator updates against each target.
    """

    name: Literal["disback"] = "disback"
    base: AnyBase = field(default_factory=default_base)
    path_length: Annotated[int, Field(ge=0, le=MAX_SAMPLING_STEPS)] = 5
    recording_interval: PositiveInt = 100  # the released script for SDXL
    recording_lr: Positive = 5e-7  # the same
    recording_time_law: AnyTimeDistribution = field(default_factory=LogNormal)
    recording_weight: DenoisingWeight = "edm"
    backtracking_interval: PositiveInt = 200  # the same: 1,000 iterations, of which each fifth is the generator's

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        """The base's, and where the path has inner points `target`, which holds the one that it distils from."""
        made = self.base.players(problem)
        if self.path_length and "fake" not in made:
            raise UserError(f"method.base.name = {self.base.name!r}: has no fake score, which disback needs")
        if self.path_length and self._of_student.start_images:
            raise UserError("method.base.generator_start_images: backtracking would start without the generator; use 0")
        return made | ({"target": _score(problem)} if self.path_length > 1 else {})

    def prepare(self, problem: Problem, seed: int) -> dict[str, Tensor]:
        """What the base prepares, and the path: phi_i as "path i.<weight>"."""
        stored = self.base.prepare(problem, seed)
        for i, score in enumerate(self._degrade(problem, seed), start=1):
            stored |= flatten({f"path {i}": score.state_dict()})
        return stored

    def initialise(self, players: Players, stored: Mapping[str, Tensor]) -> None:
        """The fake score starts at the end of the path, the target one before it.  Algorithm 2."""
        self.base.initialise(players, _of_base(stored))
        if self.path_length:
            _load(players.fake, stored, self.path_length)
        if self.position(0):
            _load(players.target, stored, self.position(0))

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        return self.base.draw(rng, problem) | {"position": torch.tensor(self.position(rng.step))}

    def call(self, function: str, players: Players, draw: Draw, batch: Batch) -> Any:
        """The base's loss, which takes the target for its teacher."""
        if draw["position"]:
            players = Players(**{**players, "teacher": players.target})
        return self.base.call(function, players, draw, replace(batch, stored=_of_base(batch.stored)))

    def after_step(self, players: Players, stored: Mapping[str, Tensor], step: int) -> None:
        self.base.after_step(players, _of_base(stored), step)
        position = self.position(step)
        if position and position != self.position(step - 1):
            _load(players.target, stored, position)

    def position(self, step: int) -> int:
        """Which of the path is the target of iteration `step`: N - 1, N - 2, ..., and 0, the teacher, for the rest."""
        return max(self.path_length - 1 - step // (self.backtracking_interval * self._of_student.every), 0)

    @property
    def _of_student(self) -> Update:
        return next(update for update in self.base.updates if self.base.student in update.players)

    def _degrade(self, problem: Problem, seed: int) -> Iterator[Denoiser]:
        """phi_1, ..., phi_N: the teacher on its way to the initial generator's images.  Algorithm 1."""
        if not self.path_length:
            return
        generator: Any = freeze(problem.copies(self.student)[self.student])
        score = _score(problem).eval()  # without dropout, so without random state
        if score.runtime.autocast is not None and not lora_of(score):  # in bfloat16, which is too coarse for training
            score.float().run_with(autocast=None)
        optimizer = torch.optim.Adam(score.parameters(), lr=self.recording_lr, betas=(0.0, 0.999))
        device = device_of(score)
        sampler, shape = self.base.sampler(problem), problem.image_shape
        for step in range(1, self.path_length * self.recording_interval + 1):
            rng = StepRandom(seed, step, torch.arange(problem.batch_size, device=device))
            cond = score.class_cond(problem.label_of(rng.uniform("recording label")))
            with torch.no_grad():
                x = sampler(generator, rng.normal("recording z", shape), cond, fresh_noise=rng.fresh_noise(shape))
            t = self.recording_time_law(rng.uniform("recording t"), problem.path)
            loss = denoising_loss(score, x, rng.normal("recording eps", shape), t, cond, weight=self.recording_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % self.recording_interval == 0:
                yield deepcopy(score).cpu()


def _score(problem: Problem) -> Denoiser:
    """A trainable copy of the teacher, or of the smaller network that this run starts from, as the fake score is."""
    assert problem.teacher is not None
    fake = problem.initial.get("fake")
    is_other = fake is not None and not lora_of(fake) and shapes_of(fake) != shapes_of(problem.teacher)
    initial = problem.initial if is_other or len(problem.initial) == 1 else {}
    score = replace(problem, initial=initial, starts={}).copies("fake")["fake"]
    assert isinstance(score, Denoiser)
    return score


def _load(module: nn.Module, stored: Mapping[str, Tensor], i: int) -> None:
    """Put phi_i into a player. Raises UserError if the weights are not exactly its own."""
    load_strictly(module, select_group(stored, f"path {i}"), origin=f"prepared.safetensors (path {i})")


def _of_base(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in stored.items() if not name.startswith("path ")}
