"""Watches a run: steps that are not finite are skipped, losses that jump are reported."""

import math
from collections import deque
from statistics import fmean, pstdev

from ..utils.errors import UserError

MIN_HISTORY = 20


class TrainingFault(UserError):
    """Training has diverged; the last checkpoint is intact."""


class Guardian:
    """Judges each step by its loss and gradient norm.

    :param max_bad_steps: how many steps in a row may be skipped before the run stops.
    :param spike_zscore: a loss so many standard deviations above the mean of the last `window` steps is a spike.
    """

    def __init__(self, max_bad_steps=10, spike_zscore=6.0, window=100):
        self.max_bad_steps, self.spike_zscore = max_bad_steps, spike_zscore
        self.losses = deque(maxlen=window)
        self.bad_in_a_row = self.bad_steps = 0

    def is_finite(self, loss, grad_norm):
        """Whether the step may be taken; counts those that may not.

        :raises TrainingFault: after `max_bad_steps` in a row.
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

    def spike(self, loss):
        """The z-score of a finite loss against its predecessors where it is a spike, else None."""
        zscore = None
        if len(self.losses) >= MIN_HISTORY:
            mean = fmean(self.losses)
            # The floor keeps a loss that has hardly moved from making every small step a spike.
            zscore = (loss - mean) / max(pstdev(self.losses), 1e-3 * abs(mean), 1e-12)
        self.losses.append(loss)
        return zscore if zscore is not None and zscore > self.spike_zscore else None

    def state_dict(self):
        return {"losses": list(self.losses), "bad_steps": self.bad_steps, "bad_in_a_row": self.bad_in_a_row}

    def load_state_dict(self, state):
        self.losses = deque(state["losses"], maxlen=self.losses.maxlen)
        self.bad_steps, self.bad_in_a_row = state["bad_steps"], state["bad_in_a_row"]
