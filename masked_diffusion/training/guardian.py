"""Monitoring of a run: steps whose loss or gradients are not finite are skipped, and loss spikes are reported."""

import math
from collections import deque
from statistics import fmean, pstdev
from typing import Any

from ..utils.errors import UserError

MIN_HISTORY = 20


class TrainingFault(UserError):
    """Training has diverged. The last checkpoint is intact."""


class Guardian:
    """Checks the loss and gradient norm of each step.

    :param max_bad_steps: stop the run after this many skipped steps in a row.
    :param spike_zscore: a loss this many standard deviations above the mean of the last `window` steps is a spike.
    """

    def __init__(self, max_bad_steps: int = 10, spike_zscore: float = 6.0, window: int = 100) -> None:
        self.max_bad_steps, self.spike_zscore = max_bad_steps, spike_zscore
        self.losses = deque(maxlen=window)
        self.bad_in_a_row = self.bad_steps = 0

    def is_finite(self, loss: float, grad_norm: float) -> bool:
        """Whether loss and gradient norm are finite. Steps where they are not are counted.

        :raises TrainingFault: at the last of `max_bad_steps` such steps in a row.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.bad_in_a_row = 0
            return True
        self.bad_steps += 1
        self.bad_in_a_row += 1
        if self.bad_in_a_row >= self.max_bad_steps:
            raise TrainingFault(
                f"{self.bad_in_a_row} steps in a row were not finite (loss {loss}, gradient norm {grad_norm}): "
                "lower --lr, or choose --precision bf16 instead of fp16; the last checkpoint is intact"
            )
        return False

    def spike(self, loss: float) -> float | None:
        """Compare a finite loss with the losses before it: its z-score if it is a spike, else None."""
        zscore = None
        if len(self.losses) >= MIN_HISTORY:
            mean = fmean(self.losses)
            # The lower bounds are for losses that hardly vary: without them every small increase would be a spike.
            zscore = (loss - mean) / max(pstdev(self.losses), 1e-3 * abs(mean), 1e-12)
        self.losses.append(loss)
        return zscore if zscore is not None and zscore > self.spike_zscore else None

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "bad_steps": self.bad_steps, "bad_in_a_row": self.bad_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = deque(state["losses"], maxlen=self.losses.maxlen)
        self.bad_steps, self.bad_in_a_row = state["bad_steps"], state["bad_in_a_row"]
