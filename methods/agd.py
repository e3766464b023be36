"""AGD: Efficient Distillation of Classifier-Free Guidance using Adapters.  Jensen & Sadat 2025, arXiv:2503.07274.

Implemented: adapters of both kinds (offset, cross-attention) on a frozen base, w as their input, trained on stored
trajectories of the guided teacher, which is not in memory then. The student makes the teacher's steps, one evaluation
each where guidance takes two; so it is not for few steps by itself.
Not implemented: the learned variance's share in the loss (DiT), the ablation's other losses.
Unlike the released code, offsets too are fed w itself, not 1000 w.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.denoiser import Denoiser, device_of
from diffdistill.diffusion.guidance.check import check_null_condition
from diffdistill.diffusion.guidance.policies import Evaluation, Recorder
from diffdistill.diffusion.path import Path, Prediction, expand
from diffdistill.diffusion.sampling import AnySampler, Heun
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.losses import DenoisingWeight, denoising_error, widen
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.networks.adapters import AdaptedConfig, AdapterConfig
from diffdistill.networks.guided import take_weights
from diffdistill.networks.lora import LoRAConfig
from diffdistill.networks.registry import BaseNetwork
from diffdistill.settings.schema import Number, PositiveInt, UserError, field, schema

CHUNK = 256  # trajectories made at a time

STORED: dict[str, Literal["eps", "v", "flow"]] = {
    "eps": "eps",
    "flow": "flow",
    "v": "v",
    **dict.fromkeys(("edm", "snr5", "truncated_snr"), "v"),
}
"""What of the guided estimate is stored for a weight, so that half precision costs no more than its own rounding: as x0
the weight would multiply that, at little noise, by up to 1/r^2. The others store x0."""


@schema
class AGD(Method):
    """guidance: least and greatest w, one for each trajectory.  storage: the paper keeps half precision.

    weight: the paper's is the mean squared error of eps; end_points is ours: equal errors at all levels and scales.
    """

    name: Literal["agd"] = "agd"
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    steps: AnySampler = field(default_factory=Heun)
    guidance: tuple[Number, Number] = (1.0, 6.0)
    trajectories: PositiveInt = 1000
    storage: Literal["fp16", "fp32"] = "fp16"
    weight: DenoisingWeight | Literal["end_points"] = "eps"

    student = "adapted"
    needs_images = False
    keeps_teacher = False
    updates = (Update(("adapted",), "adapter_loss"),)

    def __post_init__(self) -> None:
        if self.guidance[0] > self.guidance[1]:
            raise ValueError(f"guidance: must be increasing: {list(self.guidance)}")

    def sampler(self, problem: Problem) -> AnySampler:
        return self.steps

    def student_model(
        self, network: BaseNetwork, predicts: Prediction, problem: Problem
    ) -> tuple[AdaptedConfig, Prediction]:
        if isinstance(network, LoRAConfig):
            raise UserError("lora: agd trains only its adapters, over a frozen base; leave it out")
        return AdaptedConfig(base=network, adapter=self.adapter), predicts

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        """The teacher's weights under new adapters. Raises UserError if w has no meaning to the teacher."""
        teacher, student = problem.teacher, problem.network
        if teacher is None or student is None:
            raise UserError("teacher: this method distils a teacher; name a pretrained run")
        check_null_condition(teacher, "teacher: agd, which adds w to a network without it,")
        take_weights(student, problem.initial.get("adapted", teacher))
        return {"adapted": student}

    def prepare(self, problem: Problem, seed: int) -> dict[str, Tensor]:
        """Guided trajectories: x and the estimates there [N, NFE, ...], t [N, NFE], scale and label [N].

        The estimate is stored as `STORED` has it, under that name; x0 under the name of target.
        """
        teacher = problem.teacher
        assert teacher is not None
        device = device_of(teacher)
        chunks = torch.arange(self.trajectories, device=device).split(CHUNK)
        parts = [self._trajectories(teacher, StepRandom(seed, 0, index), problem) for index in chunks]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @torch.no_grad()
    def _trajectories(self, teacher: Denoiser, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        low, high = self.guidance
        uniforms, shape = rng.uniforms(["trajectory label", "trajectory scale"]), problem.image_shape
        label, scale = problem.label_of(uniforms["trajectory label"]), low + (high - low) * uniforms["trajectory scale"]
        seen = Recorder(scale.float())
        fresh = StepRandom(rng.seed, 1, rng.index).fresh_noise(shape)
        self.steps(teacher, rng.normal("noise", shape), teacher.class_cond(label), guidance=seen, fresh_noise=fresh)
        dtype = torch.float16 if self.storage == "fp16" else torch.float32
        kind = STORED.get(self.weight)

        def said(one: Evaluation) -> Tensor:
            return teacher.convert(one.x0, kind, one.x, one.t) if kind else one.x0

        return {
            "x": torch.stack([one.x for one in seen.evaluations], 1).to(dtype),
            kind or "target": torch.stack([said(one) for one in seen.evaluations], 1).to(dtype),
            "t": torch.stack([one.t for one in seen.evaluations], 1),
            "scale": scale.float(),
            "label": label,
        }

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        """Calls at random, over trajectories and steps alike."""
        return {
            "trajectory": rng.integers("trajectory", self.trajectories),
            "call": rng.integers("call", self.steps.num_evaluations),
        }

    def adapter_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """w(t) ||D_adapted(x_t, t, c, w) - [D_u + w (D_c - D_u)](x_t, t)||^2 at what the teacher saw and said."""
        row, call, stored = draw["trajectory"], draw["call"], batch.stored
        adapted: Denoiser = players.adapted
        x, t = widen(stored["x"][row, call]), stored["t"][row, call]
        kind: Prediction = next((kind for kind in ("eps", "v", "flow") if kind in stored), "x0")
        target = adapted.path.to_x0(widen(stored["target" if kind == "x0" else kind][row, call]), kind, x, t)
        cond = replace(adapted.class_cond(stored["label"][row]), guidance_input=stored["scale"][row])
        estimate = adapted(x, t, cond)
        if self.weight == "end_points":
            share = end_point_weight(adapted.path, t, stored["scale"][row])
            loss = (expand(share, estimate) * (estimate - target) ** 2).mean()
        else:
            loss = denoising_error(adapted, estimate, target, t, weight=self.weight)
        return Loss(loss, {"error": loss.detach()})


def end_point_weight(path: Path, t: Tensor, scale: Tensor) -> Tensor:
    """min(1/r, 3) / max(w - 1, 0.2), [B] float64: an end point counts as a share of what guidance by w moves it.

    The square of what an error at ratio r does to an end point goes as 1/r^2 at most. Under that alone the high levels
    are learned last, and their errors, all to one side, add up.
    """
    return (1 / path.ratio(t)).clamp_max(3) / (scale.double() - 1).clamp_min(0.2)
