"""What doctor's plan says of large teachers, from their published configs: the tables in docs/memory.md, printed by

    python scripts/memory_table.py

Arithmetic, not a measurement: networks are diffusers' own on the meta device, without weights. Two trained players,
Adam and an average on the device, before activations: three copies in float32; and factors of rank 64 on all linear
layers over one base. What is left of a base in NF4 is as with bf16. Of several processes each: weights in shards, and
the largest pair of blocks gathered; factors in replicas, whose gradients' space DDP keeps for both players.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from diffdistill.models.teachers import find_family
from diffdistill.networks.empty import empty_weights
from diffdistill.training.config import OptimizerConfig
from diffdistill.training.memory.lora_over_nf4 import base_bytes, factors_over, plan_for
from diffdistill.training.memory.prediction import gathered_bytes, part_of

PUBLISHED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "SDXL": (
        "sdxl",
        {
            "sample_size": 128,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "projection_class_embeddings_input_dim": 2816,
            "transformer_layers_per_block": [1, 2, 10],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "use_linear_projection": True,
        },
    ),
    "FLUX.1-dev": ("flux", {"guidance_embeds": True}),
    "FLUX.2-klein 4B": (
        "flux2",
        {
            "guidance_embeds": False,
            "joint_attention_dim": 7680,
            "num_attention_heads": 24,
            "num_layers": 5,
            "num_single_layers": 20,
        },
    ),
}
"""The family and the settings of each network's config.json, but for diffusers' defaults."""

ADAM = OptimizerConfig(lr=1e-5)


def table() -> list[str]:
    """The lines, in GiB."""
    lines = [
        "| network | weights | three copies | LoRA over float32 | over bf16 | over NF4 |",
        "|---|---|---|---|---|---|",
    ]
    for name, (family, options) in PUBLISHED.items():
        net = network(family, options)
        weights, factors = list(net.parameters()), factors_over(net)
        plans = [plan_for(base_bytes(net, "fp32"), weights, ADAM)]
        plans += [plan_for(base_bytes(net, dtype), factors, ADAM) for dtype in ("fp32", "bf16", "nf4")]
        totals = " | ".join(f"{plan.total / 2**30:.1f}" for plan in plans)
        lines.append(f"| {name} | {sum(p.numel() for p in weights) / 1e9:.2f}e9 | {totals} |")
    return lines


def network(family: str, options: Mapping[str, Any]) -> nn.Module:
    """Without weights."""
    found = find_family(family)
    full = found.full_options(options)
    with empty_weights():
        return found.build(full, found.image_shape(full), 0, 0.0)


COUNTS = (1, 2, 8)
"""Processes."""


def table_of_processes() -> list[str]:
    """The lines, in GiB of each process."""
    heads = [f"{what}, {count}" for what in ("three copies", "LoRA over bf16", "LoRA over NF4") for count in COUNTS]
    lines = ["| network | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, (family, options) in PUBLISHED.items():
        net = network(family, options)
        totals = [*(copies(net, n) for n in COUNTS), *(factors_over_bf16(net, n) for n in COUNTS)]
        totals += [factors_over_nf4(net, n) for n in COUNTS]
        lines.append(f"| {name} | " + " | ".join(f"{total / 2**30:.1f}" for total in totals) + " |")
    return lines


def copies(net: nn.Module, count: int) -> int:
    """All in float32, with speed.shard = all."""
    parts = [part_of(weight, count) for weight in net.parameters()]
    buffers = sum(buffer.nbytes for buffer in net.buffers())
    gathered = gathered_bytes(net) if count > 1 else 0
    return plan_for(sum(part.nbytes for part in parts) + buffers, parts, ADAM, gathered=gathered).total


def factors_over_bf16(net: nn.Module, count: int) -> int:
    """The base in shards; the factors are whole in each."""
    half = base_bytes(net, "bf16") / base_bytes(net, "fp32")
    parts = sum(part_of(weight, count).nbytes for weight in net.parameters())
    gathered = int(half * gathered_bytes(net)) if count > 1 else 0
    return _factors(net, int(half * parts), count, gathered)


def factors_over_nf4(net: nn.Module, count: int) -> int:
    """The base whole in each; shards would divide what NF4 leaves alone."""
    return _factors(net, base_bytes(net, "nf4"), count, 0)


def _factors(net: nn.Module, base: int, count: int, gathered: int) -> int:
    replicated = frozenset({"generator", "fake"} if count > 1 else ())
    return plan_for(base, factors_over(net), ADAM, replicated=replicated, gathered=gathered).total


if __name__ == "__main__":
    print("\n".join(table()), "\n".join(table_of_processes()), sep="\n\n")
