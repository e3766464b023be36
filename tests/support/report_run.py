"""What a run's folder holds, for its report."""

import json

CONFIG = """
run: runs/x
method: {name: dmd2, gan_weight: 0.1}
data: {name: digits}
train: {steps: 200, global_batch_size: 64, seed: 3, precision: fp32}
"""


def line(step: int, seconds: float, **numbers: float) -> str:
    return json.dumps({"step": step, "images": 64 * step, "seconds": seconds, "its_per_second": 1.0, **numbers}) + "\n"
