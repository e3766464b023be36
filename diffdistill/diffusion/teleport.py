"""Gaussian teleportation: the noisiest part of a trajectory in closed form.  Wang & Vastola 2024, arXiv:2412.09726.

Where noise is large the score is nearly that of a Gaussian with the data's mean and covariance, whose ODE is known; a
sampler then only does the rest.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.guidance.policies import Guidance
from diffdistill.diffusion.path import EDM, Flow, Path, VPCosine, VPLinear, expand
from diffdistill.diffusion.sampling import DDIM, TCD, FewSteps, FreshNoise, Heun, OneCall, Sampler
from diffdistill.settings.schema import UserError


@dataclass(frozen=True)
class LowRankGaussian:
    """N(mean_c, U diag(values) U^T) of flat images: a mean for each class, one covariance for all.

    means: [classes + 1, D], the last of all images; values: [r], positive; vectors: U [D, r]. All float64. What is
    orthogonal to U has no variance.
    """

    means: Tensor
    values: Tensor
    vectors: Tensor

    @staticmethod
    def fit(images: Tensor, labels: Tensor | None = None, *, rank: int | None = None) -> "LowRankGaussian":
        """Of images [N, ...] and their classes [N]; without labels there is one mean.

        rank: the largest so many eigenvalues are kept; None: all but what is zero beside the largest. The covariance is
        around the class's mean, found from the N images by their singular values, so that D may be large.
        Raises UserError for fewer than two images.
        """
        if len(images) < 2:
            raise UserError(f"teleport: a covariance needs at least 2 images, not {len(images)}")
        flat = images.detach().double().flatten(1)
        means, centred = [flat.mean(0)], flat - flat.mean(0)
        if labels is not None:
            count = int(labels.max()) + 1
            of_class = [flat[labels == c].mean(0) if bool((labels == c).any()) else means[-1] for c in range(count)]
            means = [*of_class, *means]
            centred = flat - torch.stack(of_class)[labels]
        _, roots, vectors = torch.linalg.svd(centred, full_matrices=False)
        values = roots.square() / (len(flat) - 1)
        kept = int((values > 1e-10 * values[0]).sum()) if rank is None else rank
        return LowRankGaussian(torch.stack(means), values[:kept], vectors[:kept].T.contiguous())

    def sample(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Flat images [B, D] of classes [B].  noise: unit, [B, r]."""
        return self.means[labels] + (noise.double() * self.values.sqrt()) @ self.vectors.T

    def mean(self, cond: Cond, guidance: float | Tensor, batch: int) -> Tensor:
        """mu_u + w (mu_c - mu_u), [B, D]: with one covariance, guided scores are those of a Gaussian with this mean."""
        means = self.means if cond.label is None else self.means.to(cond.label.device)
        overall = means[-1].expand(batch, -1)
        if cond.label is None:
            return overall
        own = means[cond.label.clamp_max(len(means) - 1)]
        scale = guidance[:, None] if isinstance(guidance, Tensor) else guidance
        return overall + scale * (own - overall)

    def carry(self, path: Path, x: Tensor, mean: Tensor, t_from: Tensor, t_to: Tensor) -> Tensor:
        """Where the exact ODE takes x [B, ...] between two times [B], each eigenmode by its ratio of deviations."""
        (a_from, s_from), (a_to, s_to) = ((path.alpha(t)[:, None], path.sigma(t)[:, None]) for t in (t_from, t_to))
        vectors, values = self.vectors.to(x.device), self.values.to(x.device)
        centred, rest = x.double().flatten(1) - a_from * mean, s_to / s_from
        gains = ((a_to**2 * values + s_to**2) / (a_from**2 * values + s_from**2)).sqrt() - rest
        moved = a_to * mean + rest * centred + (centred @ vectors * gains) @ vectors.T
        return moved.reshape(x.shape).to(x.dtype)


@dataclass(frozen=True)
class Teleport:
    """A sampler that begins at a lower noise level, where the Gaussian's ODE arrives from pure noise.

    sampler: does the rest, its own grid over the levels below `ratio`, a noise-to-signal ratio.
    With Heun's grid of N steps and its k-th level as the ratio, `Heun(N - k)` is the rest of that grid exactly.
    """

    sampler: Sampler
    ratio: float
    gaussian: LowRankGaussian

    @property
    def num_evaluations(self) -> int:
        return self.sampler.num_evaluations

    def __call__(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        cond: Cond = NO_COND,
        *,
        guidance: Guidance = 1.0,
        fresh_noise: FreshNoise | None = None,
    ) -> Tensor:
        """As every sampler.

        Raises UserError for a policy of guidance, where the path cannot end at the ratio, and for a sampler that does
        not begin there with pure noise.
        """
        if not isinstance(guidance, (int, float, Tensor)):
            raise UserError(
                "teleport: a policy changes the scale during sampling, which has no closed form; use a number"
            )
        lower = replace(denoiser.path, **_end_at(denoiser.path, self.ratio))  # type: ignore[type-var]
        _check_start(self.sampler, lower, self.ratio)
        top, start = (
            torch.full((len(noise),), p.t_max, dtype=torch.float64, device=noise.device) for p in (denoiser.path, lower)
        )
        x = noise * expand(denoiser.path.sigma(top), noise)
        mean = self.gaussian.mean(cond, guidance, len(noise)).to(noise.device)
        x = self.gaussian.carry(denoiser.path, x, mean, top, start)
        rest = Denoiser(denoiser.net, lower, denoiser.predicts, sigma_data=denoiser.sigma_data).train(denoiser.training)
        rest.runtime = denoiser.runtime
        unit = x / expand(lower.sigma(start), x)
        return self.sampler(rest, unit.to(noise.dtype), cond, guidance=guidance, fresh_noise=fresh_noise)


def rest_of_grid(sampler: Sampler, path: Path, ratio: float, setting: str) -> tuple[Heun, float]:
    """The rest of Heun's grid from its first level at this ratio or below, and that level's ratio.

    Raises UserError, naming the setting, for other samplers, a ratio that leaves nothing out or no step, and a path
    that cannot begin there.
    """
    if not isinstance(sampler, Heun):
        kind = getattr(sampler, "name", type(sampler).__name__)
        raise UserError(f"{setting} {ratio:g}: skips steps of Heun, and the sampler is {kind}")
    levels = path.ratio(path.karras_times(sampler.num_steps, sampler.rho)[: sampler.num_steps]).tolist()
    left_out = sum(level > ratio * (1 + 1e-9) for level in levels)
    if not 0 < left_out <= sampler.num_steps - 2:
        low, high = levels[-2], levels[0]
        raise UserError(f"{setting} {ratio:g}: skips {left_out} steps; choose from {low:.3g}, below {high:.3g}")
    _end_at(path, levels[left_out])
    return replace(sampler, num_steps=sampler.num_steps - left_out), levels[left_out]


def _check_start(sampler: Sampler, path: Path, ratio: float) -> None:
    """Raise UserError where the sampler does not begin at the path's end, which has this ratio, with sigma n."""
    if isinstance(sampler, OneCall):
        raise UserError("teleport: one_call does not start at a noise level")
    if not isinstance(sampler, (DDIM, FewSteps, TCD)):
        return  # Heun's grid is over the whole path
    if not isinstance(sampler, DDIM) and sampler.init_noise == "unit":
        raise UserError(f"teleport: {sampler.name} with init_noise: unit has no noise level; use init_noise: sigma")
    first = float(path.ratio(sampler.times(path)[0]))
    if first < ratio * (1 - 1e-6):
        raise UserError(
            f"teleport: {sampler.name} starts at the ratio {first:g}, not at {ratio:g}; set both to one value"
        )


def _end_at(path: Path, ratio: float) -> dict[str, float]:
    """The setting that makes a path end at a noise-to-signal ratio."""
    names = {EDM: "sigma_max", VPCosine: "t_end", VPLinear: "t_end", Flow: "t_end"}
    name = names.get(type(path))
    ends = path.ratio(torch.tensor([path.t_min, path.t_max], dtype=torch.float64)).tolist()
    if name is None or not ends[0] < ratio <= ends[1]:
        kind = getattr(path, "name", type(path).__name__)
        raise UserError(
            f"teleport: {kind} cannot start at the ratio {ratio:g}; continuous paths can, below their largest ratio"
        )
    return {name: float(path.time_of_ratio(torch.tensor(ratio, dtype=torch.float64)))}
