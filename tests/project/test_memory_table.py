"""The table of large teachers' memory in the docs is what its command prints."""

import runpy
from pathlib import Path

import torch
from torch import nn

from diffdistill.networks.quantised import nf4_bytes
from diffdistill.training.memory.lora_over_nf4 import base_bytes, factors_over

ROOT = Path(__file__).parents[2]


def test_the_table_in_the_docs_is_what_the_command_prints() -> None:
    script, text = runpy.run_path(str(ROOT / "scripts" / "memory_table.py")), (ROOT / "docs" / "memory.md").read_text()
    for lines in (script["table"](), script["table_of_processes"]()):
        assert {line.split(" | ")[0] for line in lines} >= {"| SDXL", "| FLUX.2-klein 4B"}
        assert "\n".join(lines) in text


def test_bytes_of_a_base_and_of_factors_by_hand() -> None:
    """A large layer of 64 x 128, a small one, a convolution and a norm; bitsandbytes 0.50.2 has as many in NF4."""
    net = nn.Sequential(nn.Linear(64, 128), nn.Linear(8, 8), nn.Conv2d(3, 5, 1), nn.LayerNorm(7))
    rest = 128 + (64 + 8) + (15 + 5)  # biases, the small layer, the convolution: rounded to two bytes
    assert nf4_bytes(torch.empty(65)) == 33 + 2 * 4 + 64
    assert base_bytes(net, "fp32") == 4 * (64 * 128 + rest + 14)
    assert base_bytes(net, "bf16") == 2 * (64 * 128 + rest) + 4 * 14
    assert base_bytes(net, "nf4") == 64 * 128 // 2 + 128 * 4 + 64 + 2 * (rest - 128) + 4 * (128 + 14)
    for part in list(net)[:3]:  # as a run's teacher may be stored already
        part.bfloat16()
    assert base_bytes(net, "bf16") == 2 * (64 * 128 + rest) + 4 * 14
    assert base_bytes(net, "nf4") == 64 * 128 // 2 + 128 * 4 + 64 + 2 * (rest - 128) + 4 * 14 + 2 * 128
    shapes = [tuple(factor.shape) for factor in factors_over(net, rank=4)]
    assert shapes == [(4, 64), (128, 4), (4, 8), (8, 4)]
