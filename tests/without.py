"""An interpreter in which installed packages are not installed."""

from __future__ import annotations

import sys
from typing import Any


class _Without:
    def __init__(self, finder: Any, names: tuple[str, ...]) -> None:
        self._finder = finder
        self._names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in self._names:
            return None
        return self._finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def hide(*names: str) -> None:
    """Make imports find these packages no more; none of them may have been imported."""
    assert not any(name.partition(".")[0] in names for name in sys.modules)
    sys.meta_path[:] = [_Without(finder, names) for finder in sys.meta_path]
