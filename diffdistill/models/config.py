"""A model in a run's config: its network, its noise levels, and what it predicts."""

from diffdistill.diffusion.path import EDM, AnyPath, Prediction
from diffdistill.networks import AnyNetwork
from diffdistill.settings.schema import Positive, field, schema


@schema
class ModelConfig:
    """A new model. sigma_data: the data's standard deviation, for predicts: edm."""

    network: AnyNetwork
    path: AnyPath = field(default_factory=EDM)
    predicts: Prediction = "edm"
    sigma_data: Positive = 0.5
