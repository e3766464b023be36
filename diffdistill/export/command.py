"""`diffdistill export`: from a run to a folder that diffusers loads."""

from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Literal

from diffdistill.denoiser import Denoiser
from diffdistill.export.bundle import BundleError
from diffdistill.export.card import CardFacts, read_config, write_card
from diffdistill.export.expected import check_self_contained, check_stock
from diffdistill.export.self_contained import write_self_contained
from diffdistill.export.stock import write_stock
from diffdistill.export.verify import Check, verify
from diffdistill.model import TrainedModel, load_model, merge_model
from diffdistill.networks.diffusers_model import DiffusersNetwork
from diffdistill.schema import UserError

Kind = Literal["auto", "stock", "self-contained"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """kind: auto is stock where the network is one of diffusers' own.  ema: one of the run's `more_emas`.
    guidance_scale: of calls that name none, for a student that takes it as input; default the middle of what it was
    trained on.  licence: of the teacher, where its own card does not say."""

    kind: Kind = "auto"
    ema: str | None = None
    guidance_scale: float | None = None
    is_verified: bool = True
    licence: str | None = None
    records: FilePath | None = None


@dataclass(frozen=True)
class Exported:
    """folder: what was written.  difference: the greatest between its images and the run's; None: not looked at."""

    folder: FilePath
    kind: str
    difference: float | None


def export(place: str, folder: FilePath, options: ExportOptions) -> Exported:
    """Write the folder, and load it where this package cannot be imported.

    Raises UserError if the folder holds something else or the model cannot be exported so; ExportError if the folder
    does not do what the run does.
    """
    kind, check = write(place, folder, options)
    difference = verify([check])[0] if options.is_verified else None
    return Exported(folder, kind, difference)


def write(place: str, folder: FilePath, options: ExportOptions) -> tuple[str, Check]:
    """Write the folder. Returns its kind, and what will show that it works."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").exists():
        raise UserError(f"--out {folder}: holds something else; name a new folder")
    model = merge_model(load_model(place, ema=options.ema))
    is_stock = options.kind == "stock" or (options.kind == "auto" and isinstance(model.denoiser.net, DiffusersNetwork))
    if is_stock:
        stock = write_stock(model, folder)
        facts = CardFacts(place, model, stock.kind, stock.call, stock.source.folder)
        check = check_stock(model, folder, stock)
    else:
        scale = options.guidance_scale if options.guidance_scale is not None else default_scale(model)
        try:
            write_self_contained(model, folder, guidance_scale=scale)
        except BundleError as error:
            raise UserError(f"{place}: cannot be exported with code of its own: {error}") from None
        facts = CardFacts(place, model, None, {}, None)
        check = check_self_contained(model, folder, guidance_scale=scale)
    write_card(folder, facts, licence=options.licence, records=options.records)
    return ("stock" if is_stock else "self-contained"), check


def default_scale(model: TrainedModel) -> float:
    """1, which is no guidance; for a network that takes the scale as input the middle of what it was trained on."""
    denoiser: Denoiser = model.denoiser
    if "guidance_input" not in denoiser.net.accepts:  # type: ignore[operator]
        return 1.0
    trained: Any = read_config(model).get("method", {}).get("guidance")
    low, high = trained if isinstance(trained, list) else (trained or 1.0, trained or 1.0)
    return (float(low) + float(high)) / 2
