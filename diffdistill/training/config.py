"""A run as one file: YAML plus `key.sub=value` overrides, checked by the schema, every fault shown at once."""

import json
from collections.abc import Sequence
from functools import reduce
from importlib import resources
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from diffdistill.data import AnyData, Digits
from diffdistill.diffusion.guidance_rules import AnyGuidanceRule
from diffdistill.distillation.method import AnyMethod
from diffdistill.distillation.scales import Amount
from diffdistill.models.composed import AnyTeacher
from diffdistill.models.prompt_storage import PromptsConfig
from diffdistill.models.spec import ModelConfig
from diffdistill.networks.dropout import Dropout
from diffdistill.networks.lora import LoRASettings
from diffdistill.networks.qat import QuantisedTraining
from diffdistill.settings.faults import nearest
from diffdistill.settings.numbers import BatchSize, NonNegativeInt, Processes, Seed
from diffdistill.settings.schema import NonNegative, Positive, PositiveInt, UserError, field, schema
from diffdistill.settings.terminal import holds_secret
from diffdistill.settings.values import apply_overrides, read_yaml, texts, validate
from diffdistill.training.ema import EMAConfig
from diffdistill.training.reports.evaluator import EvalConfig
from diffdistill.training.reports.health import HealthConfig
from diffdistill.training.reports.trackers import TrackerNames
from diffdistill.training.speed.options import SpeedConfig

BASE, MOST_BASES = "base", 8
"""The key of the config that a file begins from, and how many may stand over one another."""
OVER = "-over-base"

Name = Annotated[str, Field(pattern="^[a-z0-9_]+$")]
"""What the user calls one of several."""


@schema
class OptimizerConfig:
    """One player's optimiser. clip_norm and clip_value clip its gradient; learning rates are per iteration of the run.

    decay: after `decay_start` of the run the learning rate falls to zero, linearly or as a cosine.
    implementation: torch's; auto is fused for Adam and AdamW, and torch's own choice for SGD and RAdam.
    adam8bit, adamw8bit: bitsandbytes' on a CUDA GPU, a quarter of the moments' bytes.
    """

    name: Literal["adam", "adamw", "radam", "sgd", "adam8bit", "adamw8bit"] = "adam"
    implementation: Literal["auto", "fused", "foreach", "loop"] = "auto"
    lr: Positive
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.0, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    clip_norm: Positive | None = None
    clip_value: Positive | None = None
    warmup_steps: NonNegativeInt = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    decay_start: Annotated[float, Field(ge=0, lt=1)] = 0.5

    def __post_init__(self) -> None:
        if self.name.endswith("8bit") and self.implementation != "auto":
            raise ValueError(f"implementation = {self.implementation!r}: {self.name} has only its own; use auto")
        if self.name == "radam" and self.implementation == "fused":
            raise ValueError("implementation = 'fused': torch has no fused radam; use auto, foreach or loop")


@schema
class TrainConfig:
    """The loop. One step is one iteration of the method: every update that is due."""

    steps: PositiveInt
    global_batch_size: BatchSize
    micro_batch_size: BatchSize | None = None  # per process; smaller ones accumulate to the same result
    seed: Seed = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu"] = "auto"
    num_threads: Processes | None = None  # CPU threads, before OMP_NUM_THREADS; tiny networks are fastest on one
    on_nonfinite: Literal["skip", "stop"] = "skip"
    max_skips: PositiveInt = 20  # this many skipped updates in a row stop the run
    on_out_of_memory: Literal["stop", "halve"] = "stop"
    log_every: PositiveInt = 50
    preview_every: NonNegativeInt = 500  # 0: none
    checkpoint_every: PositiveInt = 500
    keep_checkpoints: PositiveInt = 3


@schema
class RunConfig:
    """The config of one run. `model` is for pretrain, `teacher` for every other method: a run, a pipeline, or
    a pipeline with additions.

    teachers: further ones by name, for methods with several teachers or for players that start from them; all have
    the same path, images and conditions.
    text_encoder: the folder of a sentence encoder, for a `model` that takes text.
    prompts: how prompts are encoded.
    negative_prompt, negative_scale: in the student's cross-attention (NASA), and its weight; with a range each
    training step draws one.  negative_teacher: the teacher is guided with it, too.
    init: a run's folder whose players this one starts from, by name, instead of the teacher's weights.
    starts: by player, the model that it starts from: `teacher`, `teacher_<name>` or `init.<player>`.
    guidance_rule: how guidance combines the teachers' two estimates; null: each teacher's own rule.
    lora: by player or `default`: LoRA over the teacher, one frozen base for all; null: full training.
    dropout: by player or `default`: dropout probability of its network; null: that of the teacher that it
    starts from.
    qat: quantisation-aware training of the student, by torchao; null: none.
    ema: EMA of the student, used by sampling and export.  more_emas: others by name, saved next to it.
    eval: evaluation during training; null for none.
    """

    run: str
    method: AnyMethod
    data: AnyData = field(default_factory=Digits)
    model: ModelConfig | None = None
    teacher: AnyTeacher | None = None
    teachers: dict[Name, AnyTeacher] = field(default_factory=dict)
    text_encoder: str | None = None
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    negative_prompt: str | None = None
    negative_scale: Amount = 0.3
    negative_teacher: bool = False
    init: str | None = None
    starts: dict[str, str] = field(default_factory=dict)
    guidance_rule: AnyGuidanceRule | None = None
    optimizers: Annotated[dict[str, OptimizerConfig], Field(min_length=1)]
    lora: dict[str, LoRASettings | None] = field(default_factory=dict)
    dropout: dict[str, Dropout | None] = field(default_factory=dict)
    qat: QuantisedTraining | None = None
    ema: EMAConfig | None = field(default_factory=EMAConfig)
    more_emas: dict[Name, EMAConfig] = field(default_factory=dict)
    health: HealthConfig | None = field(default_factory=HealthConfig)
    eval: EvalConfig | None = None
    trackers: TrackerNames = ("tensorboard",)
    train: TrainConfig
    speed: SpeedConfig = field(default_factory=SpeedConfig)

    def __post_init__(self) -> None:
        if self.qat and self.speed.shard != "none":
            raise ValueError("qat: does not work with speed.shard yet; use one of the two")
        if self.negative_teacher and self.negative_prompt is None:
            raise ValueError("negative_teacher: needs negative_prompt")
        if self.more_emas and self.ema is None:
            raise ValueError("more_emas: needs `ema`, which is null")
        if self.speed.channels_last and any(options.name.endswith("8bit") for options in self.optimizers.values()):
            # bitsandbytes makes weights contiguous at each step, and keeps its moments in the memory's order.
            raise ValueError(
                "speed.channels_last: does not work with 8-bit optimisers; use false, or another optimiser"
            )

    @property
    def emas(self) -> dict[str, EMAConfig]:
        """Every average by its group in a checkpoint: "ema", and "ema-<name>" for the others."""
        first = {} if self.ema is None else {"ema": self.ema}
        return first | {f"ema-{name}": config for name, config in self.more_emas.items()}

    def optimizer(self, player: str) -> OptimizerConfig:
        """The settings of a player's optimiser: its own, or those under `default`."""
        found = self.optimizers.get(player) or self.optimizers.get("default")
        if found is None:
            raise UserError(f"optimizers: none for the player {player!r}; set one for it, or under `default`")
        return found


def load_config(file: str | FilePath, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, and the one that it names by `base`, apply `key.sub=value` overrides, and check everything.

    Raises UserError naming every fault: its dotted place, the value, and the choices.
    """
    return parse_config(apply_overrides(read_config(file), overrides), origin=str(file))


def read_config(file: str | FilePath) -> dict[str, Any]:
    """A run's YAML over that of its `base`, a packaged config's name or a file, from this one's folder or from here.

    Groups are merged, unless both have a `name` and they differ; everything else takes the place of the base's.
    Raises UserError.
    """
    here, files = FilePath(file), [read_yaml(file)]
    while BASE in files[-1]:
        name = files[-1].pop(BASE)
        if not isinstance(name, str):
            raise UserError(f"{here}: base = {name!r}: name a packaged config, as dmd2/sd15, or a file")
        if len(files) > MOST_BASES:
            raise UserError(f"{file}: base: more than {MOST_BASES} nested bases, or a cycle")
        here = beside if (beside := here.parent / name).is_file() else find_config(name)
        files.append(read_yaml(here))
    return reduce(_over, reversed(files))


def _over(base: Any, own: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(own, dict)):
        return own
    if "name" in base and "name" in own and base["name"] != own["name"]:
        return own
    return base | {key: _over(base.get(key), value) for key, value in own.items()}


def find_config(name: str) -> FilePath:
    """A file, or a packaged config by its name ("dmd2/digits"). Raises UserError naming the packaged ones."""
    if FilePath(name).exists():
        return FilePath(name)
    packaged = packaged_configs()
    if name in packaged:
        return packaged[name]
    near = ", ".join(nearest(name, list(packaged)))
    raise UserError(f"{name}: no such file, nor a packaged config; nearest: {near}; `diffdistill configs` lists all")


def packaged_configs() -> dict[str, FilePath]:
    """The configs that come with the package, by name."""
    home = FilePath(str(resources.files("diffdistill.configs")))
    return {file.relative_to(home).with_suffix("").as_posix(): file for file in sorted(home.glob("*/*.yaml"))}


def parse_config(data: object, *, origin: str = "config") -> RunConfig:
    """A nested dict as a RunConfig. Raises UserError, also on a password or token: it would be saved with the run."""
    for place, text in texts(data):
        if holds_secret(text):
            raise UserError(f"{origin}: {place}: holds a password or token; pass it in the environment, as HF_TOKEN")
    return validate(RunConfig, data, origin=origin)


def json_schema() -> str:
    """The schema of a run's YAML, for editors. Of one with a `base`, nothing is required in any group."""
    made = TypeAdapter(RunConfig).json_schema()
    groups = made.pop("$defs")
    over = _without_required(made)
    about = "the config that this one extends: a packaged one's name, or a file"
    over["properties"][BASE] = {"type": "string", "description": about}
    groups |= {f"{name}{OVER}": _without_required(group) for name, group in groups.items()}
    whole = {"$defs": groups, "type": "object", "if": {"required": [BASE]}, "then": over, "else": made}
    return json.dumps(whole, indent=1) + "\n"


def _without_required(node: Any) -> Any:
    """A schema of which each group may say a part, its `name` left out: then several kinds of it may fit."""
    if isinstance(node, list):
        return [_without_required(part) for part in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return node | {"$ref": node["$ref"] + OVER}
    kept = {key: _without_required(part) for key, part in node.items() if not _decides(key, part)}
    return kept | ({"anyOf": kept.pop("oneOf")} if "oneOf" in kept else {})


def _decides(key: str, part: Any) -> bool:
    return (key == "required" and isinstance(part, list)) or (key == "discriminator" and "mapping" in part)
