"""One evaluation: images by the protocol, features to disk, every metric from them, one record.

The features decide the record and nothing else does: given the same ones, batch sizes and processes change no bit. A
broken-off evaluation goes on from the blocks that it has written.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path as FilePath

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from diffdistill.eval.evaluation.extract import Bench, Source, Stopwatch, StoredFeatures, extract
from diffdistill.eval.evaluation.workers import exact_matmul
from diffdistill.eval.features.store import BLOCK, FeatureStore, discard, hash_features, locked
from diffdistill.eval.metrics.scoring import score
from diffdistill.eval.metrics.sides import OnDevice
from diffdistill.eval.records.environment import describe_environment
from diffdistill.eval.records.record import Efficiency, Images, Record, Values, hash_json
from diffdistill.settings.terminal import Console
from diffdistill.settings.values import dump

Advance = Callable[[int], None]
OnImages = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Evaluation:
    """record: to be kept.  stores: the features of each repeat, where they were kept.  ms_per_image: of generation in
    this process, None where every image was there already."""

    record: Record
    stores: tuple[FeatureStore, ...]
    ms_per_image: float | None


def evaluate(
    source: Source,
    bench: Bench,
    *,
    name: str,
    root: FilePath,
    keep_features: bool = False,
    efficiency: Efficiency | None = None,
    advance: Advance = lambda count: None,
    on_images: OnImages | None = None,
) -> Evaluation | None:
    """Judge a source by the bench's protocol.

    name: what the record is called.  root: where features are kept until the record is there, or for good.
    advance: told the images that are done.  on_images: as `extract`; every image is then made or read again.
    Returns None in every process but the first.
    Raises UserError where source and protocol do not fit, or the same images are being evaluated already.
    """
    began = time.perf_counter()
    protocol, workers = bench.protocol, bench.workers
    folder = root / store_key(source, bench)
    stores = tuple(FeatureStore(folder / f"seeds-{a}-{b}", b - a) for a, b in protocol.seed_ranges)
    watch = Stopwatch()
    with locked(folder) if workers.is_main else nullcontext(), exact_matmul():
        for repeat, store in enumerate(stores):
            extract(source, bench, repeat, store, watch=watch, advance=advance, on_images=on_images)
        workers.wait()
        if not workers.is_main:
            return None
        record = _record(source, bench, stores, name=name, efficiency=efficiency, began=began)
        if not keep_features:
            discard(folder)
    return Evaluation(record, stores if keep_features else (), watch.ms_per_image)


def _record(
    source: Source,
    bench: Bench,
    stores: tuple[FeatureStore, ...],
    *,
    name: str,
    efficiency: Efficiency | None,
    began: float,
) -> Record:
    protocol, workers = bench.protocol, bench.workers
    metrics, notes = _metrics(bench, stores)
    return Record(
        kind="measured",
        name=name,
        method=source.method,
        seed=source.seed,
        protocol=dump(protocol),
        metrics=metrics,
        model=source.model,
        sampler=source.sampler_record,
        cost=source.cost,
        efficiency=efficiency,
        images=Images(
            count=protocol.num_images,
            seeds=protocol.seed_ranges,
            features_sha256={label: hash_features(stores, label) for label in bench.extractors},
        ),
        environment=describe_environment(
            workers.device,
            dtype="float32",
            wall_seconds=time.perf_counter() - began,
            num_processes=workers.count,
            batch_size=bench.batch_size,
        ),
        notes="; ".join([*filter(None, [source.notes]), *notes]),
    )


def store_key(source: Source, bench: Bench) -> str:
    """Tells features apart that may differ in a bit: by images, protocol, extractors, batch size and library.

    The number of processes is not among them.
    """
    protocol = dump(bench.protocol)
    chosen = ("num_images", "image_shape", "noise", "labels", "captions", "preparation", "numerics", "weights_sha256")
    return hash_json(
        {
            "images": dict(source.key),
            "protocol": {name: protocol[name] for name in chosen},
            "features": {label: dump(spec) for label, spec in bench.specifications.items()},
            "logits and texts": [sorted(bench.with_logits), sorted(bench.text_prefixes.items())],
            "batch_size": bench.batch_size,
            "block": BLOCK,
            "device": bench.workers.device.type,
            "torch": torch.__version__,
        }
    )


def own_images(bench: Bench) -> int:
    """The images that this process makes or reads."""
    stores = [FeatureStore(FilePath(), end - first) for first, end in bench.protocol.seed_ranges]
    return sum(len(s.samples(block)) for s in stores for block in bench.workers.share(range(s.num_blocks)))


def _metrics(bench: Bench, stores: tuple[FeatureStore, ...]) -> tuple[dict[str, Values], list[str]]:
    """Every metric's values over the repeats, and the notes on them."""
    device = bench.workers.device if bench.workers.device.type == "cuda" else torch.device("cpu")
    real = {label: OnDevice(features, device) for label, features in bench.real.items()}
    found = []
    for repeat, store in enumerate(stores):
        fake = {label: StoredFeatures(store, label, bench.protocol, repeat, device) for label in bench.extractors}
        found.append(score(bench.protocol.metrics, fake, real))
    metrics = {
        name: Values.of(
            [scores.values[name] for scores in found],
            within=[scores.within[name] for scores in found if name in scores.within],
        )
        for name in found[0].values
    }
    return metrics, list(dict.fromkeys(note for scores in found for note in scores.notes))


@contextmanager
def progress_bar(title: str, total: int, console: Console, *, is_shown: bool = True) -> Iterator[Advance]:
    """A bar on a terminal, a line every tenth elsewhere; call what it gives with the images that are done."""
    is_live = console.is_terminal and is_shown
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("images"))
    done = 0
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not is_live) as bar:
        task = bar.add_task(title, total=total)

        def advance(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            bar.advance(task, count)
            if is_shown and not is_live and done * 10 // total > before * 10 // total:
                console.print(f"{title}: {done}/{total} images", markup=False, highlight=False, soft_wrap=True)

        yield advance
