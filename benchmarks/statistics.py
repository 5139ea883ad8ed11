"""Medians, quartiles, and ratios of samples that were taken in turns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

#: What follows would be noise, in the files and in the differences between them.
_DIGITS = 4


class Summary(NamedTuple):
    """Samples in short.

    Attributes
    ----------
    median : float
        The middle one.
    low, high : float
        The first and the third quartile.
    samples : int
        How many there were.
    """

    median: float
    low: float
    high: float
    samples: int


def summary(samples: Sequence[float]) -> Summary:
    """Return median and quartiles of at least one sample, to four significant digits."""
    quartiles = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    low, median, high = (float(f"{quartile:.{_DIGITS}g}") for quartile in quartiles)
    return Summary(median, low, high, len(samples))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Summary:
    """Return the summary of ours / theirs, round by round.

    What slows the whole machine down for a while is in both samples of a round, and cancels.
    """
    return summary([our / their for our, their in zip(ours, theirs, strict=True)])
