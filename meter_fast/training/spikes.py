"""Finds steps whose loss leaps out of what the steps before it had. Knows numbers alone."""

from collections import deque
from statistics import median

WINDOW = 50  # steps that a loss is compared with; until there are as many, nothing is a spike
DEVIATIONS = 12.0  # median absolute deviations above the median: eight standard deviations of a normal loss


class Spikes:
    """Compares each step's loss with the median of the last WINDOW finite ones that were no spikes themselves."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def usual(self, loss: float) -> float | None:
        """The median that a spike leaps out of, or None where `loss` is no spike."""
        if len(self._losses) == WINDOW:
            middle = median(self._losses)
            if loss > middle + DEVIATIONS * median(abs(one - middle) for one in self._losses):
                return middle
        self._losses.append(loss)
        return None
