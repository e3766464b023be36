"""References: mean and covariance of real images' features, and the features themselves, computed once into a file.

A file is a .npz with `mean` [d], `scatter` [d, d], `count`, the first so many `features` [n, d], and `about`, a JSON
text that says of which images, prepared how, and by which weights. It is written whole or not at all. EDM's, ADM's,
clean-fid's and pytorch-fid's files are read as well; what they do not say, the caller has to.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, JsonValue
from torch import Tensor

from diffdistill.data.arrays import read_arrays
from diffdistill.diffusion.gaussians import check_finite
from diffdistill.eval.features.extractors import Extractor, Label, Sha256
from diffdistill.eval.features.stated import differing, settings
from diffdistill.eval.images.files import Images
from diffdistill.eval.metrics.moments import Moments, Summary
from diffdistill.eval.metrics.sides import MissingFeaturesError
from diffdistill.eval.protocols.protocol import Preparation
from diffdistill.settings.limits import MAX_CLASSES
from diffdistill.settings.links import open_plain, refuse_link
from diffdistill.settings.schema import PositiveInt, UserError, schema
from diffdistill.settings.values import differences, dump, validate

ENVIRONMENT = "DIFFDISTILL_REFERENCES"
DEFAULT = "~/.cache/diffdistill/references"
KEPT_FEATURES = 50_000
"""Features beyond the first so many are summed and forgotten: 400 MB at 2048 float32 features."""

VERSION = 1


@schema
class About:
    """What a reference is of.  images_sha256: of the prepared pixels, in order; of an imported file, of its mean and
    covariance.  weights_sha256: of the extractor's; None where it has none, or an imported file does not say.
    features: all their settings, the library's included; None in an imported file, and in those of earlier versions,
    which read less of what libraries say.  class_names: of the classes that the images are of, by label; empty where
    nothing says, as in earlier versions."""

    version: int = VERSION
    label: Label
    origin: str
    num_images: PositiveInt
    images_sha256: Sha256
    weights_sha256: Sha256 | None = None
    features: dict[str, JsonValue] | None = None
    preparation: Preparation | None = None
    class_names: Annotated[tuple[str, ...], Field(max_length=MAX_CLASSES)] = ()


@dataclass(frozen=True)
class RealFeatures:
    """The real side of every distance, on the CPU.  features: of the first images [n, d]; None where there are none."""

    about: About
    summary: Summary
    features: Tensor | None = None

    def rows(self, max_samples: int | None = None) -> Tensor:
        """The first samples' features, or all. Raises MissingFeaturesError, a UserError, if they were not kept."""
        wanted = self.summary.count if max_samples is None else min(max_samples, self.summary.count)
        kept = 0 if self.features is None else len(self.features)
        if self.features is None or kept < wanted:
            raise MissingFeaturesError(
                f"the reference {self.about.origin} holds the features of {kept:,} of its {self.summary.count:,} "
                f"images, and {wanted:,} are needed; compute it from the images, and keep as many"
            )
        return self.features[:wanted]


def compute_reference(
    images: Images,
    extractor: Extractor,
    preparation: Preparation,
    *,
    batch_size: int = 64,
    kept_features: int = KEPT_FEATURES,
    advance: Callable[[int], None] = lambda count: None,
) -> RealFeatures:
    """The features of all images in one pass; memory does not grow with their number beyond what is kept.

    preparation: how `images` were prepared, for the file.  advance: told the images that are done.
    Raises UserError if there are none, or one cannot be read.
    """
    if not len(images):
        raise UserError(f"{images.origin}: holds no images")
    moments: Moments | None = None
    digest = hashlib.sha256()
    kept: list[Tensor] = []
    for index in torch.arange(len(images)).split(batch_size):
        rows = images.rows(index)
        digest.update(rows.contiguous().numpy().tobytes())
        found = extractor(rows).features
        moments = moments or Moments(found.shape[1], device=found.device)
        moments.update(found)
        kept.append(found[: max(kept_features - int(index[0]), 0)].cpu())
        advance(len(index))
    assert moments is not None
    about = About(
        label=extractor.label,
        origin=images.origin,
        num_images=len(images),
        images_sha256=digest.hexdigest(),
        weights_sha256=extractor.sha256,
        features=settings(extractor.features) if extractor.features else None,
        preparation=preparation,
        class_names=images.class_names(),
    )
    return RealFeatures(about, moments.summary().to("cpu"), torch.cat(kept) if kept_features else None)


def save_reference(reference: RealFeatures, file: str | FilePath) -> None:
    """Whole or not at all. Raises UserError if the file cannot be written."""
    target = FilePath(file).expanduser()
    summary = reference.summary
    arrays: dict[str, Any] = {"mean": summary.mean.cpu().numpy(), "scatter": summary.scatter.cpu().numpy()}
    if reference.features is not None:
        arrays["features"] = reference.features.numpy()
    arrays |= {"count": np.int64(summary.count), "about": np.array(json.dumps(dump(reference.about)))}
    temporary = target.with_name(f".{target.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        refuse_link(target)
        with open_plain(temporary, "wb") as handle:
            np.savez(handle, **arrays)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(target)
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def open_reference(file: str | FilePath, *, label: str, num_images: int | None = None) -> RealFeatures:
    """A reference of the features `label`, ours or an imported one.

    num_images: how many are behind an imported mean and covariance, which do not say it.
    Raises UserError if the file is missing, damaged, of other features, or holds none of the known arrays.
    """
    arrays = _arrays(FilePath(file).expanduser(), str(file))
    if "about" in arrays:
        return _ours(arrays, str(file), label)
    if {"mu", "sigma"} <= arrays.keys():
        return _imported(arrays["mu"], arrays["sigma"], str(file), label, num_images)
    if "feats" in arrays:  # clean-fid's for KID
        features = _floats(arrays["feats"], 2, f"{file}: feats")
        digest = hashlib.sha256(features.numpy().tobytes()).hexdigest()
        about = About(label=label, origin=str(file), num_images=len(features), images_sha256=digest)
        return RealFeatures(about, Summary.of(features), features)
    raise UserError(
        f"{file}: has the arrays {', '.join(sorted(arrays)) or 'none'}; a reference has mean, scatter, count and about "
        "(this package), mu and sigma (EDM, ADM, clean-fid, pytorch-fid) or feats (clean-fid)"
    )


def references_folder() -> FilePath:
    """$DIFFDISTILL_REFERENCES, or ~/.cache/diffdistill/references."""
    return FilePath(os.environ.get(ENVIRONMENT) or DEFAULT).expanduser()


def check_reference(
    reference: RealFeatures, extractor: Extractor, preparation: Preparation, *, is_square: bool
) -> None:
    """Raises UserError if a reference was made by other weights or settings, or of images prepared in another way.

    is_square: whether the protocol's images are.
    """
    about, origin = reference.about, reference.about.origin
    if about.weights_sha256 not in (None, extractor.sha256):
        raise UserError(
            f"the reference {origin} was computed with weights {about.weights_sha256}, not with {extractor.sha256} of "
            f"{extractor.label}; compute it again"
        )
    if about.preparation is None:
        return
    _check_settings(about, extractor, is_square=is_square)
    told, wanted = (_of_real_images(how) for how in (about.preparation, preparation))
    if told != wanted:
        raise UserError(
            f"the reference {origin} was computed from images prepared as {told}; the protocol's are {wanted}"
        )


def _check_settings(about: About, extractor: Extractor, *, is_square: bool) -> None:
    now, earlier = extractor.features, extractor.earlier
    if about.features is not None and now is not None:
        changed = [f"{key} {old} -> {new}" for key, old, new in differences(about.features, settings(now))]
    elif about.features is None and now is not None and earlier is not None:
        names = differing(earlier, now, is_square=is_square)
        changed = [f"{name} {getattr(earlier, name)} -> {getattr(now, name)}" for name in names]
    else:
        return
    if changed:
        raise UserError(
            f"the reference {about.origin} was computed by {extractor.label} with other settings "
            f"({'; '.join(changed)}); "
            "compute it again"
        )


def _of_real_images(preparation: Preparation) -> dict[str, Any]:
    """What of a preparation touches real images: they are quantised already, and may be JPEGs."""
    told: dict[str, Any] = dump(preparation)
    return {name: told[name] for name in ("crop", "side", "filter")}


def _ours(arrays: dict[str, NDArray[Any]], file: str, label: str) -> RealFeatures:
    try:
        told = json.loads(str(arrays["about"][()]))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: about: no JSON: {error}") from None
    about = replace(validate(About, told, origin=f"{file}: about"), origin=file)
    if about.label != label:
        raise UserError(f"{file}: is a reference of {about.label}, not of {label}")
    missing = {"mean", "scatter", "count"} - arrays.keys()
    if missing:
        raise UserError(f"{file}: lacks {', '.join(sorted(missing))}")
    mean, scatter = _gaussian(arrays["mean"], arrays["scatter"], file, ("mean", "scatter"))
    if arrays["count"].shape != () or int(arrays["count"]) != about.num_images:
        raise UserError(f"{file}: count = {arrays['count']}: about says {about.num_images}")
    features = _floats(arrays["features"], 2, f"{file}: features") if "features" in arrays else None
    if features is not None and (features.shape[1] != len(mean) or len(features) > about.num_images):
        raise UserError(f"{file}: features are {list(features.shape)}, of {about.num_images} images and {len(mean)}")
    return RealFeatures(about, Summary(about.num_images, mean, scatter), features)


def _imported(
    mean: NDArray[Any], covariance: NDArray[Any], file: str, label: str, num_images: int | None
) -> RealFeatures:
    """The covariance of all these tools is the unbiased one."""
    if num_images is None or num_images < 2:
        raise UserError(f"{file}: does not state its number of images; set reference.num_images in the protocol")
    mu, sigma = _gaussian(mean, covariance, file, ("mu", "sigma"))
    digest = hashlib.sha256(mu.numpy().tobytes() + sigma.numpy().tobytes()).hexdigest()
    about = About(label=label, origin=file, num_images=num_images, images_sha256=digest)
    return RealFeatures(about, Summary(num_images, mu, sigma * (num_images - 1)))


def _gaussian(mean: NDArray[Any], square: NDArray[Any], file: str, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    mu = _floats(mean, 1, f"{file}: {names[0]}").double()
    sigma = _floats(square, 2, f"{file}: {names[1]}").double()
    if sigma.shape != (len(mu), len(mu)) or not len(mu):
        raise UserError(f"{file}: {names[0]} is {list(mu.shape)} and {names[1]} {list(sigma.shape)}; they do not fit")
    return mu, sigma


def _floats(array: NDArray[Any], axes: int, name: str) -> Tensor:
    if array.ndim != axes or array.dtype.kind != "f":
        raise UserError(f"{name} is {array.dtype} {list(array.shape)}; it must be floats of {axes} axes")
    tensor = torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)))
    check_finite(tensor, name)
    return tensor


def _arrays(path: FilePath, file: str) -> dict[str, NDArray[Any]]:
    """The arrays that a reference may have; others, such as ADM's images, are not read."""
    wanted: Sequence[str] = ("mean", "scatter", "count", "features", "about", "mu", "sigma", "feats")
    if not path.is_file():
        raise UserError(f"{file}: no such file")
    try:
        found, others = read_arrays(path, wanted)
        return found or dict.fromkeys(others, np.empty(0))
    except UserError:
        raise
    except Exception as error:  # a damaged zip, a pickle, a single array
        raise UserError(f"{file}: cannot be read as .npz: {' '.join(str(error).split())[:200]}") from None
