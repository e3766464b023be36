"""What `diffdistill eval` does: places in, records and a table out."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath

import torch
from torch import Tensor

from diffdistill.data.cache import cache_folder
from diffdistill.data.pictures import save_grid, save_picture
from diffdistill.diffusion.guidance.policies import parse_guidance
from diffdistill.eval.evaluation.bench import make_bench
from diffdistill.eval.evaluation.efficiency import measure_efficiency
from diffdistill.eval.evaluation.extract import Bench, Source, StoredFeatures, specifications
from diffdistill.eval.evaluation.real import parse_weights
from diffdistill.eval.evaluation.run import Evaluation, evaluate, own_images, progress_bar
from diffdistill.eval.evaluation.table import rows_of, show_differences, show_evaluations
from diffdistill.eval.evaluation.workers import find_workers
from diffdistill.eval.features.resize import signed
from diffdistill.eval.features.store import BLOCK
from diffdistill.eval.images.diffusers_folder import is_diffusers, open_diffusers
from diffdistill.eval.images.files import in_number_order, open_images
from diffdistill.eval.images.generate import SampledImages
from diffdistill.eval.images.judged_files import FileImages
from diffdistill.eval.images.places import SamplingOptions, is_run, open_run, parse_sampler
from diffdistill.eval.images.preparation import picture, prepare, quantise
from diffdistill.eval.metrics.compare import Difference, paired_differences
from diffdistill.eval.protocols.captions import read_captions
from diffdistill.eval.protocols.packaged import DIGITS_PIXELS, PROTOCOLS, find_protocol
from diffdistill.eval.protocols.protocol import Preparation, Protocol
from diffdistill.eval.records.record import Efficiency, Record, append_record
from diffdistill.models.load import load_model
from diffdistill.settings.links import open_plain, refuse_link, refuse_links
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import Console
from diffdistill.storage.atomic import write_text_atomically

GRID = 100
"""Images of a grid, spread evenly over the first repeat: the same noise and labels for every model."""


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What the command line may say.

    protocol: a name or a YAML file; None takes digits-pixels for what makes digits.  repeats, seed: another number of
    repeats, and the first range of image seeds; either is another protocol.  weights, references: LABEL=FILE.
    features: a folder where features are kept; None keeps them until the record is there.  records: a JSONL file.
    out: the table's rows as JSON.  trusts_code: whether features that are a program may run.
    """

    protocol: str | None = None
    repeats: int | None = None
    seed: int = 0
    guidance: str = "1"
    sampler: str | None = None
    ema: str | None = None
    names: Sequence[str] = ()
    batch_size: int = BLOCK
    device: str = "auto"
    weights: Sequence[str] = ()
    references: Sequence[str] = ()
    captions: str | None = None
    features: str | None = None
    records: str | None = None
    out: str | None = None
    grid: bool = False
    save_images: str | None = None
    efficiency: bool = False
    trusts_code: bool = False

    @property
    def root(self) -> FilePath:
        """Where features lie."""
        return FilePath(self.features) if self.features else cache_folder(None) / "features"


def run_eval(places: Sequence[str], options: EvalOptions, console: Console) -> list[Record]:
    """Judge every place by one protocol; in the first process print the table and write the records.

    Raises UserError, before any image is made where that can be known.
    """
    if options.names and len(options.names) != len(places):
        raise UserError(f"--name: {len(options.names)} names for {len(places)} places; give one for each")
    if options.grid and not options.records:
        raise UserError("--grid: lies beside the records; give --records as well")
    bench = set_up(places, options)
    sources = [open_place(place, bench, options) for place in places]
    files = [source.model.source for source in sources if not isinstance(source, SampledImages)]
    if options.efficiency and files:
        raise UserError(f"{files[0]}: --efficiency: files of images cannot be timed; give a model")
    _check_writable(options)
    done = []
    for number, source in enumerate(sources):
        name = options.names[number] if options.names else places[number]
        found = _judge(source, bench, name, options)
        if found is None:
            continue
        done.append(found)
        if options.records:
            append_record(options.records, found.record)
    if done:
        show_evaluations(done, console)
        if options.out:
            _write(FilePath(options.out), json.dumps(rows_of(done), indent=1) + "\n")
    return [one.record for one in done]


def run_compare(
    places: tuple[str, str],
    options: EvalOptions,
    console: Console,
    *,
    num_replicates: int = 200,
    confidence: float = 0.95,
) -> dict[str, Difference]:
    """Judge both places on the same noise and print every metric's paired difference in the first repeat."""
    bench = set_up(places, replace(options, repeats=options.repeats or 1))
    if bench.workers.count > 1:
        raise UserError(f"eval compare: runs in one process, not {bench.workers.count}")
    sides = []
    for source, place in zip([open_place(place, bench, options) for place in places], places, strict=True):
        with progress_bar(place, own_images(bench), Console(stderr=True)) as advance:
            done = evaluate(source, bench, name=place, root=options.root, keep_features=True, advance=advance)
        assert done is not None
        device = torch.device("cpu")
        sides.append(
            {label: StoredFeatures(done.stores[0], label, bench.protocol, 0, device) for label in bench.extractors}
        )
    metrics = bench.protocol.metrics
    found = paired_differences(
        metrics, sides[0], sides[1], bench.real, num_replicates=num_replicates, confidence=confidence
    )
    show_differences(found, places, bench.protocol, console, confidence=confidence)
    return found


def set_up(places: Sequence[str], options: EvalOptions) -> Bench:
    """The protocol with its extractors and references, whose hashes it then carries. Raises UserError."""
    if not 1 <= options.batch_size <= BLOCK:
        raise UserError(f"--batch {options.batch_size}: must be 1 .. {BLOCK}, the images of a block")
    protocol = _protocol(places, options)
    workers, labels = find_workers(options.device), list(specifications(protocol))
    weights = parse_weights(options.weights, labels)
    references = parse_weights(options.references, labels, setting="--reference")
    protocol, captions = read_captions(protocol, options.captions)
    return make_bench(
        protocol,
        workers,
        batch_size=options.batch_size,
        weights=weights,
        references=references,
        captions=captions,
        trusts_code=options.trusts_code,
    )


def open_place(place: str, bench: Bench, options: EvalOptions) -> Source:
    """A run, a checkpoint, a diffusers folder, a folder or zip of images, or a .npz. Raises UserError."""
    path, protocol = FilePath(place).expanduser(), bench.protocol
    if is_run(path) or is_diffusers(path):
        sampler = parse_sampler(options.sampler) if options.sampler else None
        sampling = SamplingOptions(
            guidance=parse_guidance(options.guidance),
            sampler=sampler,
            ema=options.ema,
            captions=bench.captions,
            class_names=bench.class_names,
        )
        opener = open_run if is_run(path) else open_diffusers
        return opener(path, protocol, sampling, bench.workers.device)
    channels = protocol.image_shape[0] if protocol.image_shape else 3
    if not path.exists():
        raise UserError(f"{place}: no such folder or file; give a run's folder, one of its checkpoints, or images")
    images = open_images(path, protocol.preparation, channels=channels)
    return FileImages(in_number_order(images) if bench.captions else images, protocol)


def _protocol(places: Sequence[str], options: EvalOptions) -> Protocol:
    protocol = find_protocol(options.protocol) if options.protocol else _default_protocol(places[0])
    if options.repeats:
        protocol = replace(protocol, repeats=options.repeats)
    return replace(protocol, first_seed=protocol.first_seed + options.seed * protocol.num_images)


def _default_protocol(place: str) -> Protocol:
    """digits-pixels for a model of digits; for anything else the user has to choose."""
    path = FilePath(place).expanduser()
    if is_run(path) or not (path.exists() or is_diffusers(path)):
        spec = load_model(path).spec
        if spec.image_shape == DIGITS_PIXELS.image_shape and spec.num_classes == DIGITS_PIXELS.labels.num_classes:
            return DIGITS_PIXELS
    raise UserError(f"{place}: name a --protocol (choices: {', '.join(PROTOCOLS)}, or a YAML file)")


def _judge(source: Source, bench: Bench, name: str, options: EvalOptions) -> Evaluation | None:
    workers = bench.workers
    efficiency = _efficiency(source, options) if options.efficiency and workers.is_main else None
    if options.save_images:
        refuse_links(FilePath(options.save_images))
    saver = _Saver(FilePath(options.save_images) / _slug(name), bench.protocol) if options.save_images else None
    with progress_bar(name, own_images(bench), Console(stderr=True), is_shown=workers.is_main) as advance:
        done = evaluate(
            source,
            bench,
            name=name,
            root=options.root,
            keep_features=options.features is not None,
            efficiency=efficiency,
            advance=advance,
            on_images=saver,
        )
    if done is None or not options.grid or not options.records:
        return done
    file = _save_grid(source, bench.protocol, name, FilePath(options.records))
    images = done.record.images
    assert images is not None
    return replace(done, record=replace(done.record, images=replace(images, grid=file)))


def _efficiency(source: Source, options: EvalOptions) -> Efficiency:
    assert isinstance(source, SampledImages)
    return measure_efficiency(
        source.denoiser,
        source.whole_sampler,
        source.image_shape,
        guidance=source.guidance,
        batch=options.batch_size,
        beside=source.around.modules if source.around else None,
    )


def _save_grid(source: Source, protocol: Protocol, name: str, records: FilePath) -> str:
    """A PNG beside the records; its path from there."""
    count = min(GRID, protocol.num_images)
    index = (torch.arange(count) * protocol.num_images) // count
    images = signed(prepare(source.take(0, index).cpu(), protocol.preparation))
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()[:12]
    file = FilePath("grids") / f"{_slug(name)}-{protocol.name}-{digest}.png"
    refuse_link(records.parent / file.parent)
    save_grid(records.parent / file, images, columns=10)
    return str(file)


@dataclass(frozen=True)
class _Saver:
    """Writes every image as a PNG by its seed; floats are rounded to grey levels."""

    folder: FilePath
    protocol: Protocol

    def __call__(self, repeat: int, index: Tensor, images: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        first = self.protocol.seed_ranges[repeat][0]
        for number, image in zip(index.tolist(), quantise(images, Preparation()).cpu(), strict=True):
            save_picture(picture(image), self.folder / f"{first + number:08d}.png")


def _check_writable(options: EvalOptions) -> None:
    """Before hours of work: raise UserError if a file could not be written afterwards."""
    for file in filter(None, (options.records, options.out)):
        try:
            FilePath(file).parent.mkdir(parents=True, exist_ok=True)
            open_plain(FilePath(file), "a").close()
        except OSError as error:
            raise UserError(f"{file}: cannot be written: {error.strerror}") from None


def _write(file: FilePath, text: str) -> None:
    try:
        write_text_atomically(file, text)
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from None


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[-60:] or "images"
