"""What doctor's plan says of large teachers, from their published configs: the table in docs/memory.md, printed by

    python scripts/memory_table.py

Arithmetic, not a measurement: networks are diffusers' own on the meta device, without weights. Two trained players,
Adam and an average on the device, before activations: three copies in float32; and factors of rank 64 on all linear
layers over one base. What is left of a base in NF4 is as with bf16.
"""

from collections.abc import Mapping
from typing import Any

from diffdistill.models.teachers import find_family
from diffdistill.networks.empty import empty_weights
from diffdistill.training.config import OptimizerConfig
from diffdistill.training.memory.lora_over_nf4 import base_bytes, factors_over, plan_for

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
        found = find_family(family)
        full = found.full_options(options)
        with empty_weights():
            net = found.build(full, found.image_shape(full), 0, 0.0)
        weights, factors = list(net.parameters()), factors_over(net)
        plans = [plan_for(base_bytes(net, "fp32"), weights, ADAM)]
        plans += [plan_for(base_bytes(net, dtype), factors, ADAM) for dtype in ("fp32", "bf16", "nf4")]
        totals = " | ".join(f"{plan.total / 2**30:.1f}" for plan in plans)
        lines.append(f"| {name} | {sum(p.numel() for p in weights) / 1e9:.2f}e9 | {totals} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
