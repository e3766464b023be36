"""`diffdistill export`: from a run to a folder that others load."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Literal, get_args

from diffdistill import __version__
from diffdistill.export.card import CardFacts, Scores, how_near, read_state, write_card
from diffdistill.export.expected import check_of
from diffdistill.export.habits import habits_of
from diffdistill.export.lora_files import write_lora
from diffdistill.export.own_pipeline import write_own_pipeline
from diffdistill.export.push import check_push, push
from diffdistill.export.quantised import note_grid, store_in_bits
from diffdistill.export.record import RECORD, ExportRecord, Kind, guidance_of
from diffdistill.export.self_contained import write_self_contained
from diffdistill.export.stock import NotStock, StockFolder, write_stock
from diffdistill.export.usage import folder_code
from diffdistill.export.verify import Check, verify
from diffdistill.models.load import load_model, merge_model
from diffdistill.models.spec import TrainedModel
from diffdistill.models.styles import at_style, styles_of
from diffdistill.networks.adapters import AdaptedConfig
from diffdistill.networks.guided import GuidedConfig
from diffdistill.settings.links import refuse_link
from diffdistill.settings.schema import UserError
from diffdistill.storage.atomic import follow_umask

AnyKind = Literal["auto", "stock", "self-contained", "lora", "kohya"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """kind: auto is stock where diffusers' classes can do what the student does, else self-contained.
    ema: one of the run's `more_emas`.  style: of a student of several, as `parse_style`.
    guidance_scale: of calls that name none, for a student that takes it as input;
    default the middle of what it was trained on.  has_own_pipeline: whether a stock folder gets a class of pipeline
    whose plain call is right.  licence: of the teacher, where its own card does not say.
    is_quantised: whether a stock folder holds the bits that a student was trained for, by torchao.
    scores: gives what was measured of a place.  push: a repository on the hub.  first_steps: of the teacher; refused.
    """

    kind: AnyKind = "auto"
    ema: str | None = None
    style: str | None = None
    is_quantised: bool = False
    guidance_scale: float | None = None
    has_own_pipeline: bool = False
    is_verified: bool = True
    licence: str | None = None
    scores: Scores | None = None
    push: str | None = None
    is_public: bool = False
    first_steps: int = 0


@dataclass(frozen=True)
class Exported:
    """folder: what was written.  difference: the greatest between its images and the run's; None: not looked at.
    note: why it is not stock, where that was left open.  address: on the hub."""

    folder: FilePath
    kind: Kind
    difference: float | None
    note: str | None = None
    address: str | None = None

    @property
    def summary(self) -> str:
        why = f" ({self.note})" if self.note else ""
        checked = (
            "not verified"
            if self.difference is None
            else f"the run's images {how_near(self.difference)} without diffdistill"
        )
        pushed = f"; pushed to {self.address}" if self.address else ""
        return f"{self.folder}: {self.kind}{why}, {checked}{pushed}"


@dataclass(frozen=True)
class Written:
    """check: what will show that the folder works.  note: why it is not stock, where that was left open."""

    kind: Kind
    check: Check
    facts: CardFacts
    note: str | None = None


def check_kind(kind: str) -> AnyKind:
    """Raise UserError on an unknown kind."""
    if kind not in get_args(AnyKind):
        raise UserError(f"--kind {kind}: choose from {', '.join(get_args(AnyKind))}")
    return kind  # type: ignore[return-value]


def export(place: str, folder: FilePath, options: ExportOptions) -> Exported:
    """Write the folder beside where it will be, load it where this package cannot be imported, and move it there.

    Raises UserError if the place is taken or the model cannot be exported so; ExportError if the folder does not do
    what the run does, and it is then not there.
    """
    if options.first_steps:
        raise UserError(
            f"--first-steps {options.first_steps}: a folder holds one network, and no pipeline of diffusers changes it "
            "between steps; export the student alone, and change the network from a callback (the page Export and "
            f"sample, The teacher's first steps), or sample {place} with --first-steps {options.first_steps}"
        )
    if options.push:
        check_push(options.push)
    _check_free(folder)
    with _built_beside(folder) as building:
        written = write(place, building, options)
        difference = verify([written.check])[0] if options.is_verified else None
        where = repr(options.push) if options.push else folder_code(folder)
        write_card(building, written.facts, name=folder.resolve().name, place=where, difference=difference)
    address = push(folder, options.push, is_public=options.is_public) if options.push else None
    return Exported(folder, written.kind, difference, written.note, address)


def write(place: str, folder: FilePath, options: ExportOptions) -> Written:
    """Write the folder, but for its card. Raises UserError."""
    trained = load_model(place, ema=options.ema, rounds=not options.is_quantised)
    if options.is_quantised and (trained.spec.qat is None or options.kind not in ("auto", "stock")):
        raise UserError("--quantised: is for --kind stock, and for a student that was trained with `qat`; leave it out")
    if trained.spec.negative_prompt is not None:
        raise UserError(f"{place}: uses a negative prompt, which an exported folder cannot have")
    if options.style is not None:
        trained = at_style(trained, options.style)
    elif names := styles_of(trained.spec):
        raise UserError(f"{place}: has several styles ({', '.join(names)}); choose one, or a mixture, with --style")
    model = merge_model(trained)
    scale = default_scale(model) if options.guidance_scale is None else options.guidance_scale
    if options.guidance_scale is not None and not takes_scale(model):
        raise UserError(f"--guidance {scale:g}: this student does not take the scale as input; leave it out")
    if options.has_own_pipeline and options.kind not in ("auto", "stock"):
        raise UserError(f"--own-pipeline: is for --kind stock, not {options.kind}")
    kind, note = options.kind, None
    if kind in ("auto", "stock"):
        try:
            stock = write_stock(model, folder)
            if options.is_quantised:
                store_in_bits(model, stock, folder)
            return _written(place, model, folder, "stock", stock, options)
        except UserError as error:
            if kind == "stock" or options.has_own_pipeline or options.is_quantised:
                raise UserError(f"--kind stock: {error}") from None
            kind, note = "self-contained", error.reason if isinstance(error, NotStock) else str(error)
    if kind == "self-contained":
        write_self_contained(model, folder, guidance_scale=scale)
        return _written(place, model, folder, "self-contained", None, options, scale=scale, note=note)
    assert kind in ("lora", "kohya")
    try:
        stock = write_lora(trained, folder, is_kohya=kind == "kohya")
    except UserError as error:
        raise UserError(f"--kind {kind}: {error}") from None
    return _written(place, model, folder, kind, stock, options)


def _written(
    place: str,
    model: TrainedModel,
    folder: FilePath,
    kind: Kind,
    stock: StockFolder | None,
    options: ExportOptions,
    *,
    scale: float = 1.0,
    note: str | None = None,
) -> Written:
    """What was written, and its record in the folder."""
    state = read_state(model)
    config = state.get("config", {})
    call: dict[str, Any] = dict(stock.call) if stock else {}
    count = model.spec.sampler.num_evaluations
    own = write_own_pipeline(folder, stock, count) if stock and options.has_own_pipeline else None
    record = ExportRecord(
        version=__version__,
        kind=kind,
        pipeline=stock.kind if stock else "DiffusionPipeline",
        call=call,
        sampler=model.spec.sampler,
        base=stock.source.place if stock and kind != "stock" else None,
        absent=_absent(stock, kind),
        own_pipeline=own,
        scheduler=type(stock.scheduler).__name__ if stock and kind != "stock" else None,
        teacher=state.get("teacher"),
        teacher_guidance=guidance_of(config["method"]) if config else 1.0,
        class_names=model.spec.class_names,
        classes=model.spec.classes,
    )
    record.write(folder)
    if model.spec.qat and not options.is_quantised:
        note_grid(model, folder)
    check = check_of(model, folder, record, guidance_scale=scale)
    habits = habits_of(stock) if stock else None
    facts = CardFacts(place, model, record, config, options.licence, options.scores, habits)
    return Written(kind, check, facts, note)


def _absent(stock: StockFolder | None, kind: Kind) -> tuple[str, ...]:
    """The parts that a pipeline is loaded without. A LoRA's is the teacher's, whose safety checker blackens images."""
    if stock is None:
        return ()
    has_checker = kind != "stock" and stock.source.class_of("safety_checker") is not None
    return (*stock.absent, *(["safety_checker"] if has_checker else []))


def takes_scale(model: TrainedModel) -> bool:
    """Whether the student was trained to be told the guidance scale."""
    network: Any = model.spec.model.network
    while network is not None and not isinstance(network, (AdaptedConfig, GuidedConfig)):
        network = getattr(network, "base", None)
    return network is not None


def default_scale(model: TrainedModel) -> float:
    """1, which is no guidance; for a student that is told the scale the middle of what it was trained on."""
    return guidance_of(read_state(model).get("config", {}).get("method", {})) if takes_scale(model) else 1.0


def _check_free(folder: FilePath) -> None:
    """Raise UserError if something else than an exported folder is there."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"--out {folder}: exists and is not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise UserError(f"--out {folder}: holds something other than an exported model; name a new folder")


def building_place(folder: FilePath) -> FilePath:
    """Where a folder is built; it is left there only by a process that was killed."""
    return folder.with_name(f".exporting-{folder.name}")


@contextmanager
def _built_beside(folder: FilePath) -> Iterator[FilePath]:
    """A folder to build in, which takes the place of `folder` when all went well, and is gone when it did not."""
    target = folder.resolve()
    building, old = building_place(target), target.with_name(f".replaced-{target.name}")
    try:
        building.parent.mkdir(parents=True, exist_ok=True)
        for left in (building, old):
            refuse_link(left)
            shutil.rmtree(left, ignore_errors=True)
        building.mkdir()
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written: {error.strerror}") from None
    try:
        yield building
        follow_umask(building)
        if target.exists():
            target.rename(old)
        building.rename(target)
    finally:
        for left in (building, old):
            shutil.rmtree(left, ignore_errors=True)
