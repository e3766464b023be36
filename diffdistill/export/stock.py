"""A pipeline of diffusers' own classes with a student for its network: no code of ours is needed to load it."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

from diffdistill.diffusion.router import RoutedDenoiser
from diffdistill.export.parts import check_parts, copy_parts, other_parts
from diffdistill.export.schedulers import StockSteps, stock_steps
from diffdistill.export.self_contained import write_json
from diffdistill.models.spec import TrainedModel
from diffdistill.models.teachers import Pipeline, open_pipeline
from diffdistill.models.teachers.class_labels import ID2LABEL
from diffdistill.models.teachers.image_size import write_size
from diffdistill.models.teachers.installed import diffusers_class
from diffdistill.models.teachers.pipeline import INDEX, read_json
from diffdistill.networks.diffusers_model import DiffusersNetwork
from diffdistill.settings.schema import UserError


class NotStock(UserError):  # noqa: N818
    """diffusers' classes alone cannot be what a model is; code of its own can.  reason: why they cannot."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; use --kind self-contained")
        self.reason = reason


@dataclass(frozen=True)
class StockFolder:
    """source: the teacher's pipeline.  kind: the class that loads the folder.  call: how it is called.
    scheduler: of the student's steps.  net: the network that the pipeline is left with, for what it accepts.
    says_size: whether the network's config says of which size the images are, where the pipeline asks it.
    """

    source: Pipeline
    kind: str
    call: Mapping[str, Any]
    scheduler: Any
    net: DiffusersNetwork
    says_size: bool = True

    @property
    def absent(self) -> tuple[str, ...]:
        """The parts that its class has to be told are not there."""
        kind = diffusers_class(self.kind)
        asked = inspect.signature(kind.__init__).parameters.values()
        needed = {given.name for given in asked if given.default is given.empty} - {"self", *kind._optional_components}
        return tuple(sorted(name for name in needed if self.source.index.get(name) in (None, [None, None])))


def write_stock(model: TrainedModel, folder: FilePath) -> StockFolder:
    """Write the teacher's pipeline with the student's network and the scheduler of its steps.

    model: without LoRA.  Raises UserError, before anything is written, if diffusers' classes cannot say what the
    student does.
    """
    source, steps = fit_pipeline(model)
    net: Any = model.denoiser.net
    kind = source.family.stock_pipeline or str(source.index["_class_name"])
    names = other_parts(source)
    copy_parts(source, folder, names)
    written = source.family.stock_network(net.model)
    written.save_pretrained(folder / source.family.network)  # type: ignore[operator]
    says_size = _write_size(source, folder)
    steps.scheduler.save_pretrained(folder / "scheduler")
    missing = {name: [None, None] for name, value in source.index.items() if isinstance(value, list)}
    parts = {name: source.index[name] for name in (source.family.network, *names)}
    settings = {name: value for name, value in source.index.items() if not isinstance(value, list)}
    settings.pop("_name_or_path", None)
    if source.is_variant:  # whose settings its plain pipeline does not take
        taken = inspect.signature(diffusers_class(kind).__init__).parameters
        settings = {name: value for name, value in settings.items() if name in taken or name.startswith("_")}
    if model.spec.class_names and kind == "DiTPipeline":
        settings[ID2LABEL] = {str(number): name for number, name in enumerate(model.spec.class_names)}
    if "requires_safety_checker" in settings:
        settings["requires_safety_checker"] = False
    scheduler = {"scheduler": ["diffusers", type(steps.scheduler).__name__]}
    write_json(folder / INDEX, {**settings, **missing, **parts, **scheduler, "_class_name": kind})
    wrapped = source.family.wrap(written, net.num_classes, 0.0)
    return replace(describe(source, steps, kind, wrapped), says_size=says_size)


def _write_size(source: Pipeline, folder: FilePath) -> bool:
    """Let the folder say of which size its images are, where the teacher was told another than its config's. Returns
    whether diffusers' own pipeline reads it."""
    if source.asked_size is None:
        return True
    _, height, width = source.spec.image_shape
    if source.family.config_sizes == "any" or (source.family.config_sizes == "square" and height == width):
        file = folder / source.family.network / "config.json"
        write_json(file, {**read_json(file), "sample_size": height if height == width else [height, width]})
        return True
    write_size(folder, source.asked_size)
    return False


def describe(source: Pipeline, steps: StockSteps, kind: str, net: DiffusersNetwork) -> StockFolder:
    """How a pipeline of class `kind` is called for the steps of a student, and its network."""
    import diffusers

    call = {**steps.call, **source.family.call(source.image_size)}
    if source.asked_size and "height" in inspect.signature(getattr(diffusers, kind).__call__).parameters:
        call |= dict(zip(("height", "width"), source.asked_size, strict=True))
    return StockFolder(source, kind, call, steps.scheduler, net, says_size=source.asked_size is None)


def fit_pipeline(model: TrainedModel) -> tuple[Pipeline, StockSteps]:
    """The teacher's pipeline, and the scheduler and the call by which it makes the student's steps.

    Raises NotStock if there are none, UserError where the steps have no scheduler, or the other parts cannot be copied.
    """
    net = model.denoiser.net
    if isinstance(model.denoiser, RoutedDenoiser):
        raise NotStock("several students behind a router are no pipeline of diffusers")
    if not isinstance(net, DiffusersNetwork):
        raise NotStock(f"{type(net).__name__} is not one of diffusers' networks")
    if model.spec.pipeline is None:
        raise NotStock(f"{model.source}: comes from no pipeline of diffusers")
    source = open_pipeline(model.spec.pipeline)
    if not source.family.has_stock_pipeline(source.options):
        raise NotStock("diffusers has no pipeline that gives this network its classes")
    check_parts(source, other_parts(source))
    scheduler = read_json(source.scheduler_file)
    return source, stock_steps(model.denoiser, model.spec.sampler, scheduler, source.family.steps_argument)
