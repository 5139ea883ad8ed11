"""Values for named tensors, chosen by glob: the first rule that matches a name gives its value."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from glob import escape
from typing import Any

__all__ = ["Rules"]

_GLOB = re.compile(r"[*?\[]")
#: How many of the nearest names an error shows.
_NEAREST = 3


class Rules:
    """Globs and their values, in the order in which they are tried.

    Parameters
    ----------
    rules : mapping of str to value
        Keys are `fnmatch` globs: ``*`` matches anything, dots included, ``?`` one character and
        ``[ab]`` one of several. Matching is case-sensitive.

    Raises
    ------
    TypeError
        If `rules` is not a mapping, or a key is not a string.
    """

    def __init__(self, rules: Mapping[str, Any]) -> None:
        if not isinstance(rules, Mapping):
            raise TypeError(f"rules is {type(rules).__name__}, expected a mapping of globs to values")
        for glob in rules:
            if not isinstance(glob, str):
                raise TypeError(f"the rule {glob!r} is {type(glob).__name__}, expected a glob: a string")
        self.globs = list(rules)
        self.values = list(rules.values())
        self._matches = [re.compile(fnmatch.translate(glob)).match for glob in self.globs]

    def first(self, names: Sequence[str]) -> int | None:
        """Return the index of the first rule that matches any of one tensor's names, or None."""
        for index, matches in enumerate(self._matches):
            if any(map(matches, names)):
                return index
        return None

    def check_used(self, names: Sequence[str], chosen: Mapping[str, int]) -> None:
        """Refuse rules that have no effect, where that can only be a mistake.

        Parameters
        ----------
        names : sequence of str
            All names that a rule can match.
        chosen : mapping of str to int
            For each name, the index of the rule that its tensor follows.

        Raises
        ------
        ValueError
            If a rule matches no name, or is the full name of a tensor that follows a rule with another value.
        """
        for index, (glob, matches) in enumerate(zip(self.globs, self._matches, strict=True)):
            if not any(map(matches, names)):
                way_out = f"as a name, it is {escape(glob)!r}" if glob in names else _nearest(glob, names)
                raise ValueError(f"the rule {glob!r} matches nothing; {way_out}")
            winner = chosen.get(glob, index)
            if not _GLOB.search(glob) and not _same(self.values[winner], self.values[index]):
                raise ValueError(
                    f"the rule {glob!r} has no effect: its tensor follows {self.globs[winner]!r}, which comes first, "
                    "there or under a name that it is tied to; put the rule before that one, or drop it"
                )


def _same(a: Any, b: Any) -> bool:
    """Whether two values are the same, compared as text: -0.0 differs from 0.0, and nan equals nan."""
    return repr(a) == repr(b)


def _nearest(glob: str, names: Sequence[str]) -> str:
    if not names:
        return "there are no tensors"
    nearest = difflib.get_close_matches(glob, names, _NEAREST, cutoff=0.0)
    return f"the nearest of {len(names)} names: {', '.join(map(repr, nearest))}"
