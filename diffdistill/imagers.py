"""What makes images: a run, a checkpoint, students behind a router, a pipeline of diffusers, or a folder that was
exported, with code of its own too, or as a LoRA file.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any, Protocol

import torch
from torch import Tensor

from diffdistill.conditions import Conditions
from diffdistill.denoiser import Denoiser, freeze
from diffdistill.draws import Draws
from diffdistill.export.lora_files import DIFFUSERS_FILE
from diffdistill.export.record import ExportRecord, read_record
from diffdistill.families import Pipeline, open_pipeline, pipeline_of
from diffdistill.guidance import Guidance
from diffdistill.inference import check_labels, sample_rows
from diffdistill.inputs import encoder_of
from diffdistill.model import TrainedModel, load_model
from diffdistill.negative import with_negative_prompt
from diffdistill.schema import UserError
from diffdistill.steps import with_steps


@dataclass(frozen=True)
class Asked:
    """What to draw. Image i is of noise (seed, i), and of the prompt or class i modulo their number.

    labels: none for all classes in turn.  guidance, num_steps: None for the model's own.
    trusts_code: whether the code of a folder may run.
    """

    prompts: Sequence[str] = ()
    labels: Sequence[int] = ()
    seed: int = 0
    guidance: Guidance | None = None
    num_steps: int | None = None
    ema: str | None = None
    negative_prompt: str | None = None
    negative_scale: float | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    trusts_code: bool = False


class Imager(Protocol):
    """num_evaluations: calls of the network for one image."""

    num_evaluations: int

    def __call__(self, index: Tensor) -> Tensor:
        """The images with these numbers [B], as [B, C, H, W] in [-1, 1] on the CPU."""
        ...


def open_imager(place: str, asked: Asked) -> Imager:
    """What makes the images of a place. Raises UserError on what it does not know."""
    record = read_record(FilePath(place))
    if record is not None and record.kind == "self-contained":
        return CodeImager(place, asked)
    return ModelImager(_load(place, record, asked), asked)


def timed_images(imager: Imager, count: int, batch: int) -> tuple[Tensor, float]:
    """[count, C, H, W], and the seconds of one image: noise to pixels, after an image that is not counted."""
    imager(torch.arange(1))
    begin = time.perf_counter()
    made = torch.cat([imager(index) for index in torch.arange(count).split(batch)])
    return made, (time.perf_counter() - begin) / count


class ModelImager:
    """By our own samplers; latents go through the pipeline's VAE."""

    def __init__(self, model: TrainedModel, asked: Asked) -> None:
        """Raises UserError on prompts, classes, steps and guidance that do not go with the model."""
        sampler = model.spec.sampler
        if asked.num_steps is not None:
            sampler = with_steps(sampler, model.denoiser.path, asked.num_steps)  # type: ignore[assignment]
        self.model = replace(model, spec=replace(model.spec, sampler=sampler))
        self.asked, self.num_evaluations = asked, sampler.num_evaluations
        pipeline = pipeline_of(model.spec)
        self.labels = self._settle_labels()
        self.model.denoiser.to(asked.device)
        self.guidance = 1.0 if asked.guidance is None else asked.guidance
        self.decode = _decoder(pipeline, asked.device)

    def __call__(self, index: Tensor) -> Tensor:
        labels = self.labels[index % len(self.labels)].to(self.asked.device)
        index = index.to(self.asked.device)
        made = sample_rows(self.model, Draws(self.asked.seed, 0, index), labels, guidance=self.guidance)
        return self.decode(made).float().cpu()

    def _settle_labels(self) -> Tensor:
        """The classes, or the prompts' numbers, that images take in turn; prompts are encoded."""
        encoder, spec = encoder_of(self.model.spec), self.model.spec
        if encoder is None:
            if self.asked.prompts:
                raise UserError(f"--prompt: {self.model.source} takes no prompts")
            classes = spec.classes or tuple(range(spec.num_classes))
            check_labels(self.asked.labels, classes, spec.num_classes)
            return torch.tensor(tuple(self.asked.labels) or classes or (0,))
        if self.asked.labels:
            raise UserError(f"--label: {self.model.source} knows no classes; give it a --prompt")
        if not self.asked.prompts:
            raise UserError(f"--prompt: {self.model.source} draws what a prompt says; give one, or a file of --prompts")
        loaded = encoder.load(self.asked.device)
        prompts = list(self.asked.prompts)
        conditions = Conditions([encoder.encode(loaded, prompts)], encoder.encode_empty(loaded))
        for part in self.model.denoiser.modules():  # students behind a router are denoisers too
            if isinstance(part, Denoiser):
                part.conditions = conditions
        return torch.arange(len(prompts))


class CodeImager:
    """By a folder's own pipeline, whose code runs."""

    def __init__(self, place: str, asked: Asked) -> None:
        """Raises UserError unless the code may run, and on what the pipeline does not know."""
        if not asked.trusts_code:
            raise UserError(f"{place}: holds code of its own, {place}/pipeline.py; look at it, and add --trust-code")
        if asked.ema or asked.negative_prompt is not None or not isinstance(asked.guidance, float | int | None):
            raise UserError(
                f"{place}: an exported folder takes a number for --guidance, no --ema, no --negative-prompt"
            )
        from diffusers import DiffusionPipeline

        loaded = DiffusionPipeline.from_pretrained(
            place, trust_remote_code=True, local_files_only=True, use_safetensors=True
        )
        self.pipeline: Any = loaded.to(asked.device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.asked, model = asked, self.pipeline.model
        self._check(place, model)
        self.argument = "prompt" if model.takes_text else "class_labels"
        self.told: Sequence[Any] = asked.prompts or asked.labels or range(model.num_classes)
        try:
            self.num_evaluations = int(model.sampler_for(asked.num_steps).num_evaluations)
        except ValueError as error:  # of the folder's own code
            raise UserError(f"--steps: {place}: {error}") from None

    def __call__(self, index: Tensor) -> Tensor:
        asked, shape = self.asked, self.pipeline.model.image_shape
        chosen = [self.told[int(i) % len(self.told)] for i in index] if self.told else []
        noise = Draws(asked.seed, 0, index).normal("noise", shape)
        made = self.pipeline(
            **{self.argument: chosen} if chosen else {},
            latents=noise,
            num_inference_steps=asked.num_steps,
            guidance_scale=asked.guidance,
            generator=torch.Generator().manual_seed(asked.seed),
            output_type="pt",
        ).images
        return made.float().cpu() * 2 - 1

    def _check(self, place: str, model: Any) -> None:
        if model.takes_text != bool(self.asked.prompts):
            raise UserError(f"--prompt: {place} {'needs one' if model.takes_text else 'takes none'}")
        classes = () if model.takes_text else tuple(range(model.num_classes))
        check_labels(self.asked.labels, classes, model.num_classes)


def _load(place: str, record: ExportRecord | None, asked: Asked) -> TrainedModel:
    """A model; an exported one with the sampler that it was exported with."""
    if record is None:
        found = load_model(place, ema=asked.ema)
    elif record.kind == "kohya":
        raise UserError(f"{place}: a LoRA file in kohya's keys, for ComfyUI and its like; sample the run itself")
    else:
        base = place if record.base is None else record.base
        found = load_model(base)
        if record.base is not None:
            found = _with_lora_file(found, FilePath(place))
        found = replace(found, spec=replace(found.spec, sampler=record.sampler), source=FilePath(place))
    return with_negative_prompt(found, asked.negative_prompt, asked.negative_scale)


def _with_lora_file(model: TrainedModel, folder: FilePath) -> TrainedModel:
    """A pipeline's network with the factors of a file, read by diffusers."""
    assert model.spec.pipeline is not None
    part = open_pipeline(model.spec.pipeline).family.network
    net: Any = model.denoiser.net
    try:
        net.model.load_lora_adapter(str(folder), prefix=part, weight_name=DIFFUSERS_FILE, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{folder / DIFFUSERS_FILE}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    freeze(net)
    return model


def _decoder(pipeline: Pipeline | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """From what the network makes to pixels."""
    if pipeline is None or not pipeline.has_vae:
        return lambda images: images
    family, vae = pipeline.family, pipeline.load_vae().to(device)

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        return family.to_images(vae, latents)

    return decode
