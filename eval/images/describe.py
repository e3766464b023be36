"""What a model on disk makes, before it is loaded: from its text files, or from an exported folder's own code."""

from dataclasses import dataclass
from pathlib import Path as FilePath

import torch

from diffdistill.eval.images.exported_folder import record_of, whole_shape
from diffdistill.eval.protocols.own import Made
from diffdistill.exported.image_generators import load_own_code, refuse_kohya
from diffdistill.models.encoders import encoder_of
from diffdistill.models.load import describe_model
from diffdistill.models.teachers import pipeline_of


@dataclass(frozen=True)
class Described:
    """made: what it makes.  class_names: of its classes, by number, where they are known."""

    made: Made
    class_names: tuple[str, ...]


def describe(place: str, *, trusts_code: bool = False) -> Described:
    """What the model at a place makes: a run, a checkpoint, a pipeline, an exported folder.

    trusts_code: whether an exported folder's own code may run.  Raises UserError if it is no model.
    """
    path = FilePath(place).expanduser()
    record = record_of(path)
    if record is not None and record.kind == "self-contained":
        own = load_own_code(str(path), trusts_code=trusts_code, device=torch.device("cpu"))
        takes_text = bool(own.model.takes_text)
        made = Made(whole_shape(own), 0 if takes_text else own.model.num_classes, takes_text)
        return Described(made, record.class_names)
    if record is not None:
        refuse_kohya(str(path), record)
    known = str(path) if path.exists() else place  # else a pipeline's name on the hub
    spec = describe_model(record.base if record is not None and record.base else known)
    pipeline = pipeline_of(spec)
    has_vae = pipeline is not None and pipeline.has_vae
    shape = (3, *pipeline.image_size) if pipeline and has_vae else spec.image_shape
    names = record.class_names if record is not None and record.class_names else spec.class_names
    return Described(Made(shape, spec.num_classes, encoder_of(spec) is not None), names)
