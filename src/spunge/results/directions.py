"""Which way a metric is to go: what a higher value says, and what is good of it here."""

from typing import Literal

Wanted = Literal["up", "down", "near"]  # near: a value that lies as near as can be to a target
# What a higher value says: the model knows or can do what the items are about, does not, or is better or worse whatever
# the items are. None: none of these.
Higher = Literal["known", "unknown", "good", "bad"] | None


def wanted(higher: Higher, forget: bool | None) -> Wanted | None:
    """Which way is good. `forget`: whether the items are to be forgotten (True) or kept; None: some of either.

    >>> wanted("known", True), wanted("known", False), wanted("known", None), wanted("bad", None)
    ('down', 'up', None, 'down')
    """
    if higher in ("good", "bad"):
        return "up" if higher == "good" else "down"
    if higher is None or forget is None:
        return None
    return "down" if (higher == "known") == forget else "up"


def merit(value: float, wanted: Wanted, target: float | None = None) -> float:
    """How good a value is: the greater the better.

    >>> merit(0.3, "up"), merit(0.3, "down"), merit(0.375, "near", 0.5), merit(0.625, "near", 0.5)
    (0.3, -0.3, -0.125, -0.125)
    """
    if wanted == "near":
        return -abs(value - (target or 0.0))
    return value if wanted == "up" else -value
