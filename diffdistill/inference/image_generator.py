"""What makes images of a model: our own samplers, with its text encoder before them and its VAE behind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from diffdistill.data.classes import told_classes
from diffdistill.diffusion.guidance.policies import Guidance
from diffdistill.diffusion.prompt_table import PromptTable
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.steps import with_steps
from diffdistill.inference.draw import label_numbers, sample_rows
from diffdistill.models.encoders import encoder_of
from diffdistill.models.spec import TrainedModel
from diffdistill.models.teachers import Pipeline, pipeline_of
from diffdistill.settings.schema import UserError


@dataclass(frozen=True)
class SampleRequest:
    """What to draw. Image i is of noise (seed, i), and of the prompt or class i modulo their number.

    labels: numbers or names; none for all classes in turn.  guidance, num_steps: None for the model's own.
    style: of a student of several, as `parse_style`.
    trusts_code: whether the code of a folder may run.  encode_batch: prompts that are encoded at a time; None: all.
    """

    prompts: Sequence[str] = ()
    labels: Sequence[int | str] = ()
    seed: int = 0
    guidance: Guidance | None = None
    num_steps: int | None = None
    ema: str | None = None
    style: str | None = None
    negative_prompt: str | None = None
    negative_scale: float | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    trusts_code: bool = False
    encode_batch: int | None = None


class ImageGenerator(Protocol):
    """num_evaluations: NFE, network evaluations for one image."""

    num_evaluations: int

    def __call__(self, index: Tensor) -> Tensor:
        """The images with these numbers [B], as [B, C, H, W] in [-1, 1] on the CPU."""
        ...


class ModelImageGenerator:
    """By our own samplers; latents go through the pipeline's VAE."""

    def __init__(self, model: TrainedModel, asked: SampleRequest) -> None:
        """Raises UserError on prompts, classes, steps and guidance that do not go with the model."""
        sampler = model.spec.sampler
        if asked.num_steps is not None:
            sampler = with_steps(sampler, model.denoiser.path, asked.num_steps)  # type: ignore[assignment]
        self.model = replace(model, spec=replace(model.spec, sampler=sampler))
        self.asked, self.num_evaluations = asked, sampler.num_evaluations
        pipeline = pipeline_of(model.spec)
        self.labels = self._settle_labels()
        self.model.denoiser.to(asked.device)
        self.guidance: Guidance = 1.0 if asked.guidance is None else asked.guidance
        self.decode = _decoder(pipeline, asked.device)

    def __call__(self, index: Tensor) -> Tensor:
        return self.decode(self.before_decoding(index, self.guidance)).float().cpu()

    def before_decoding(self, index: Tensor, guidance: Guidance) -> Tensor:
        """What the sampler makes, by another guidance too: latents where there is a VAE."""
        rng, labels = StepRandom(self.asked.seed, 0, index.to(self.asked.device)), self.labels_of(index)
        return sample_rows(self.model, rng, labels, guidance=guidance)

    def labels_of(self, index: Tensor) -> Tensor:
        """The classes, or the prompts' numbers, of the images with these numbers, [B]."""
        return self.labels[index % len(self.labels)].to(self.asked.device)

    @property
    def told_classes(self) -> str:
        """The classes that images take in turn, for people; nothing where they have no names."""
        names = self.model.spec.class_names
        return told_classes(list(dict.fromkeys(self.labels.tolist())), names) if names else ""

    def _settle_labels(self) -> Tensor:
        """The classes, or the prompts' numbers, that images take in turn; prompts are encoded."""
        encoder, spec = encoder_of(self.model.spec), self.model.spec
        if encoder is None:
            if self.asked.prompts:
                raise UserError(f"--prompt: {self.model.source} takes no prompts")
            classes = spec.classes or tuple(range(spec.num_classes))
            return torch.tensor(label_numbers(self.asked.labels, spec) or classes or (0,))
        if self.asked.labels:
            raise UserError(f"--label: {self.model.source} knows no classes; give it a --prompt")
        if not self.asked.prompts:
            raise UserError(f"--prompt: {self.model.source} takes a prompt; give one, or a file of --prompts")
        loaded = encoder.load(self.asked.device, stays=False)
        prompts = list(self.asked.prompts)
        step = self.asked.encode_batch or len(prompts)
        batches = [prompts[place : place + step] for place in range(0, len(prompts), step)]
        *shards, empty = encoder.encode_all(loaded, batches, has_empty=True)
        conditions = PromptTable(shards, empty)
        self.model.denoiser.run_with(conditions=conditions)
        return torch.arange(len(prompts))


def _decoder(pipeline: Pipeline | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """From what the network makes to pixels."""
    if pipeline is None or not pipeline.has_vae:
        return lambda images: images
    family, vae = pipeline.family, pipeline.load_vae().to(device)

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        return family.to_images(vae, latents)

    return decode
