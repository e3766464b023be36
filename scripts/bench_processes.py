"""A run's seconds, processor time, memory, traffic and checkpoint, alone or under a launcher.

python scripts/bench_processes.py CONFIG [key=value ...]
python -m torch.distributed.run --nproc-per-node 2 scripts/bench_processes.py CONFIG [key=value ...]
"""

import json
import shutil
import sys
import time

from peak import peak_bytes

from diffdistill.training.config import find_config, load_config
from diffdistill.training.trainer import Trainer

WARM_UP, STEPS = 3, 10


def main() -> None:
    config = load_config(find_config(sys.argv[1]), sys.argv[2:])
    trainer = Trainer(config, quiet=True)
    trainer.processes.on_main_first(lambda: trainer.folder.mkdir(parents=True))
    _ = trainer.assembly
    seconds, processor = [], []
    for step in range(WARM_UP + STEPS):
        trainer.processes.wait()
        began, busy = time.perf_counter(), time.process_time()
        trainer.train_step()
        if step >= WARM_UP:
            seconds.append(time.perf_counter() - began)
            processor.append(time.process_time() - busy)
    began = time.perf_counter()
    checkpoint = trainer.save()
    saving = time.perf_counter() - began
    largest = trainer.processes.largest(round(sum(processor) / STEPS * 1e6)) / 1e6
    traffic = sum(
        parameter.nbytes / update.every
        for update in trainer.method.updates
        for name in update.players
        for parameter in trainer.assembly.iteration.trained[name]
    )
    if trainer.processes.is_main:
        found = {
            "processes": trainer.processes.count,
            "global_batch_size": config.train.global_batch_size,
            "parameters": sum(p.numel() for ps in trainer.assembly.iteration.trained.values() for p in ps),
            "least_seconds_per_step": round(min(seconds), 4),
            "processor_seconds_per_step_and_process": round(largest, 4),
            "peak_MiB_per_process": round(peak_bytes() / 2**20),
            "gradient_MB_per_step": round(traffic / 1e6, 3),
            "checkpoint_MB": round(
                sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()) / 1e6, 2
            ),
            "checkpoint_seconds": round(saving, 3),
        }
        print(json.dumps(found))
        shutil.rmtree(trainer.folder)


if __name__ == "__main__":
    main()
