"""What `diffdistill eval` does: places in, records and a table out."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath

import torch
from torch import Tensor

from diffdistill.data.pictures import save_grid, save_picture
from diffdistill.eval.evaluation.against import Opponent
from diffdistill.eval.evaluation.efficiency import measure_efficiency
from diffdistill.eval.evaluation.extract import Bench, Source, StoredFeatures
from diffdistill.eval.evaluation.opponents import AgainstSetup, prepare_against
from diffdistill.eval.evaluation.run import Evaluation, evaluate, own_images, progress_bar
from diffdistill.eval.evaluation.setup import EvalOptions, open_place, set_up
from diffdistill.eval.evaluation.table import rows_of, show_against, show_differences, show_evaluations
from diffdistill.eval.features.resize import signed
from diffdistill.eval.images.generate import SampledImages
from diffdistill.eval.images.places import parse_sampler
from diffdistill.eval.images.preparation import picture, prepare, quantise
from diffdistill.eval.metrics.compare import Difference, paired_differences
from diffdistill.eval.protocols.protocol import Preparation, Protocol
from diffdistill.eval.records.record import Against, Efficiency, Record, append_record
from diffdistill.settings.links import open_plain, refuse_link, refuse_links
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import Console
from diffdistill.storage.atomic import write_text_atomically

GRID = 100
"""Images of a grid, spread evenly over the first repeat: the same noise and labels for every model."""


def run_eval(places: Sequence[str], options: EvalOptions, console: Console) -> list[Record]:
    """Judge every place by one protocol; in the first process print the table and write the records.

    Raises UserError, before any image is made where that can be known.
    """
    if options.names and len(options.names) != len(places):
        raise UserError(f"--name: {len(options.names)} names for {len(places)} models; give one per model")
    if options.grid and not options.records:
        raise UserError("--grid: is written next to the records; add --records")
    if options.sampler:
        parse_sampler(options.sampler)
    if options.against is not None:
        _check_writable(options)
    is_against = options.against is not None
    setup = prepare_against(places, options) if is_against else AgainstSetup(None, set_up(places, options), "")
    opponent, bench = setup.opponent, setup.bench
    if setup.told and bench.workers.is_main:
        console.print(setup.told, markup=False, highlight=False, soft_wrap=True)
    sources = [open_place(place, bench, options) for place in places]
    files = [source.model.source for source in sources if not isinstance(source, SampledImages)]
    if options.efficiency and files:
        raise UserError(f"{files[0]}: --efficiency: files of images cannot be timed; give a model")
    _check_writable(options)
    bench = setup.sample()
    done = []
    for number, opened in enumerate(sources):
        source: Source = replace(opened, protocol=bench.protocol)  # type: ignore[type-var]
        name = options.names[number] if options.names else places[number]
        student = opponent.student(source) if opponent else source
        against = _measure(opponent, student, options) if opponent else None
        found = _judge(source, bench, name, options)
        if found is None:
            continue
        if opponent and not options.features:
            opponent.forget(student)
        found = replace(found, record=replace(found.record, against=against))
        done.append(found)
        if options.records:
            append_record(options.records, found.record)
    if done:
        show_evaluations(done, console)
        show_against([one.record for one in done], console)
        if options.out:
            _write(FilePath(options.out), json.dumps(rows_of(done), indent=1) + "\n")
    return [one.record for one in done]


def _measure(opponent: Opponent, student: Source, options: EvalOptions) -> Against | None:
    return opponent.measure(student, num_replicates=options.replicates, confidence=options.confidence)


def run_compare(
    places: tuple[str, str],
    options: EvalOptions,
    console: Console,
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
        metrics,
        sides[0],
        sides[1],
        bench.real,
        num_replicates=options.replicates,
        confidence=options.confidence,
    )
    show_differences(found, places, bench.protocol, console, confidence=options.confidence)
    return found


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
