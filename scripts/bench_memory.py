"""What each setting of memory and speed saves and costs: DMD2 on digits with a small U-Net, all in one run.

python scripts/bench_memory.py [--rounds 7] [--batch 64] [--compile] [--out bench.json] [--page docs/memory.md]

Bytes are counted in a run of each setting alone. `standing`: weights, optimiser states and averages, and gradients of
the update that has most. `activations`: what autograd keeps. `peak`: all tensors alive at a time (on a GPU, the
allocator's). Times are of interleaved rounds, as ratios to the baseline's of the same round; on one thread of a CPU
they are the processor's time, which other processes disturb less.
"""

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from diffdistill.training.assembly import Assembly, assemble
from diffdistill.training.config import find_config, load_config
from diffdistill.training.memory.counting import LiveTensors
from diffdistill.training.memory.prediction import module_bytes, plan_memory, rehearse, show_bytes
from diffdistill.training.plan import plan
from diffdistill.training.trainer import Trainer

NETWORK = "model.network={name: unet, channels: [32, 64], attention: [false, true], blocks: 2, dropout: 0.1}"
SETTINGS: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "activation_checkpointing": ("speed.activation_checkpointing=true",),
    "micro_batch_size: a quarter": ("train.micro_batch_size={quarter}",),
    "precision: bf16": ("train.precision=bf16",),
    "teacher_dtype: bf16": ("speed.teacher_dtype=bf16",),
    "channels_last": ("speed.channels_last=true",),
    "ema_device: cpu": ("speed.ema_device=cpu",),
    "one more average": ("more_emas={{long: {{}}}}",),
    "implementation: foreach": (
        "optimizers.default.implementation=foreach",
        "optimizers.generator.implementation=foreach",
    ),
    "implementation: loop": ("optimizers.default.implementation=loop", "optimizers.generator.implementation=loop"),
    "checkpointing, bf16, a quarter": (
        "speed.activation_checkpointing=true",
        "train.precision=bf16",
        "speed.teacher_dtype=bf16",
        "train.micro_batch_size={quarter}",
    ),
}
COMPILED = {"compile: inductor": ("speed.compile=inductor",)}
ON_GPU = {"adam8bit": ("optimizers.default.name=adam8bit", "optimizers.generator.name=adam8bit")}
CYCLE = 2  # steps from one generator update to the next, by the packaged config


def make_run(folder: Path, batch: int, overrides: tuple[str, ...]) -> Assembly:
    """A DMD2 run from an untrained teacher: neither bytes nor speed depend on the weights."""
    quick = ["train.steps=1", "train.preview_every=0"]
    if not (folder / "teacher").exists():
        config = load_config(find_config("pretrain/digits"), [f"run={folder}/teacher", NETWORK, *quick])
        Trainer(config, quiet=True).run()
    common = [f"run={folder}/student", f"teacher={folder}/teacher", "train.steps=1000000", "health=null"]
    chosen = [text.format(quarter=batch // 4) for text in overrides]
    config = load_config(find_config("dmd2/digits"), [*common, f"train.global_batch_size={batch}", *chosen])
    return assemble(plan(config))


def count_bytes(assembly: Assembly) -> dict[str, int]:
    """Counted in real steps, and predicted before them."""
    predicted = plan_memory(assembly.plan, assembly.iteration)
    counted = rehearse(assembly, CYCLE)
    resident = sum(player.weights + player.optimizer for player in counted.players.values())
    resident += counted.averages if predicted.has_averages_on_device else 0
    gradients = max(sum(counted.players[name].gradients for name in update.players) for update in predicted.updates)
    peak = counted.device_peak
    if peak is None:
        with LiveTensors() as alive:
            take_steps(Trainer(assembly, quiet=True))
        peak = resident + alive.peak
    return {
        "standing": resident + gradients,
        "activations": counted.activations,
        "activations_predicted": predicted.peak_activations,
        "peak": peak,
        "peak_predicted": predicted.total,
    }


def take_steps(trainer: Trainer) -> float:
    """Seconds of one cycle of the method."""
    is_alone = trainer.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if is_alone else time.perf_counter
    began = clock()
    for _ in range(CYCLE):
        trainer.train_step()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def time_ratios(trainers: dict[str, Trainer], rounds: int) -> dict[str, list[float]]:
    """Each setting's time over the baseline's of the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for round_number in range(rounds + 1):  # the first round warms up
        for name, trainer in trainers.items():
            taken = take_steps(trainer)
            if round_number:
                seconds[name].append(taken)
    pairs = {name: zip(values, seconds["baseline"], strict=True) for name, values in seconds.items()}
    return {name: [a / b for a, b in pair] for name, pair in pairs.items()}


def machine() -> dict[str, str | int]:
    """What it was measured on."""
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name(0)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = f"{len(names)} x {names[0]}" if names else platform.processor()
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": str(date.today()),
    }


def table(result: dict[str, Any]) -> str:
    """The page's block: machine, date, one row a setting."""
    on, rows = result["machine"], result["settings"]
    threads = f"{on['threads']} thread{'s' * (on['threads'] > 1)}"
    head = (
        f"{on['processor']}, {threads}, torch {on['torch']}, {on['date']}. DMD2 on digits, a U-Net of "
        f"{result['parameters']:,} parameters, batch {result['batch']}; {result['rounds']} interleaved rounds: "
        "the ratios' median, least and greatest. `python scripts/bench_memory.py` measures it on your machine."
    )
    lines = ["| setting | standing | activations | peak | time, to the baseline |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        ratios = row["time_ratios"]
        shown = (
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if name != "baseline" else "1"
        )
        sizes = " | ".join(show_bytes(row[part]) for part in ("standing", "activations", "peak"))
        lines.append(f"| {name} | {sizes} | {shown} |")
    return f"{head}\n\n" + "\n".join(lines)


def write_block(page: Path, text: str) -> None:
    """Put the text between the page's two comments."""
    before, _, rest = page.read_text().partition("<!-- measured -->")
    after = rest.partition("<!-- end -->")[2]
    page.write_text(f"{before}<!-- measured -->\n\n{text}\n\n<!-- end -->{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which takes minutes")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--page", type=Path, help="a Markdown page with a block `<!-- measured -->`")
    options = parser.parse_args()
    settings = SETTINGS | (COMPILED if options.compile else {})
    if torch.cuda.is_available() and find_spec("bitsandbytes"):
        settings |= ON_GPU
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, overrides in settings.items():
            assembly = make_run(Path(folder), options.batch, overrides)
            rows[name] = dict(count_bytes(assembly))
            parameters = module_bytes(assembly.iteration.players.generator) // 4
            del assembly
            gc.collect()
        trainers = {
            name: Trainer(make_run(Path(folder), options.batch, overrides), quiet=True)
            for name, overrides in settings.items()
        }
        for name, ratios in time_ratios(trainers, options.rounds).items():
            rows[name]["time_ratios"] = ratios
    result = {
        "machine": machine(),
        "batch": options.batch,
        "rounds": options.rounds,
        "parameters": parameters,
        "settings": rows,
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.page:
        write_block(options.page, table(result))


if __name__ == "__main__":
    main()
