"""Losses and gradients that are not finite: their update is skipped and named, or the run stops. Weights that are not:
the run stops, before a checkpoint is written."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from diffdistill.distillation.method import Loss, Update
from diffdistill.distributed.processes import Processes
from diffdistill.distributed.stopping import TrainingError
from diffdistill.storage.finite import find_dead, name_some


class NonfiniteGuard:
    """Counts skipped updates, by loss: one player's success does not hide another's failure.

    on_nonfinite: what to do at the first one.  max_skips: so many of one loss in a row stop the run.
    skips: of the run so far.
    """

    def __init__(
        self, on_nonfinite: Literal["skip", "stop"], max_skips: int, skips: Mapping[str, int] | None = None
    ) -> None:
        self.on_nonfinite, self.max_skips = on_nonfinite, max_skips
        self.skips = dict(skips or {})

    def passed(self, update: Update) -> None:
        """All was finite."""
        self.skips[update.loss] = 0

    @property
    def is_skipping(self) -> bool:
        """Whether the last update of some loss was skipped: it is not known yet whether the run comes out of it."""
        return any(self.skips.values())

    def check_end(self, step: int) -> str | None:
        """What to say at the run's last step where the last update of a loss was skipped.

        Raises TrainingError where several in a row were: the weights are finite, and give nothing that is.
        """
        named = ", ".join(f"{loss} ({count} in a row)" for loss, count in self.skips.items() if count)
        if max(self.skips.values(), default=0) > 1:
            raise TrainingError(
                f"step {step}: the run is incomplete: its last updates were skipped ({named}), as losses or gradients"
                " were not finite. Resume from an earlier checkpoint, --resume --checkpoint=NAME, or start again, at a"
                " lower learning rate"
            )
        return f"step {step}: the last update was skipped: {named}" if named else None

    def check_weights(self, step: int, groups: Mapping[str, Mapping[str, Tensor]], processes: Processes) -> None:
        """Raise TrainingError, in all processes, if weights are not finite, which no later step mends.

        groups: what a checkpoint would hold, of which all but the optimisers' numbers are weights.
        """
        weights = {
            f"{group}: {name}": t for group, ts in groups.items() if group != "optimizers" for name, t in ts.items()
        }
        dead = find_dead(weights)
        faulty = processes.ranks_where(bool(dead))
        if faulty:
            named = name_some(dead) if dead else f"those of process {', '.join(map(str, faulty))}"
            raise TrainingError(
                f"step {step}: weights are not finite ({named}); no checkpoint is written, and the last one is"
                " intact: resume from it, at a lower learning rate"
            )

    def refuse(
        self,
        step: int,
        update: Update,
        losses: Sequence[Loss],
        norms: Mapping[str, Tensor],
        processes: Processes,
        faulty: Sequence[int],
    ) -> str:
        """What to say of an update that was not finite, and was not taken; all processes call it.

        losses: of the micro-batches here.  norms: of the summed gradients.  faulty: the ranks whose losses are not.
        Raises TrainingError when told to, or when it goes on.
        """
        skips = self.skips[update.loss] = self.skips.get(update.loss, 0) + 1
        sums: dict[str, float] = {}
        for loss in losses:
            for name, value in ({"total": loss.total} | dict(loss.logs)).items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
        means = processes.means(sums)
        bad = [f"{update.loss} ({name} = {value})" for name, value in means.items() if not math.isfinite(value)]
        bad += [f"the gradient of {name}" for name, norm in norms.items() if not math.isfinite(float(norm))]
        where = f" in process {', '.join(map(str, faulty))}" if 0 < len(faulty) < processes.count else ""
        message = f"step {step}, player {update.players[0]}: {', '.join(bad)} is not finite{where}"
        if self.on_nonfinite == "stop" or skips >= self.max_skips:
            more = f", {skips} updates in a row" if skips > 1 else ""
            raise TrainingError(f"{message}{more}. The last checkpoint is intact; try a lower learning rate")
        return f"{message}; this update is skipped"
