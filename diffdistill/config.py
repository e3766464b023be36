"""A run as one file: YAML plus `key.sub=value` overrides, checked by the schema, every fault shown at once."""

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from diffdistill.data import AnyData, Digits
from diffdistill.ema import EMAConfig
from diffdistill.guidance import AnyPolicy
from diffdistill.health import HealthConfig
from diffdistill.method import Method, registered
from diffdistill.networks import AnyNetwork
from diffdistill.networks.lora import LoRASettings
from diffdistill.path import EDM, AnyPath, Prediction
from diffdistill.schema import NonNegative, Positive, PositiveInt, UserError, any_of, field, schema
from diffdistill.speed import SpeedConfig
from diffdistill.terminal import holds_secret
from diffdistill.trackers import TrackerNames
from diffdistill.watch import EvalConfig

T = TypeVar("T")

MAX_BITS = 1024  # of an integer in YAML; no setting takes more than 63
MAX_SHOWN = 200  # characters of a value in a message

if TYPE_CHECKING:
    AnyMethod = Method
else:
    AnyMethod = any_of(registered().values())


@schema
class OptimizerConfig:
    """One player's optimiser. clip_norm and clip_value bound its gradient; rates are per iteration of the run.

    decay: after `decay_start` of the run the rate falls to zero, linearly or as a cosine.
    implementation: torch's; auto is fused for Adam and torch's own choice for SGD.
    adam8bit, adamw8bit: bitsandbytes' on a CUDA GPU, a quarter of the moments' bytes.
    """

    name: Literal["adam", "adamw", "sgd", "adam8bit", "adamw8bit"] = "adam"
    implementation: Literal["auto", "fused", "foreach", "loop"] = "auto"
    lr: Positive
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.0, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    clip_norm: Positive | None = None
    clip_value: Positive | None = None
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    decay_start: Annotated[float, Field(ge=0, lt=1)] = 0.5

    def __post_init__(self) -> None:
        if self.name.endswith("8bit") and self.implementation != "auto":
            raise ValueError(f"implementation = {self.implementation!r}: {self.name} has only its own; use auto")


@schema
class TrainConfig:
    """The loop. One step is one iteration of the method: every update that is due."""

    steps: PositiveInt
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt | None = None  # per process; smaller ones accumulate to the same result
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu"] = "auto"
    num_threads: PositiveInt | None = None  # on a CPU; a very small network is fastest, and surest, on one
    on_nonfinite: Literal["skip", "stop"] = "skip"
    max_skips: PositiveInt = 20  # this many skipped updates in a row stop the run
    on_out_of_memory: Literal["stop", "halve"] = "stop"
    log_every: PositiveInt = 50
    preview_every: Annotated[int, Field(ge=0)] = 500  # 0: none
    checkpoint_every: PositiveInt = 500
    keep_checkpoints: PositiveInt = 3


@schema
class ModelConfig:
    """A new model. sigma_data: the data's standard deviation, for predicts: edm."""

    network: AnyNetwork
    path: AnyPath = field(default_factory=EDM)
    predicts: Prediction = "edm"
    sigma_data: Positive = 0.5


@schema
class RunConfig:
    """Everything about one run. `model` is for pretrain, `teacher` (a run's folder) for every other method.

    text_encoder: the folder of a sentence encoder, for a `model` that takes text.
    negative_prompt, negative_scale: what the student's cross-attention steers away from, and by how much of it.
    init: a run's folder whose players this one starts from, by name, in place of the teacher's weights.
    lora: by player or `default`: trained as factors over the teacher, one frozen base for all; null: in full.
    ema: the average that samples are taken from.  more_emas: others by name, trained and saved beside it.
    eval: a small evaluation while training; null for none.
    """

    run: str
    method: AnyMethod
    data: AnyData = field(default_factory=Digits)
    model: ModelConfig | None = None
    teacher: str | None = None
    text_encoder: str | None = None
    negative_prompt: str | None = None
    negative_scale: NonNegative = 0.3
    init: str | None = None
    optimizers: Annotated[dict[str, OptimizerConfig], Field(min_length=1)]
    lora: dict[str, LoRASettings | None] = field(default_factory=dict)
    ema: EMAConfig | None = field(default_factory=EMAConfig)
    more_emas: dict[Annotated[str, Field(pattern="^[a-z0-9_]+$")], EMAConfig] = field(default_factory=dict)
    health: HealthConfig | None = field(default_factory=HealthConfig)
    eval: EvalConfig | None = None
    trackers: TrackerNames = ("tensorboard",)
    train: TrainConfig
    speed: SpeedConfig = field(default_factory=SpeedConfig)

    def __post_init__(self) -> None:
        if self.more_emas and self.ema is None:
            raise ValueError("more_emas: they stand beside `ema`, which is null; give it one")
        if self.speed.channels_last and any(options.name.endswith("8bit") for options in self.optimizers.values()):
            # bitsandbytes makes weights contiguous at each step, and keeps its moments in the memory's order.
            raise ValueError("speed.channels_last: does not go with 8-bit optimisers; use false, or another optimiser")

    @property
    def emas(self) -> dict[str, EMAConfig]:
        """Every average by its group in a checkpoint: "ema", and "ema-<name>" for the others."""
        first = {} if self.ema is None else {"ema": self.ema}
        return first | {f"ema-{name}": config for name, config in self.more_emas.items()}

    def optimizer(self, player: str) -> OptimizerConfig:
        """The settings of a player's optimiser: its own, or those under `default`."""
        found = self.optimizers.get(player) or self.optimizers.get("default")
        if found is None:
            raise UserError(f"optimizers: none for the player {player!r}; give it one, or one under `default`")
        return found


def load_config(file: str | FilePath, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `key.sub=value` overrides, and check everything.

    Raises UserError naming every fault: its dotted place, the value, and the choices.
    """
    return parse_config(apply_overrides(read_yaml(file), overrides), origin=str(file))


def find_config(name: str) -> FilePath:
    """A file, or a packaged config by its name ("dmd2/digits"). Raises UserError naming the packaged ones."""
    if FilePath(name).exists():
        return FilePath(name)
    home = FilePath(str(resources.files("diffdistill.configs")))
    packaged = {str(file.relative_to(home).with_suffix("")): file for file in sorted(home.glob("*/*.yaml"))}
    if name in packaged:
        return packaged[name]
    raise UserError(f"{name}: no such file, nor a packaged config{_did_you_mean(name, list(packaged))}")


def parse_config(data: object, *, origin: str = "config") -> RunConfig:
    """A nested dict as a RunConfig. Raises UserError, also on a password or token: it would be saved with the run."""
    for place, text in _texts(data):
        if holds_secret(text):
            raise UserError(f"{origin}: {place}: holds a password or token; give it by the environment, as HF_TOKEN")
    return validate(RunConfig, data, origin=origin)


def validate(kind: type[T], data: object, *, origin: str) -> T:
    """A nested dict as any schema class. Raises UserError naming every fault."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        faults = [_describe(kind, data, fault) for fault in error.errors()]
        raise UserError(f"{origin}: {len(faults)} fault{'s' * (len(faults) > 1)}\n  " + "\n  ".join(faults)) from None


def parse_guidance(text: str) -> float | AnyPolicy:
    """A scale, or a policy as in `{name: interval, scale: 2, ratio_low: 0.2, ratio_high: 5}`. Raises UserError."""
    value = parse_yaml(text, origin="--guidance")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if not isinstance(value, dict):
        raise UserError(f"--guidance {text}: give a number, or a policy as {{name: adaptive, scale: 2}}")
    return validate(AnyPolicy, value, origin="--guidance")  # type: ignore[arg-type]


def dump(value: object) -> Any:
    """A schema value as plain JSON types."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def dump_yaml(value: object) -> str:
    """A schema value as YAML that `load_config` reads back."""
    return yaml.safe_dump(dump(value), sort_keys=False)


def differences(old: Any, new: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The dotted places at which two dumped values differ, with both."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{place}.{key}" if place else key)
    elif old != new:
        yield place, old, new


def json_schema() -> str:
    """The schema of a run's YAML, for editors."""
    return json.dumps(TypeAdapter(RunConfig).json_schema(), indent=1) + "\n"


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 2e-4 as a number and refuses repeated keys, keys that are no text, and aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not read", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        repeated = sorted(key for key, count in Counter(str(key.value) for key, _ in node.value).items() if count > 1)
        if repeated:
            raise yaml.constructor.ConstructorError(None, None, f"repeated key {repeated[0]!r}", node.start_mark)
        mapping = super().construct_mapping(node, deep)
        for key in mapping:
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} is not a name", node.start_mark)
        return mapping

    def construct_yaml_int(self, node: Any) -> int:
        number = super().construct_yaml_int(node)
        if number.bit_length() > MAX_BITS:
            raise yaml.constructor.ConstructorError(None, None, "the integer is too large", node.start_mark)
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(file: str | FilePath) -> dict[str, Any]:
    """A YAML mapping. Raises UserError if the file is missing, unreadable or not a mapping."""
    try:
        text = FilePath(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    data = parse_yaml(text, origin=str(file))
    if not isinstance(data, dict):
        raise UserError(f"{file}: must be a mapping of settings, not {type(data).__name__}")
    return data


def parse_yaml(text: str, *, origin: str) -> Any:
    """Any YAML value. Raises UserError with the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{origin}: not valid YAML: {error}") from None


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`data` with each `key.sub=value` set; values are read as YAML. Raises UserError on a malformed one."""
    data = json.loads(json.dumps(data, default=str))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip(". "):
            raise UserError(f"override {_short(override)}: write key.sub=value")
        *parents, last = key.split(".")
        place = data
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise UserError(f"override {_short(override)}: {parent!r} is a value, not a group of settings")
        place[last] = parse_yaml(text, origin=f"override {_short(override)}")
    return data


def _texts(data: object, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested data, with its dotted place."""
    if isinstance(data, str):
        yield place, data
    elif isinstance(data, (dict, list)):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _texts(value, f"{place}.{key}" if place else str(key))


def _short(value: object) -> str:
    """A value as it is shown in a message."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _describe(kind: type, data: object, fault: Any) -> str:
    """One fault as `place = value: what is wrong; choices`."""
    place, holder, value = _walk(kind, data, fault["loc"])
    code, context = fault["type"], fault.get("ctx", {})
    shown = f" = {_short(value)}" if not isinstance(value, (dict, list, type(None))) else ""
    if code in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [f.name for f in fields(holder)] if is_dataclass(holder) else []
        return f"{place}: unknown key{_did_you_mean(place.rpartition('.')[2], known)}"
    if code in ("missing", "missing_argument", "missing_keyword_only_argument", "union_tag_not_found"):
        return f"{place}: is required"
    if code == "union_tag_invalid":
        choices = re.findall(r"'([^']*)'", context["expected_tags"])
        return f"{place}.name = {context['tag']!r}: unknown{_did_you_mean(context['tag'], choices)}"
    if code == "literal_error":
        return f"{place}{shown}: choose from {context['expected']}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{place}{shown}: {message[:1].lower() + message[1:]}"


def _walk(kind: Any, data: object, loc: Sequence[str | int]) -> tuple[str, Any, object]:
    """The dotted place of a fault, the schema class that holds it, and the value there."""
    place, holder, here = "", kind, data
    expected: Any = kind
    for step in loc:
        if isinstance(here, dict) and here.get("name") == step and step not in here:
            continue  # pydantic names the union's choice as a step of its own
        holder = _class_of(expected, here)
        hints = get_type_hints(holder, include_extras=True) if is_dataclass(holder) else {}
        expected = hints.get(str(step), _item_type(expected))
        place += f"[{step}]" if isinstance(step, int) else f".{step}" if place else str(step)
        try:
            here = here[step]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            here = None
    return place or "config", holder, here


def _class_of(expected: Any, here: object) -> Any:
    """The schema class meant by `here` among those that a type allows."""
    allowed = [kind for kind in _alternatives(expected) if is_dataclass(kind)]
    name = here.get("name") if isinstance(here, dict) else None
    named = [kind for kind in allowed if getattr(kind, "name", None) == name]
    return (named or allowed or [expected])[0]


def _alternatives(expected: Any) -> list[Any]:
    """The classes in a type: through Annotated, unions and None."""
    arguments = get_args(expected)[:1] if get_origin(expected) is Annotated else get_args(expected)
    inner = [kind for argument in arguments for kind in _alternatives(argument)]
    return inner or [expected]


def _item_type(expected: Any) -> Any:
    """What a dict or tuple holds, as far as schema classes go."""
    inside = [kind for kind in _alternatives(expected) if is_dataclass(kind)]
    return inside[0] if inside else Any


def _did_you_mean(wrong: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(wrong), choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (choices: {', '.join(choices)})" if choices else hint
