"""What a run is told before it starts: settings that are allowed, and of which it may think otherwise."""

import math
from collections.abc import Iterator
from dataclasses import replace

from diffdistill.training.config import RunConfig
from diffdistill.training.ema import EMAConfig, images_followed, share_of_start

MAX_SHARE_OF_START = 0.03
RAMP = EMAConfig().ramp


def notes_on_averages(config: RunConfig) -> Iterator[str]:
    """A line for each average of which more than 3 % will be the untrained start at the run's end."""
    steps, batch = config.train.steps, config.train.global_batch_size
    update = next(update for update in config.method.updates if config.method.student in update.players)
    for group, settings in config.emas.items():
        share = share_of_start(settings, update, num_steps=steps, batch_images=batch)
        if share > MAX_SHARE_OF_START:
            place = group.replace("ema-", "more_emas.", 1)
            told = f"{place}: {share:.1%} of the EMA at step {steps} will still be the initial weights"
            followed = images_followed(update, num_steps=steps, batch_images=batch)
            if not followed:
                yield f"{told}; {config.method.student} is not trained yet"
                continue
            most = followed * math.log(2) / -math.log(MAX_SHARE_OF_START)
            enough = math.floor(most) if most >= 1 else math.floor(1000 * most) / 1000
            ramped = replace(settings, ramp=RAMP)
            is_enough = share_of_start(ramped, update, num_steps=steps, batch_images=batch) <= MAX_SHARE_OF_START
            yield f"{told}; use a halflife_images of {enough} or less{f', or ramp: {RAMP}' if is_enough else ''}"
