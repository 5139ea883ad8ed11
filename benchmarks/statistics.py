"""Medians, quartiles, and ratios of samples that were taken in turns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

#: Significant digits that are kept; more would be noise, in the files and in the differences between them.
_DIGITS = 4


class Summary(NamedTuple):
    """Median and quartiles of samples.

    Attributes
    ----------
    median : float
        The median.
    low, high : float
        The first and the third quartile.
    samples : int
        Number of samples.
    """

    median: float
    low: float
    high: float
    samples: int


def summary(samples: Sequence[float]) -> Summary:
    """Return the median and quartiles of at least one sample, to four significant digits."""
    quartiles = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    low, median, high = (float(f"{quartile:.{_DIGITS}g}") for quartile in quartiles)
    return Summary(median, low, high, len(samples))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Summary:
    """Return the summary of ours / theirs, round by round.

    Anything that slows the whole machine for a while affects both samples of a round, and cancels out.
    """
    return summary([our / their for our, their in zip(ours, theirs, strict=True)])
