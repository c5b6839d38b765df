"""The scale of a chart: where a value stands, in percent of the plot's width, and the ticks that say so."""

import math
from collections.abc import Sequence
from typing import NamedTuple

TICKS = 6  # at most
FAR = 1e300  # what lies beyond stands on the edge


class Axis(NamedTuple):
    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Percent from the left; what lies outside is put on the edge."""
        if math.isinf(value):
            return 100.0 if value > 0 else 0.0
        share = (self._of(value) - self._of(self.low)) / (self._of(self.high) - self._of(self.low))
        return 100 * min(1.0, max(0.0, share))

    def _of(self, value: float) -> float:
        return math.log(max(value, 1e-300)) if self.logarithmic else value


def axis_for(values: Sequence[float], share: bool) -> Axis:
    """0 to 1 for shares, unless all are small; logarithmic where positive values span a factor of 8 or more."""
    values = [value for value in values if abs(value) < FAR]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if share and high > 0.5:
        return Axis(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0))
    if share:
        return _linear(0.0, high or 1.0)
    if low > 0 and high / low >= 8:
        return _logarithmic(low, high)
    return _linear(low, high)


def _linear(low: float, high: float) -> Axis:
    if high <= low:
        low, high = low - (abs(low) or 1.0) / 10, high + (abs(high) or 1.0) / 10
    step = _round_up((high - low) / (TICKS - 2))
    first, last = math.floor(low / step), math.ceil(high / step)
    return Axis(first * step, last * step, tuple(index * step for index in range(first, last + 1)))


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10 times a power of ten."""
    power: float = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))


def _logarithmic(low: float, high: float) -> Axis:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    fine = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    start = max((tick for tick in fine if tick <= low * (1 + 1e-9)), default=low)
    stop = min((tick for tick in fine if tick >= high * (1 - 1e-9)), default=high)
    ticks = [tick for tick in fine if start <= tick <= stop]
    if len(ticks) > TICKS + 1:
        stride = math.ceil((last - first) / (TICKS - 1))
        ticks = [tick for power in range(first, last + 1, stride) if start <= (tick := 10.0**power) <= stop]
    return Axis(start, stop, tuple(ticks), True)
