"""What `import diffdistill as dd` offers, for editors and type checkers; `__init__.py` imports each when it is used."""

from typing import TypeVar

from diffdistill.data.source import ImageSource as ImageSource
from diffdistill.data.source import TensorImages as TensorImages
from diffdistill.data.torch_dataset import as_source as as_source
from diffdistill.diffusion.cond import Cond as Cond
from diffdistill.diffusion.denoiser import Denoiser as Denoiser
from diffdistill.diffusion.denoiser import Network as Network
from diffdistill.diffusion.path import EDM as EDM
from diffdistill.diffusion.path import Flow as Flow
from diffdistill.diffusion.path import VPCosine as VPCosine
from diffdistill.diffusion.path import VPDiscrete as VPDiscrete
from diffdistill.diffusion.path import VPLinear as VPLinear
from diffdistill.diffusion.sampling import DDIM as DDIM
from diffdistill.diffusion.sampling import TCD as TCD
from diffdistill.diffusion.sampling import FewSteps as FewSteps
from diffdistill.diffusion.sampling import Heun as Heun
from diffdistill.diffusion.sampling import OneCall as OneCall
from diffdistill.diffusion.step_random import StepRandom as StepRandom
from diffdistill.distillation.method import Batch as Batch
from diffdistill.distillation.method import Loss as Loss
from diffdistill.distillation.method import Method as Method
from diffdistill.distillation.method import Players as Players
from diffdistill.distillation.method import Problem as Problem
from diffdistill.distillation.method import Update as Update
from diffdistill.distillation.wrapper import Wrapper as Wrapper
from diffdistill.eval.features.extractors import Extractor as Extractor
from diffdistill.export.run import ExportOptions as ExportOptions
from diffdistill.export.run import export as export_model
from diffdistill.inference.draw import sample_images as sample_images
from diffdistill.models.given import give_teacher as give_teacher
from diffdistill.models.load import describe_model as describe_model
from diffdistill.models.load import join_students as join_students
from diffdistill.models.load import load_model as load_model
from diffdistill.models.load import merge_model as merge_model
from diffdistill.models.spec import ModelConfig as ModelConfig
from diffdistill.models.teachers.family import Family as Family
from diffdistill.networks.given import as_denoiser as as_denoiser
from diffdistill.settings.schema import UserError as UserError
from diffdistill.settings.schema import field as field
from diffdistill.settings.schema import schema as schema
from diffdistill.training.config import OptimizerConfig as OptimizerConfig
from diffdistill.training.config import RunConfig as RunConfig
from diffdistill.training.config import TrainConfig as TrainConfig
from diffdistill.training.config import find_config as find_config
from diffdistill.training.config import load_config as load_config
from diffdistill.training.config import parse_config as parse_config
from diffdistill.training.ema import EMAConfig as EMAConfig
from diffdistill.training.objects import with_objects as with_objects
from diffdistill.training.plan import plan as plan
from diffdistill.training.trainer import Trainer as Trainer

__all__ = [
    "DDIM",
    "EDM",
    "PLACES",
    "TCD",
    "Batch",
    "Cond",
    "Denoiser",
    "EMAConfig",
    "ExportOptions",
    "Extractor",
    "Family",
    "FewSteps",
    "Flow",
    "Heun",
    "ImageSource",
    "Loss",
    "Method",
    "ModelConfig",
    "Network",
    "OneCall",
    "OptimizerConfig",
    "Players",
    "Problem",
    "RunConfig",
    "StepRandom",
    "TensorImages",
    "TrainConfig",
    "Trainer",
    "Update",
    "UserError",
    "VPCosine",
    "VPDiscrete",
    "VPLinear",
    "Wrapper",
    "__version__",
    "as_denoiser",
    "as_source",
    "describe_model",
    "export_model",
    "field",
    "find_config",
    "give_teacher",
    "join_students",
    "load_config",
    "load_model",
    "merge_model",
    "parse_config",
    "plan",
    "register_data",
    "register_family",
    "register_features",
    "register_method",
    "register_network",
    "register_reward",
    "sample_images",
    "schema",
    "with_objects",
]
_Item = TypeVar("_Item")

__version__: str
PLACES: dict[str, str]

def register_method(item: _Item, *, name: str | None = None) -> _Item: ...
def register_network(item: _Item, *, name: str | None = None) -> _Item: ...
def register_data(item: _Item, *, name: str | None = None) -> _Item: ...
def register_family(item: _Item, *, name: str | None = None) -> _Item: ...
def register_reward(item: _Item, *, name: str | None = None) -> _Item: ...
def register_features(item: _Item, *, name: str | None = None) -> _Item: ...
