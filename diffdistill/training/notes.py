"""What a run is told before it starts: settings that are allowed, and of which it may think otherwise."""

import math
from collections.abc import Iterator

from diffdistill.training.config import RunConfig
from diffdistill.training.ema import share_of_start

MAX_SHARE_OF_START = 0.03


def notes_on_averages(config: RunConfig) -> Iterator[str]:
    """A line for each average of which more than 3 % will be the untrained start at the run's end."""
    steps, batch = config.train.steps, config.train.global_batch_size
    update = next(update for update in config.method.updates if config.method.student in update.players)
    for group, settings in config.emas.items():
        share = share_of_start(settings, update, num_steps=steps, batch_images=batch)
        if share > MAX_SHARE_OF_START:
            place = group.replace("ema-", "more_emas.", 1)
            enough = math.floor(steps * batch * math.log(2) / -math.log(MAX_SHARE_OF_START))
            yield (
                f"{place}: {share:.1%} of the average at step {steps} will be the untrained start; use a "
                f"halflife_images of {enough} or less, or ramp: 0.05"
            )
