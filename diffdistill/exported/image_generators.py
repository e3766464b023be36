"""What makes images: a run, a checkpoint, students behind a router, a pipeline of diffusers, or a folder that was
exported, with code of its own too, or as a LoRA file.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from diffdistill.data.classes import told_classes
from diffdistill.diffusion.denoiser import freeze
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.threads import sampling_threads, threads
from diffdistill.export.lora_files import DIFFUSERS_FILE
from diffdistill.export.record import ExportRecord, read_record
from diffdistill.inference.draw import check_labels, number_of
from diffdistill.inference.image_generator import ImageGenerator, ModelImageGenerator, SampleRequest
from diffdistill.models.encoders import encoder_of
from diffdistill.models.load import load_model
from diffdistill.models.loading_bars import turn_off_loading_bars
from diffdistill.models.negative_prompts import with_negative_prompt
from diffdistill.models.spec import TrainedModel
from diffdistill.models.styles import at_style
from diffdistill.models.teachers import open_pipeline
from diffdistill.settings.schema import UserError


@dataclass(frozen=True)
class Opened:
    """The model of a place, loaded once.

    generator: what makes its images as a request asks; raises UserError on what the model does not know.
    image_shape: of its noise.  classes: those that it draws.  class_names: by number, where they are known.
    pipeline: of diffusers, that a model is of, where it is of one.
    """

    generator: Callable[[SampleRequest], ImageGenerator]
    image_shape: tuple[int, ...]
    takes_text: bool
    classes: tuple[int, ...]
    class_names: tuple[str, ...] = ()
    pipeline: str | None = None


def open_image_generator(place: str, asked: SampleRequest) -> ImageGenerator:
    """What makes the images of a place. Raises UserError on what it does not know."""
    return open_place(place, asked).generator(asked)


def open_place(place: str, asked: SampleRequest) -> Opened:
    """Load the model of a place for many requests, which differ in what is drawn and how, not in `ema`, `style`,
    `device` and negative prompts. Raises UserError if it cannot be loaded so."""
    record = read_record(FilePath(place))
    if record is not None and asked.style is not None:
        raise UserError(f"--style {asked.style}: an exported folder has one style; leave it out, or sample the run")
    if record is not None and record.kind == "self-contained":
        _check_request(place, asked)
        pipeline = load_own_code(place, trusts_code=asked.trusts_code, device=asked.device)
        generator, net = partial(CodeImageGenerator, place, pipeline, record), pipeline.model
        classes = () if net.takes_text else record.classes or tuple(range(net.num_classes))
        return Opened(generator, tuple(net.image_shape), net.takes_text, classes, record.class_names)
    model = _load(place, record, asked)
    spec, takes_text = model.spec, encoder_of(model.spec) is not None
    classes = () if takes_text else spec.classes or tuple(range(spec.num_classes))
    drawn = partial(ModelImageGenerator, model)
    return Opened(drawn, spec.image_shape, takes_text, classes, spec.class_names, spec.pipeline)


def open_teacher(place: str, asked: SampleRequest, named: Sequence[str]) -> Opened:
    """As `open_place`, of a place that a student names; its code runs only where the user named that folder too.

    named: the places on the command line.
    """
    if FilePath(place).resolve() in {FilePath(one).resolve() for one in named}:
        return open_place(place, asked)
    record = read_record(FilePath(place))
    if asked.trusts_code and record is not None and record.kind == "self-contained":
        raise UserError(
            f"{place}: the teacher holds its own code, {place}/pipeline.py, and --trust-code covers only folders that "
            f"you name; read it, then add --teacher-from {place}"
        )
    return open_place(place, replace(asked, trusts_code=False))


def timed_images(imager: ImageGenerator, count: int, batch: int) -> tuple[Tensor, float]:
    """[count, C, H, W], and the seconds of one image: noise to pixels, after an image that is not counted."""
    imager(torch.arange(1))
    begin = time.perf_counter()
    made = torch.cat([imager(index) for index in torch.arange(count).split(batch)])
    return made, (time.perf_counter() - begin) / count


class CodeImageGenerator:
    """By a folder's own pipeline, whose code runs."""

    def __init__(self, place: str, pipeline: Any, record: ExportRecord, asked: SampleRequest) -> None:
        """pipeline: as `load_own_code`.  Raises UserError on what the pipeline does not know."""
        _check_request(place, asked)
        self.pipeline, self.asked, model = pipeline, asked, pipeline.model
        self.names = record.class_names
        classes = record.classes or range(model.num_classes)
        labels = [number_of(label, self.names) for label in asked.labels]
        self.told: Sequence[Any] = asked.prompts or labels or classes
        self._check(place, model, classes)
        self.argument = "prompt" if model.takes_text else "class_labels"
        try:
            self.num_evaluations = int(model.sampler_for(asked.num_steps).num_evaluations)
        except ValueError as error:  # of the folder's own code
            raise UserError(f"--steps: {place}: {error}") from None

    def __call__(self, index: Tensor) -> Tensor:
        asked, shape = self.asked, self.pipeline.model.image_shape
        chosen = [self.told[int(i) % len(self.told)] for i in index] if self.told else []
        noise = StepRandom(asked.seed, 0, index).normal("noise", shape)
        with threads(sampling_threads(self.pipeline.model, shape)):
            made = self.pipeline(
                **{self.argument: chosen} if chosen else {},
                latents=noise,
                num_inference_steps=asked.num_steps,
                guidance_scale=asked.guidance,
                generator=torch.Generator().manual_seed(asked.seed),
                output_type="pt",
            ).images
        return made.float().cpu() * 2 - 1

    @property
    def told_classes(self) -> str:
        """As of ModelImageGenerator."""
        return told_classes(list(dict.fromkeys(self.told)), self.names) if self.names and not self.asked.prompts else ""

    def _check(self, place: str, model: Any, known: Sequence[int]) -> None:
        if model.takes_text != bool(self.asked.prompts):
            raise UserError(f"--prompt: {place} {'needs one' if model.takes_text else 'takes none'}")
        classes = () if model.takes_text else tuple(known)
        check_labels(self.told if self.asked.labels else (), classes, model.num_classes, self.names)


def _check_request(place: str, asked: SampleRequest) -> None:
    if asked.ema or asked.negative_prompt is not None or not isinstance(asked.guidance, float | int | None):
        raise UserError(f"{place}: an exported folder takes a number for --guidance, no --ema, no --negative-prompt")


def load_own_code(place: str, *, trusts_code: bool, device: torch.device) -> Any:
    """A folder's own pipeline. Raises UserError unless its code may run."""
    if not trusts_code:
        raise UserError(f"{place}: holds its own code, {place}/pipeline.py; read it, then add --trust-code")
    from diffusers import DiffusionPipeline

    turn_off_loading_bars()
    try:
        loaded = DiffusionPipeline.from_pretrained(
            place, trust_remote_code=True, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32
        )
    except Exception as error:  # whatever that code does
        told = " ".join(str(error).split())[:200]
        raise UserError(f"{place}: its own code cannot be loaded: {type(error).__name__}: {told}") from None
    pipeline: Any = loaded.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def refuse_kohya(place: str, record: ExportRecord) -> None:
    """Raise UserError for a folder that other tools read."""
    if record.kind == "kohya":
        raise UserError(f"{place}: a LoRA file in kohya's keys, for ComfyUI and similar tools; name the run instead")


def load_exported(place: str, record: ExportRecord) -> TrainedModel:
    """The model of a folder without code of its own, with the sampler that it was exported with. Raises UserError."""
    refuse_kohya(place, record)
    base = place if record.base is None else record.base
    found = load_model(base)
    if record.base is not None:
        found = _with_lora_file(found, FilePath(place))
    names = record.class_names or found.spec.class_names
    spec = replace(found.spec, sampler=record.sampler, class_names=names, classes=record.classes)
    return replace(found, spec=spec, source=FilePath(place))


def _load(place: str, record: ExportRecord | None, asked: SampleRequest) -> TrainedModel:
    """A run's model, or an exported folder's."""
    if record is None:
        found = load_model(place, ema=asked.ema)
        found = found if asked.style is None else at_style(found, asked.style)
    else:
        found = load_exported(place, record)
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
