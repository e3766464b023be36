"""Pictures: grids of images, and the three views that tell a healthy distillation from a sick one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffdistill.data.collection import shown
from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.sampling import AnySampler
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Players, Problem

LONGEST_NAMES = 60


@torch.no_grad()
def preview_panels(
    players: Players,
    name: str,
    student: nn.Module,
    sampler: AnySampler,
    problem: Problem,
    *,
    seed: int,
    device: torch.device,
    class_names: Sequence[str] = (),
    count: int = 40,
) -> dict[str, Tensor]:
    """The student's samples and, where there are such players, the teacher's and the fake score's denoising of them,
    at one noise level and on the same noise.

    name: the student's among the players; student: its weights to look at.  Returns [count, C, H, W] by caption.
    class_names: by number, where they are known; the caption says which classes take turns, where they are few.
    """
    index = torch.arange(count, device=device)
    rng = StepRandom(seed, 0, index)
    classes = torch.tensor(problem.classes or range(max(problem.num_classes, 1)), device=device)
    cond = Cond(label=classes[index % len(classes)]) if problem.num_classes else NO_COND
    x = sampler(
        student,  # type: ignore[arg-type]
        rng.normal("preview", problem.image_shape),
        cond,
        fresh_noise=rng.fresh_noise(problem.image_shape),
    )
    known = [class_names[number] if number < len(class_names) else str(number) for number in classes.tolist()]
    names = ", ".join(known) if problem.num_classes else ""
    told = f": {shown(names)}" if 0 < len(names) <= LONGEST_NAMES else ""
    panels = {f"{name} ({sampler.num_evaluations} NFE){told}": x}
    t = problem.path.time_of_ratio(torch.ones(count, dtype=torch.float64, device=device))
    x_t = problem.path.diffuse(x, rng.normal("preview eps", problem.image_shape), t)
    for other in ("teacher", "fake"):
        if other in players and other != name:
            panels[f"{other}'s D(x_t), ratio 1"] = players[other](x_t, t, cond)
    return panels
