"""The parts of a benchmark: a case, its rows, and the contenders of a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: The value to fill with. Never 0, which peers get from the system or with a memset.
VALUE = 1.1


class MissingError(Exception):
    """A contender cannot take part on this machine; the message says why."""


@dataclass(frozen=True)
class Contender:
    """One way to do a row's work.

    Attributes
    ----------
    name : str
        As in the table; unique in its row.
    make : callable
        Takes the row's arguments, does the work that is needed once, and returns the function to measure.
        May raise `MissingError`; a library that is not installed counts as one, and so does any failure of a peer.
    ours : bool
        Whether it is gpuconst, and so is compared with the peers.
    beside : bool
        Whether it does less than the row asks for, and so is shown but not counted as a rival.
    threads : int or None
        The argument of ``torch.set_num_threads``, None for the number of cores.
    environment : mapping of str to str
        Environment variables of the process it runs in, in addition to the row's.
    """

    name: str
    make: Callable[..., Callable[[], Any]]
    ours: bool = False
    beside: bool = False
    threads: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of a case: the same work for each contender.

    Attributes
    ----------
    label : str
        As in the table.
    contenders : sequence of Contender
        In the order in which they take turns.
    arguments : mapping of str to object
        Keyword arguments of each contender's `make`.
    x : float or None
        Position of the row on the axis of a plot; None leaves it out.
    nbytes : int
        Bytes that one call fills; 0 if not applicable.
    environment : mapping of str to str
        Environment variables of the processes.
    """

    label: str
    contenders: Sequence[Contender]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    x: float | None = None
    nbytes: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A question, and the rows that answer it.

    Attributes
    ----------
    title : str
        One line.
    rows : callable
        Takes whether the run is a quick one; returns the same rows at every call, since the worker makes its own.
    check : callable or None
        Takes the result of a contender's function, and raises if it is wrong; the function is then timed in
        a loop. None: contenders check their work and return the figure themselves.
    unit : str
        ``"s"``, ``"bytes"``.
    axis : str
        What `Row.x` counts, ``"bytes"`` or ``"arrays"``; empty if there is nothing to plot.
    fresh : bool
        Whether each round and contender gets a process of its own, in which it goes through all rows.
    rounds : int
        Maximum number of rounds of a full run.
    """

    title: str
    rows: Callable[[bool], list[Row]]
    check: Callable[[Any], None] | None = None
    unit: str = "s"
    axis: str = ""
    fresh: bool = False
    rounds: int = 25
