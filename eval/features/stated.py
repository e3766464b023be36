"""What a library says of its weights, and what a specification says: brought together, or refused where they differ.

Weights are right only with the activation, mean and standard deviation that they were trained with: these are facts,
and a specification cannot say others. How images come to the network's size is read from the library too, but is a
choice: another one may be said, and is another protocol.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, TypeVar, get_args

from torch import Tensor

from diffdistill.eval.features.extractors import Extractor, FeaturesConfig, OpenClip, Timm, Torchvision
from diffdistill.eval.features.resize import Interpolation, ResizeMode, Triple, framed, network_input
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import dump

OWN = "own"
"""The name of weights that the library does not know; their facts have to be said."""
IMAGENET: tuple[Triple, Triple] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KNOWN = {"interpolation": get_args(Interpolation), "resize_mode": get_args(ResizeMode)}

Features = TypeVar("Features", Torchvision, Timm, OpenClip)
Classifier = TypeVar("Classifier", Torchvision, Timm)


def completed(features: Features, said: Mapping[str, Any], *, facts: Sequence[str], origin: str) -> Features:
    """The specification with all that the library says where it says nothing itself.

    said: by the name of the setting.  facts: those that must agree.  origin: who says it, for errors.
    Raises UserError where a fact differs, or the library says what is not known here.
    """
    for key, choices in KNOWN.items():
        if said[key] not in choices and getattr(features, key) is None:
            raise UserError(
                f"features.{key}: {origin} says {said[key]!r}, which is not known (choices: {_told(choices)})"
            )
    for key in facts:
        if getattr(features, key) not in (None, said[key]):
            raise UserError(
                f"features.{key} = {_value(getattr(features, key))}: {origin} says {_value(said[key])}; leave it out, "
                f"or give weights of your own as pretrained: {OWN}"
            )
    return replace(features, **{key: value for key, value in said.items() if getattr(features, key) is None})


def said_of_own(features: Features, facts: Sequence[str]) -> dict[str, Any]:
    """The facts of weights that no library knows. Raises UserError where one is not said."""
    missing = [key for key in facts if getattr(features, key) is None]
    if missing:
        raise UserError(f"features.pretrained = {OWN}: say features.{missing[0]} as well ({', '.join(facts)})")
    return {key: getattr(features, key) for key in facts}


def unknown_weights(features: Features, tags: Sequence[str], library: str) -> UserError:
    """For a name of weights that a library does not have."""
    return UserError(
        f"features.pretrained = {features.pretrained!r}: {library} has no such weights of {features.model} (choices: "
        f"{_told(tags)}; {OWN}, for weights that it does not know)"
    )


def library_input(features: Features) -> Callable[[Tensor], Tensor]:
    """How images become the input of a completed specification's network."""
    size, side = features.size, resize_side(features)
    assert size
    assert features.mean
    assert features.std
    assert features.resize_mode
    assert features.interpolation
    if side < size:
        raise UserError(f"features.resize_side = {side}: must be features.size = {size} or more")
    resize = partial(framed, side=side, mode=features.resize_mode, interpolation=features.interpolation)
    return network_input(size, mean=features.mean, std=features.std, resize=resize)


def as_before(asked: Classifier, features: Classifier) -> Classifier:
    """What earlier versions took: ImageNet's mean and deviation unless others were asked for, and all of the image at
    224."""
    side = asked.size or 224
    mean, std = asked.mean or IMAGENET[0], asked.std or IMAGENET[1]
    squashed = replace(features, size=side, resize_side=side, resize_mode="squash", interpolation="bicubic")
    return replace(squashed, mean=mean, std=std)


def resize_side(features: Features) -> int:
    """To how many pixels images are resized before their middle is taken."""
    side = features.size if isinstance(features, OpenClip) else features.resize_side
    assert side
    return side


def differing(told: FeaturesConfig, other: FeaturesConfig, *, is_square: bool) -> list[str]:
    """The settings in which two specifications of one kind give other numbers from the same weights.

    is_square: whether images are, so that squashed and cropped ones are the same.
    """
    passed = {"sha256", "pretrained", *(("resize_mode",) if is_square else ())}
    names = [one.name for one in fields(told) if one.name not in passed]  # type: ignore[arg-type]
    return [name for name in names if getattr(told, name) != getattr(other, name)]


def recorded(extractor: Extractor, *, is_square: bool) -> FeaturesConfig:
    """An extractor's specification for a record, and for the names of what is kept: with what the library says.

    A setting that earlier versions knew without being told stays unsaid, so that their records compare with today's.
    """
    assert extractor.features
    now, earlier = extractor.features, extractor.earlier
    if earlier is None or not isinstance(now, (Torchvision, Timm, OpenClip)):
        return now
    changed = differing(now, earlier, is_square=is_square)
    unsaid: Any = {key: None for key in now.ADDED if key not in changed}
    return replace(now, **unsaid)


def settings(features: FeaturesConfig) -> dict[str, Any]:
    """All that decides features beside their weights, as JSON, for a reference."""
    told: dict[str, Any] = dump(features)
    return {key: value for key, value in told.items() if key not in ("sha256", "pretrained")}


def _told(choices: Sequence[str]) -> str:
    return ", ".join(choices)


def _value(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value).lower()
