"""Medians, quartiles, and ratios of samples that were taken in turns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


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
    """Return median and quartiles of at least one sample."""
    if len(samples) == 1:
        return Summary(samples[0], samples[0], samples[0], 1)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Summary(median, low, high, len(samples))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Summary:
    """Return the summary of ours / theirs, round by round.

    What slows the whole machine down for a while is in both samples of a round, and cancels.
    """
    return summary([our / their for our, their in zip(ours, theirs, strict=True)])
