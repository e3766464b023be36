"""What kind of export a student allows, known before its first step: from text files and a network without weights."""

from dataclasses import dataclass, replace
from pathlib import Path as FilePath

from diffdistill.export.bundle import BundleError
from diffdistill.export.parts import check_parts, other_parts
from diffdistill.export.self_contained import network_code
from diffdistill.export.stock import fit_pipeline
from diffdistill.models.spec import ModelSpec, TrainedModel
from diffdistill.models.teachers import pipeline_of
from diffdistill.networks.lora import without_lora
from diffdistill.settings.schema import UserError


@dataclass(frozen=True)
class ExportKind:
    """kind: of the folder that `export` will write; None: none can be.  note: why it is not stock, or not at all."""

    kind: str | None
    note: str | None = None


def export_kind_of(spec: ModelSpec) -> ExportKind:
    """By the checks of `export` itself, which read no weight. Raises UserError where the student's pipeline is gone."""
    plain = replace(spec, base=None, model=replace(spec.model, network=without_lora(spec.model.network)))
    source = pipeline_of(plain)
    try:
        model = TrainedModel(plain.build_empty(), plain, FilePath("the student"))
        fit_pipeline(model)
        return ExportKind("stock")
    except UserError as error:
        note = getattr(error, "reason", str(error))
    try:
        if source is not None:
            check_parts(source, other_parts(source))
        network_code(model, source)
        return ExportKind("self-contained", note)
    except (UserError, BundleError) as error:
        return ExportKind(None, str(error))
