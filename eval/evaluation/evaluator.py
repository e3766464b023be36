"""An evaluation while training: `eval:` of a run's config. What it finds goes to metrics.jsonl, and as records to
eval.jsonl in the run's folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

from torch import nn

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.distributed.processes import Processes
from diffdistill.eval.evaluation.bench import make_bench
from diffdistill.eval.evaluation.extract import Bench
from diffdistill.eval.evaluation.run import evaluate
from diffdistill.eval.evaluation.table import number
from diffdistill.eval.evaluation.workers import Workers
from diffdistill.eval.images.encoder_and_vae import EncoderAndVAE, open_around
from diffdistill.eval.images.generate import SampledImages
from diffdistill.eval.images.places import count_parameters, seconds_until
from diffdistill.eval.metrics.settings import better
from diffdistill.eval.protocols.captions import read_captions
from diffdistill.eval.protocols.packaged import find_protocol
from diffdistill.eval.records.hashes import hash_weights
from diffdistill.eval.records.record import Cost, ModelRecord, Record, append_record, read_records
from diffdistill.models.spec import ModelSpec
from diffdistill.settings.links import refuse_link
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import dump
from diffdistill.storage.atomic import write_text_atomically
from diffdistill.storage.checkpoint import PREFIX
from diffdistill.training.reports.evaluator import EvalConfig, EvaluatedRun
from diffdistill.training.reports.log import Log

RECORDS = "eval.jsonl"
FEATURES = ".features"


@dataclass(frozen=True)
class StudentEvaluator:
    """An `Evaluator` of diffdistill/training/reports/evaluator.py.

    folder: the run's.  best_by: a metric of the protocol."""

    config: EvalConfig
    folder: FilePath
    spec: ModelSpec
    bench: Bench
    best_by: str
    processes: Processes
    around: EncoderAndVAE | None = None

    @staticmethod
    def of(
        config: EvalConfig,
        folder: FilePath,
        student: nn.Module,
        spec: ModelSpec,
        processes: Processes,
        *,
        trusts_code: bool = False,
    ) -> "StudentEvaluator":
        """Raises UserError where the protocol does not fit the student, or its files are missing."""
        protocol = replace(find_protocol(config.protocol), repeats=1)
        if config.num_images:
            protocol = replace(protocol, num_images=config.num_images)
        protocol, captions = read_captions(protocol, config.captions, setting="eval.captions")
        metrics = [key for metric in protocol.metrics for key in metric.keys]
        best_by = config.best_by or metrics[0]
        if best_by not in metrics:
            raise UserError(f"eval.best_by = {best_by!r}: {protocol.name} measures {', '.join(metrics)}")
        bench = make_bench(
            protocol,
            Workers(processes.device, processes.rank, processes.count, processes.wait),
            batch_size=config.batch_size,
            weights=config.weights,
            references=config.references,
            captions=captions,
            trusts_code=trusts_code,
            asked=config.protocol,
        )
        if not isinstance(student, Denoiser):
            raise UserError(
                f"eval: the student is a {type(student).__name__}, not a denoiser; evaluate its checkpoints"
            )
        some = captions[: protocol.num_images] if captions is not None else None
        around = open_around(spec, student, some, processes.device, origin="eval", keeps_encoder=False)
        evaluator = StudentEvaluator(config, folder, spec, bench, best_by, processes, around)
        evaluator._source(student, step=0)
        return evaluator

    @property
    def protocol(self) -> Mapping[str, Any]:
        found: dict[str, Any] = dump(self.bench.protocol)
        return found

    def examine(self, run: EvaluatedRun, *, is_last: bool, log: Log) -> bool:
        if run.step % self.config.every and not is_last:
            return False
        return bool(self.processes.largest(self._judge(run, log)))

    def _judge(self, run: EvaluatedRun, log: Log) -> bool:
        """Evaluate the student. Returns whether it is the best so far; only the first process knows."""
        step, images = run.step, run.images_seen
        self.processes.on_main_first(lambda: self._forget_from(step))
        refuse_link(self.folder / FEATURES)
        done = evaluate(
            self._source(run.student, step=step),
            self.bench,
            name=f"{self.folder} {step}",
            root=self.folder / FEATURES,
        )
        if done is None:
            return False
        values = {name: done.record.headline(name) for name in done.record.metrics}
        log.report(step, images, {f"eval/{name}": value for name, value in values.items()})
        cost = Cost(train_steps=step, train_images=images, train_seconds=seconds_until(self.folder, step))
        append_record(self.folder / RECORDS, replace(done.record, cost=cost))
        is_best = self._best_step(self._records()) == step
        told = " ".join(f"{name} {number(name, value)}" for name, value in values.items())
        log.say(f"eval {step}: {told}{', the best so far' if is_best else ''}")
        return is_best

    def best(self, step: int) -> str | None:
        """Of the checkpoints that are there, or are being written as number `step`."""
        known = [
            record
            for record in self._records()
            if _step(record) == step or (_step(record) < step and self._checkpoint(_step(record)).is_dir())
        ]
        return self._checkpoint(self._best_step(known)).name if known else None

    def _source(self, student: nn.Module, *, step: int) -> SampledImages:
        assert isinstance(student, Denoiser)
        return SampledImages(
            denoiser=student,
            sampler=self.spec.sampler,
            protocol=self.bench.protocol,
            image_shape=self.spec.image_shape,
            guidance=self.config.guidance,
            around=self.around,
            classes=self.spec.classes,
            class_names=self.spec.class_names,
            wanted=self.bench.class_names,
            model=ModelRecord(
                source=str(self._checkpoint(step)),
                sha256=hash_weights(student),
                parameters=count_parameters(student),
                around_sha256=dict(self.around.sha256) if self.around else {},
            ),
        )

    def _best_step(self, records: Sequence[Record]) -> int:
        """The step of the best record; of equal ones the first."""
        sign = 1 if better(self.best_by) == "lower" else -1
        ranked = [(sign * record.headline(self.best_by), _step(record)) for record in records]
        return min(ranked)[1]

    def _records(self) -> list[Record]:
        """Those of this protocol: a resumed run may have changed it."""
        file, protocol = self.folder / RECORDS, self.protocol
        return [one for one in read_records(file) if one.protocol == protocol] if file.exists() else []

    def _forget_from(self, step: int) -> None:
        """Drop the records that a run which went back to an earlier checkpoint has left."""
        file = self.folder / RECORDS
        lines: list[Any] = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        kept = (
            [line for line, record in zip(lines, read_records(file), strict=True) if _step(record) < step]
            if lines
            else []
        )
        if len(kept) < len(lines):
            write_text_atomically(file, "".join(kept))

    def _checkpoint(self, step: int) -> FilePath:
        return self.folder / "checkpoints" / f"{PREFIX}{step:08d}"


def _step(record: Record) -> int:
    return (record.cost.train_steps if record.cost else None) or 0
