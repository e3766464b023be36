"""From a config and a teacher to the student's description and the method's problem."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from diffdistill.data.buckets import BucketedImages
from diffdistill.data.classes import class_names_of, classes_with_images, same_names, told_classes
from diffdistill.data.source import ImageSource
from diffdistill.diffusion.guidance_rules import LINEAR, AnyGuidanceRule
from diffdistill.distillation.method import Method, Problem
from diffdistill.models.encoders import encoder_of
from diffdistill.models.load import TrainedPlayers, load_players
from diffdistill.models.spec import ModelSpec, TrainedModel
from diffdistill.models.teachers import find_family
from diffdistill.networks.diffusers_model import DiffusersConfig
from diffdistill.networks.lora import LoRAConfig, fingerprint, lora_of, settings_for, without_lora
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import differences, dump
from diffdistill.training.config import RunConfig
from diffdistill.training.inputs import Inputs


def resolve_models(
    config: RunConfig,
    inputs: Inputs,
    teacher: TrainedModel | None,
    teachers: Mapping[str, TrainedModel],
    start: str | None,
    *,
    is_checked: bool = False,
) -> tuple[ModelSpec, Problem]:
    """The student's description and the method's problem, from the teacher or from `model`.

    start: where the run of `init` is.  is_checked: it is a checkpoint whose hashes have been checked.
    """
    check_models(config, teacher)
    check_teachers(config, teacher, teachers)
    teacher, teachers = _guided(config, inputs, teacher, teachers)
    base = teacher.denoiser if teacher else None
    initial = load_players(start, base=base, is_checked=is_checked) if start else None
    check_lora(config, teacher, initial)
    if teacher and initial:
        for player in initial.denoisers.values():
            player.run_with(conditions=inputs.conditions, guidance_rule=teacher.denoiser.runtime.guidance_rule)
    problem = _problem_of(config, inputs, teacher, teachers, initial)
    spec = describe_student(config, problem, teacher.spec if teacher else None, initial.spec if initial else None)
    if teacher and config.model is None:
        check_started_network(config, initial.spec if initial else teacher.spec, teacher, teachers)
    if spec.model.path != problem.path:
        raise UserError("model.path: must be the teacher's")
    problem = replace(problem, classes=settle_classes(config.method, problem, inputs, teacher))
    spec = _complete(spec, config, problem, inputs, teacher, initial)
    if config.model is None and teacher and spec.model == teacher.spec.model:
        return spec, problem
    with seeded(config.train.seed):
        network = spec.build()
        network.run_with(conditions=inputs.conditions)
        factors = lora_of(network)
        if factors:
            assert teacher is not None
            factors.mount(teacher.denoiser.net)
        return spec, replace(problem, network=network)


def _guided(
    config: RunConfig, inputs: Inputs, teacher: TrainedModel | None, teachers: Mapping[str, TrainedModel]
) -> tuple[TrainedModel | None, Mapping[str, TrainedModel]]:
    """The teachers with the config's guidance rule and the data's conditions.

    Raises UserError if the data's images have another shape.
    """
    if teacher is None:
        return None, teachers
    teacher = with_rule(teacher, config.guidance_rule)
    teachers = {name: with_rule(other, config.guidance_rule) for name, other in teachers.items()}
    for one in (teacher, *teachers.values()):
        one.denoiser.run_with(conditions=inputs.conditions)
    shape = inputs.source.image_shape
    if teacher.spec.image_shape != shape:
        raise UserError(f"data: images are {shape}, but the teacher's are {teacher.spec.image_shape}")
    return teacher, teachers


def _problem_of(
    config: RunConfig,
    inputs: Inputs,
    teacher: TrainedModel | None,
    teachers: Mapping[str, TrainedModel],
    initial: TrainedPlayers | None,
) -> Problem:
    """What the method is given: shapes, classes, path and the networks that a player may start from."""
    source = inputs.source
    return Problem(
        source.image_shape,
        teacher.denoiser.num_classes if teacher else len(inputs.conditions or ()) or source.num_classes,
        teacher.spec.model.path if teacher else config.model.path,  # type: ignore[union-attr]
        teacher=teacher.denoiser if teacher else None,
        initial=initial.denoisers if initial else {},
        num_steps=config.train.steps,
        batch_size=config.train.global_batch_size,
        lora=config.lora,
        teachers={name: other.denoiser for name, other in teachers.items()},
        starts=config.starts,
        image_shapes=source.shapes if isinstance(source, BucketedImages) else (),
        data=source,
    )


def _complete(
    spec: ModelSpec,
    config: RunConfig,
    problem: Problem,
    inputs: Inputs,
    teacher: TrainedModel | None,
    initial: TrainedPlayers | None,
) -> ModelSpec:
    """The description with all but its network and sampler: classes, router, quantisation, negative prompt, base."""
    router = config.method.router(problem)  # of prompts, which have numbers in this run alone
    known = () if router else problem.classes
    spec = replace(spec, classes=known, class_names=settle_names(inputs, teacher, initial))
    spec = replace(spec, router=router, qat=config.qat)
    if config.negative_prompt is not None:
        amount = config.negative_scale
        usual = sum(amount) / 2 if isinstance(amount, tuple) else amount  # of a range: its middle, wherever it samples
        spec = replace(spec, negative_prompt=config.negative_prompt, negative_scale=usual)
    if teacher and any(config.lora.values()):
        spec = replace(spec, base=fingerprint(teacher.denoiser.net))
    return spec


def with_rule(teacher: TrainedModel, rule: AnyGuidanceRule | None) -> TrainedModel:
    """The teacher, guided by this rule; None: by its own. Raises UserError where its network is told w."""
    if rule is None:
        return teacher
    if "guidance_input" in teacher.denoiser.net.accepts:
        raise UserError("guidance_rule: the teacher takes the scale as input; leave it out")
    teacher.denoiser.run_with(guidance_rule=rule)
    return replace(teacher, spec=replace(teacher.spec, model=replace(teacher.spec.model, guidance_rule=rule)))


def settle_classes(method: Method, problem: Problem, inputs: Inputs, teacher: TrainedModel | None) -> tuple[int, ...]:
    """The classes that a run is about: the method's, or those that its teacher, or else a real image, knows."""
    chosen = method.classes(problem, inputs.source)
    if chosen or inputs.conditions is not None or not problem.num_classes:
        return chosen
    return teacher.spec.classes if teacher else classes_with_images(inputs.source)


def settle_names(inputs: Inputs, teacher: TrainedModel | None, initial: TrainedPlayers | None) -> tuple[str, ...]:
    """The names of a student's classes: its teacher's, or else the data's.

    Raises UserError if the run of `init` has others.
    """
    if teacher is None:
        return () if inputs.conditions is not None else class_names_of(inputs.source)
    names = teacher.spec.class_names
    check_same_classes("init", initial.spec.class_names if initial else (), names)
    return names


def check_same_classes(what: str, names: tuple[str, ...], teachers: tuple[str, ...]) -> None:
    """Raise UserError if both sides name their classes, and otherwise."""
    if not same_names(names, teachers):
        told = " and ".join(told_classes(range(len(known)), known) for known in (names, teachers))
        raise UserError(f"{what}: its classes differ from those of `teacher`: {told}")


def describe_student(
    config: RunConfig, problem: Problem, teacher: ModelSpec | None, initial: ModelSpec | None
) -> ModelSpec:
    """The student's network and sampler: the config's `model`, or what the method makes of its origin's."""
    method, sampler = config.method, config.method.sampler(problem)
    if config.model is not None:
        model = config.model
        if teacher and model.guidance_rule == LINEAR:  # unless `model` says another, it is guided as its teacher
            model = replace(model, guidance_rule=teacher.model.guidance_rule)
        class_dropout = teacher.class_dropout if teacher else getattr(method, "class_dropout", 0.0)
        return ModelSpec(
            model=model,
            image_shape=problem.image_shape,
            num_classes=teacher.num_classes if teacher else 0 if config.text_encoder else problem.num_classes,
            class_dropout=class_dropout,
            sampler=sampler,
            text_encoder=teacher.text_encoder if teacher else config.text_encoder,
        )
    started = problem.starts.get(method.student)
    if teacher and started:
        rule: Any = problem.start_of(method.student).runtime.guidance_rule
        teacher = replace(teacher, model=replace(teacher.model, guidance_rule=rule))
    if initial:
        model = replace(initial.model, guidance_rule=teacher.model.guidance_rule) if teacher else initial.model
        return replace(initial, sampler=sampler, model=model)
    assert teacher is not None
    origin: Any = teacher.model.network
    lora = settings_for(method.student, config.lora)
    if lora:
        origin = LoRAConfig(base=origin, lora=lora)
    network, predicts = method.student_model(origin, teacher.model.predicts, problem)
    return replace(teacher, sampler=sampler, model=replace(teacher.model, network=network, predicts=predicts))


def check_started_network(
    config: RunConfig, described: ModelSpec, teacher: TrainedModel, teachers: Mapping[str, TrainedModel]
) -> None:
    """Raise UserError where `starts` makes the student a network of equal shapes that means something else by them, as
    by another number of heads.  described: what the student is said to start as, and would be saved as."""
    start = config.starts.get(config.method.student, "")
    other = {"teacher": teacher, **{f"teacher_{name}": one for name, one in teachers.items()}}.get(start)
    if other is None:
        return
    network, own = ({"network": dump(_in_full(without_lora(spec.model.network)))} for spec in (other.spec, described))
    told = [
        f"{key} = {was!r} and not {now!r}"
        for key, was, now in differences(network, own)
        if (last := key.rpartition(".")[2]) not in ("dropout", "key") and not last.startswith("_")
    ]
    if told:
        raise UserError(
            f"starts.{config.method.student} = {start!r}: is another network than the student's ({', '.join(told)});"
            f" name it by `teacher` or `init`"
        )


def _in_full(network: Any) -> Any:
    """A network's settings, those of a pipeline's with diffusers' defaults."""
    if not isinstance(network, DiffusersConfig):
        return network
    return replace(network, options=find_family(network.family).full_options(network.options))


def check_models(config: RunConfig, teacher: TrainedModel | None) -> None:
    """Raise UserError unless the config names the models that its method needs."""
    if config.method.trains_network:
        if config.model is None or teacher is None:
            raise UserError(f"{config.method.name} needs both: `model`, the student's, and `teacher`, a run's folder")
    elif (config.model is None) == (teacher is None):
        raise UserError("give either `model` (to pretrain) or `teacher` (to distil), not both or neither")
    if config.guidance_rule and teacher is None:
        raise UserError("guidance_rule: is for teachers, and there is none; set model.guidance_rule")
    if config.init and teacher is None:
        raise UserError("init: needs a `teacher`; to continue a run, use --resume")


def check_teachers(config: RunConfig, first: TrainedModel | None, teachers: Mapping[str, TrainedModel]) -> None:
    """Raise UserError for a further teacher that nothing asks, or that cannot stand beside the first one."""
    for name, other in teachers.items():
        key = f"teachers.{name} = {config.teachers.get(name)!r}"
        if first is None:
            raise UserError(f"{key}: needs `teacher` as well")
        if not config.method.takes_teachers and f"teacher_{name}" not in config.starts.values():
            why = f"{config.method.name} asks one teacher, and no player starts as teacher_{name}"
            raise UserError(f"{key}: {why}; leave it out, or name it in `starts`")
        check_same_classes(key, other.spec.class_names, first.spec.class_names)
        encoders = [encoder and encoder.files for encoder in (encoder_of(first.spec), encoder_of(other.spec))]
        for what, is_same in (
            ("path", other.spec.model.path == first.spec.model.path),
            ("image_shape", other.spec.image_shape == first.spec.image_shape),
            ("num_classes", other.denoiser.num_classes == first.denoiser.num_classes),
            ("text encoder", encoders[0] == encoders[1]),
        ):
            if not is_same:
                raise UserError(f"{key}: its {what} differs from that of `teacher`")


def check_lora(config: RunConfig, teacher: TrainedModel | None, initial: TrainedPlayers | None) -> None:
    """Raise UserError where there is no teacher for the factors to stand over, or another network would start."""
    if not any(config.lora.values()):
        return
    method = config.method
    if teacher is None or (method.trains_network and settings_for(method.student, config.lora)):
        raise UserError(f"lora: is applied to a teacher, but {method.name} trains a new network; leave it out")
    if config.qat and settings_for(method.student, config.lora):
        raise UserError("qat: rounds the student's weights, which lora does not train; use one of the two")
    for name, denoiser in initial.denoisers.items() if initial else ():
        if settings_for(name, config.lora) and not lora_of(denoiser):
            raise UserError(
                f"init: its {name} was trained in full, and LoRA is applied to the teacher; use one of the two"
            )


def check_labels(method: Method, problem: Problem, source: ImageSource) -> None:
    """Raise UserError if the data's labels are not the teacher's classes."""
    known, labels = problem.num_classes, source.labels
    if not known or not method.needs_images:
        return
    if labels is None:
        raise UserError(f"data: has no labels, but the teacher was trained on {known} classes; give it labels")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= known:
        raise UserError(f"data: labels go from {low} to {high}; the teacher has 0 to {known - 1}")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """New networks depend on the run's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
