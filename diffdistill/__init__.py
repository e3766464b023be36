"""diffdistill: one-step image generators, distilled from diffusion models.

`import diffdistill as dd` offers what people write: `dd.Trainer`, `dd.load_model`, `dd.schema`, ... Each name is
imported when it is first used, and nothing before. `__init__.pyi` tells editors what they are.
"""

__version__ = "0.1.0"

PLACES = {
    # runs
    "Trainer": "diffdistill.training.trainer:Trainer",
    "RunConfig": "diffdistill.training.config:RunConfig",
    "TrainConfig": "diffdistill.training.config:TrainConfig",
    "OptimizerConfig": "diffdistill.training.config:OptimizerConfig",
    "EMAConfig": "diffdistill.training.ema:EMAConfig",
    "with_objects": "diffdistill.training.objects:with_objects",
    "plan": "diffdistill.training.plan:plan",
    "load_config": "diffdistill.training.config:load_config",
    "parse_config": "diffdistill.training.config:parse_config",
    "find_config": "diffdistill.training.config:find_config",
    # models
    "ModelConfig": "diffdistill.models.spec:ModelConfig",
    "load_model": "diffdistill.models.load:load_model",
    "describe_model": "diffdistill.models.load:describe_model",
    "merge_model": "diffdistill.models.load:merge_model",
    "join_students": "diffdistill.models.load:join_students",
    "sample_images": "diffdistill.inference.draw:sample_images",
    "ExportOptions": "diffdistill.export.run:ExportOptions",
    "export_model": "diffdistill.export.run:export",
    # one denoiser
    "Denoiser": "diffdistill.diffusion.denoiser:Denoiser",
    "Network": "diffdistill.diffusion.denoiser:Network",
    "Cond": "diffdistill.diffusion.cond:Cond",
    "EDM": "diffdistill.diffusion.path:EDM",
    "Flow": "diffdistill.diffusion.path:Flow",
    "VPCosine": "diffdistill.diffusion.path:VPCosine",
    "VPDiscrete": "diffdistill.diffusion.path:VPDiscrete",
    "VPLinear": "diffdistill.diffusion.path:VPLinear",
    "DDIM": "diffdistill.diffusion.sampling:DDIM",
    "FewSteps": "diffdistill.diffusion.sampling:FewSteps",
    "Heun": "diffdistill.diffusion.sampling:Heun",
    "OneCall": "diffdistill.diffusion.sampling:OneCall",
    "TCD": "diffdistill.diffusion.sampling:TCD",
    # what a method is made of
    "Method": "diffdistill.distillation.method:Method",
    "Wrapper": "diffdistill.distillation.wrapper:Wrapper",
    "Players": "diffdistill.distillation.method:Players",
    "Problem": "diffdistill.distillation.method:Problem",
    "Batch": "diffdistill.distillation.method:Batch",
    "Loss": "diffdistill.distillation.method:Loss",
    "Update": "diffdistill.distillation.method:Update",
    "StepRandom": "diffdistill.diffusion.step_random:StepRandom",
    # what a plug-in is made of
    "Family": "diffdistill.models.teachers.family:Family",
    "Extractor": "diffdistill.eval.features.extractors:Extractor",
    "ImageSource": "diffdistill.data.source:ImageSource",
    "TensorImages": "diffdistill.data.source:TensorImages",
    "as_denoiser": "diffdistill.networks.given:as_denoiser",
    "give_teacher": "diffdistill.models.given:give_teacher",
    "as_source": "diffdistill.data.torch_dataset:as_source",
    "register_method": "diffdistill.distillation.method:METHODS.register",
    "register_network": "diffdistill.networks.registry:NETWORKS.register",
    "register_data": "diffdistill.data.registry:DATA.register",
    "register_family": "diffdistill.models.teachers.registry:FAMILIES.register",
    "register_reward": "diffdistill.distillation.rewards:REWARDS.register",
    "register_features": "diffdistill.eval.features.extractors:FEATURES.register",
    # settings
    "schema": "diffdistill.settings.schema:schema",
    "field": "diffdistill.settings.schema:field",
    "UserError": "diffdistill.settings.schema:UserError",
}
"""The names of `import diffdistill as dd`, and where each is."""

__all__ = ["__version__", *PLACES]  # noqa: PLE0604


def __getattr__(name: str) -> object:
    if name not in PLACES:
        raise AttributeError(f"module 'diffdistill' has no attribute {name!r}")
    from importlib import import_module
    from operator import attrgetter

    module, attribute = PLACES[name].split(":")
    found = globals()[name] = attrgetter(attribute)(import_module(module))
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *PLACES})
