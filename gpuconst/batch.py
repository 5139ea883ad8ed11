"""Many arrays and their values: checked, and turned into rows of integers, before anything is written."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from .array import Array
from .columns import Columns, columns
from .dtypes import DType, resolve_dtype
from .errors import about
from .kernels.runs import RUN, TILE, Region, as_run, normalised
from .torch_rules import check_writable, has_memory, is_tensor
from .values import encode, encode_each
from .views import View, view_of

__all__ = ["Batch", "check_value", "each_with_value", "gather", "tiles", "writable_view"]


class Batch(NamedTuple):
    """What one launch on one device can fill.

    Attributes
    ----------
    device : str
        ``"cpu"`` or ``"cuda:N"``.
    runs : numpy.ndarray of RUN
        No run intersects another run, or a strided region.
    strided : list of Region
        The regions that are not runs.
    owners : list
        Objects that keep the memory alive where the arrays alone do not, such as an exported buffer.
    streams : list of int
        Handles of the CUDA streams that are named by arrays which belong to no framework.
    kinds : set of type
        Types of the arrays, one at least of each library.
    """

    device: str
    runs: np.ndarray
    strided: list[Region]
    owners: list[Any]
    streams: list[int]
    kinds: set[type]

    @property
    def nbytes(self) -> int:
        """Bytes that filling it writes."""
        total: int = np.sum(self.runs["nbytes"] * self.runs["count"]).item()
        for region in self.strided:
            total += region.nbytes
        return total


def each_with_value(xs: Iterable[Any], fill_values: Any) -> tuple[list[Any], list[Any] | None]:
    """Return arrays and values as lists; the values are None if one serves all arrays.

    Parameters
    ----------
    xs : iterable of array
        Iterated over once.
    fill_values : scalar, bytes, or iterable of them
        One value for all, or as many as there are arrays.

    Raises
    ------
    TypeError
        If `xs` is a single array, or something that holds arrays but must be unpacked (a module, a mapping);
        if there is a value for each array and `xs` has no order; or if `fill_values` is a mapping, a set, or an
        array that is not NumPy's.
    ValueError
        If the lengths differ, or an iterator is exhausted.
    """
    arrays = _several(xs)
    if _is_one(fill_values):
        return arrays, None
    if isinstance(xs, Set):
        raise TypeError(f"xs is {type(xs).__name__}, which has no order for a value each; pass a list")
    values = list(itertools.islice(fill_values, len(arrays) + 1))  # an iterator may never end
    if len(values) != len(arrays):
        given = f"{len(values)}" if len(values) < len(arrays) else f"more than {len(arrays)}"
        raise ValueError(f"there are {len(arrays)} arrays and {given} values; expected one value, or one for each")
    return arrays, values


def _several(xs: Any) -> list[Any]:
    way_out = None
    if hasattr(type(xs), "parameters"):  # a module of torch, some of which are lists of modules
        way_out = "pass its parameters() or buffers()"
    elif isinstance(xs, Mapping):
        way_out = "pass its values()"
    elif isinstance(xs, np.ndarray) and xs.dtype == object:
        way_out = "pass its tolist()"
    elif hasattr(xs, "__dlpack__") or isinstance(xs, bytearray | memoryview):
        way_out = "for one array use gpuconst.fill"
    elif hasattr(type(xs), "__array__"):  # a dataset of h5py reads each row anew
        way_out = "its parts may be copies, and what they are filled with lost; pass a list of arrays"
    elif not isinstance(xs, Iterable):
        way_out = "pass a list of them"
    if way_out is not None:
        raise TypeError(f"xs is {type(xs).__name__}, expected several arrays; {way_out}")
    arrays = list(xs)
    if not arrays and isinstance(xs, Iterator):
        raise ValueError("the iterator xs gave no arrays; if it was used before, pass list(...) of it instead")
    return arrays


def _is_one(fill_values: Any) -> bool:
    """Whether there is one value for all arrays."""
    if isinstance(fill_values, int | float | complex | str | bytes | bytearray):
        return True
    ndim = getattr(fill_values, "ndim", None)
    if isinstance(fill_values, Mapping | Set) or (ndim and not isinstance(fill_values, np.ndarray)):
        raise TypeError(
            f"fill_values is {type(fill_values).__name__}, expected one value, or one for each array in a list or a "
            "NumPy array"
        )
    return ndim == 0 or not isinstance(fill_values, Iterable)


def gather(arrays: Sequence[Any], fill_values: Any, values: Sequence[Any] | None) -> list[Batch]:
    """Check arrays and values, and return what to fill, launch by launch.

    Arrays whose address ranges intersect are put in successive batches, in order.

    Parameters
    ----------
    arrays : sequence of array
        As for `fill`.
    fill_values, values
        The values as `each_with_value` took and returned them; `fill_values` is used if `values` is None.

    Returns
    -------
    list of Batch
        To be filled in this order.

    Raises
    ------
    TypeError, ValueError, OverflowError, RuntimeError
        As for `fill`, with the index of the array in the message.
    """
    parts: list[_Part] = []
    rest = np.ones(len(arrays), np.bool_)
    for chosen, found in columns(arrays):
        plain = np.flatnonzero(found.plain)
        positions = np.fromiter(chosen, np.int64, len(chosen))[plain]
        for device in sorted(set(found.devices[plain].tolist())):
            these = found.devices[plain] == device
            kind = type(arrays[positions[these][0]])
            parts.append(_plain_part(found, kind, plain[these], positions[these], fill_values, values))
        rest[positions] = False
    parts += _other_parts(arrays, np.flatnonzero(rest).tolist(), fill_values, values)
    by_device: dict[str, list[_Part]] = {}
    for part in parts:
        by_device.setdefault(part.device, []).append(part)
    return [batch for device, these in by_device.items() for batch in _batches(device, these)]


class _Part(NamedTuple):
    """Some of the arrays on one device: as a `Batch`, with the position of each among all arrays."""

    device: str
    runs: np.ndarray
    run_positions: np.ndarray
    strided: list[Region]
    strided_positions: list[int]
    owners: list[Any]
    streams: list[int]
    kinds: set[type]


def tiles(values: Sequence[Any], dtypes: Sequence[DType], named: Callable[[int], str]) -> np.ndarray:
    """Return the tile of each value, for elements that are aligned to their itemsize.

    Parameters
    ----------
    values : sequence of scalar or bytes
        As for `encode`.
    dtypes : sequence of DType
        The dtype of each value.
    named : callable
        Gives the name of the value at an index, for messages.

    Returns
    -------
    numpy.ndarray of uint64
        One row of two words for each value.

    Raises
    ------
    TypeError, ValueError, OverflowError
        As for `encode`, with the name in the message.
    """
    words = np.empty((len(values), 2), np.uint64)
    try:
        kinds = set(dtypes)
        for dtype in kinds:
            if len(kinds) == 1:
                words[:] = _repeated(encode_each(values, dtype), dtype.itemsize)
            else:
                places = [index for index, its in enumerate(dtypes) if its is dtype]
                words[places] = _repeated(encode_each([values[index] for index in places], dtype), dtype.itemsize)
    except (TypeError, ValueError, OverflowError):
        for index, (value, dtype) in enumerate(zip(values, dtypes, strict=True)):
            try:
                encode(value, dtype)
            except (TypeError, ValueError, OverflowError) as error:
                raise about(error, named(index)) from None
        raise
    return words


def _repeated(elements: bytes, itemsize: int) -> np.ndarray:
    """Return each element repeated to fill a tile, one row per element."""
    rows = np.frombuffer(elements, f"V{itemsize}")[:, None]
    return np.repeat(rows, TILE // itemsize, axis=1).view(np.uint64)


def _plain_part(
    found: Columns,
    kind: type,
    chosen: np.ndarray,
    positions: np.ndarray,
    fill_value: Any,
    values: Sequence[Any] | None,
) -> _Part:
    """Return the part that consists of plain arrays of one library on one device, each of which is a run."""
    dtypes = found.dtypes
    if len(chosen) < len(dtypes):
        dtypes = [dtypes[index] for index in chosen.tolist()]
    rows: dict[Any, DType] = {}
    for dtype in dict.fromkeys(dtypes):
        try:
            rows[dtype] = resolve_dtype(dtype)
        except TypeError as error:
            raise TypeError(f"xs[{positions[dtypes.index(dtype)]}]: {error}") from None
    if values is not None:
        mine = values if len(chosen) == len(values) else [values[position] for position in positions.tolist()]
        words = tiles(mine, [rows[dtype] for dtype in dtypes], lambda index: f"xs[{positions[index]}]")
    else:
        kinds = list(rows)
        words = tiles(
            [fill_value] * len(rows), list(rows.values()), lambda index: f"xs[{positions[dtypes.index(kinds[index])]}]"
        )
        if len(rows) > 1:
            numbers = {dtype: number for number, dtype in enumerate(rows)}
            words = words[np.fromiter(map(numbers.__getitem__, dtypes), np.int64, len(dtypes))]
    runs = np.zeros(len(chosen), RUN)
    runs["address"], runs["nbytes"], runs["count"] = found.addresses[chosen], found.nbytes[chosen], 1
    runs["tile_low"], runs["tile_high"] = words[:, 0], words[:, 1]
    index = int(found.devices[chosen[0]])
    return _Part("cpu" if index < 0 else f"cuda:{index}", runs, positions, [], [], [], [], {kind})


def _other_parts(
    arrays: Sequence[Any], positions: Sequence[int], fill_value: Any, values: Sequence[Any] | None
) -> list[_Part]:
    """Return the parts that consist of arrays of any kind, examined one by one."""
    found: dict[str, list[tuple[int, View, Region]]] = {}
    for position in positions:
        x, value = arrays[position], fill_value if values is None else values[position]
        try:
            if is_tensor(x) and not has_memory(x):
                check_value(x, value)
                continue
            view = writable_view(x)
            element = encode(value, view.dtype)
        except (TypeError, ValueError, OverflowError, RuntimeError, BufferError) as error:
            raise about(error, f"xs[{position}]") from None
        region = normalised(Region(view.address, view.shape, view.strides, element))
        if 0 not in region.shape:
            found.setdefault(view.device, []).append((position, view, region))
    return [
        _part(device, looked_at, {type(arrays[position]) for position, _, _ in looked_at})
        for device, looked_at in found.items()
    ]


def _part(device: str, looked_at: Sequence[tuple[int, View, Region]], kinds: set[type]) -> _Part:
    """Return the part that consists of arrays on one device, given the position, view and region of each."""
    rows: list[tuple[int, tuple[int, ...]]] = []
    strided: list[tuple[int, Region]] = []
    for position, _, region in looked_at:
        row = as_run(region)
        if row is None:
            strided.append((position, region))
        else:
            rows.append((position, row))
    return _Part(
        device,
        np.array([row for _, row in rows], RUN),
        np.array([position for position, _ in rows], np.int64),
        [region for _, region in strided],
        [position for position, _ in strided],
        [view.owner for _, view, _ in looked_at],
        [view.stream for _, view, _ in looked_at if view.stream is not None and not isinstance(view.owner, Array)],
        kinds,
    )


def _batches(device: str, parts: Sequence[_Part]) -> list[Batch]:
    """Return the fewest batches such that nothing intersects within a batch and later arrays win."""
    runs = np.concatenate([part.runs for part in parts])
    strided = [region for part in parts for region in part.strided]
    owners = [owner for part in parts for owner in part.owners]
    streams = list(dict.fromkeys(stream for part in parts for stream in part.streams))
    kinds = {kind for part in parts for kind in part.kinds}
    starts = np.concatenate([runs["address"], np.array([region.address for region in strided], np.uint64)])
    stops = np.concatenate(
        [
            runs["address"] + (runs["count"] - np.uint64(1)) * runs["pitch"] + runs["nbytes"],
            np.array([_end(region) for region in strided], np.uint64),
        ]
    )
    order = np.argsort(starts, kind="stable")
    reach = np.maximum.accumulate(stops[order])
    apart = np.append(True, starts[order][1:] >= reach[:-1])  # from all ranges that start at lower addresses
    if apart.all():
        return [Batch(device, runs, strided, owners, streams, kinds)]
    positions = np.concatenate(
        [part.run_positions for part in parts] + [np.array(part.strided_positions, np.int64) for part in parts]
    )
    groups = np.empty(len(starts), np.int64)
    groups[order] = np.cumsum(apart)
    order = np.lexsort((positions, groups))
    lows, highs = starts[order].tolist(), stops[order].tolist()
    turns = np.empty(len(starts), np.int64)
    turns[order] = [
        turn
        for first, last in itertools.pairwise([*np.flatnonzero(apart).tolist(), len(order)])
        for turn in _turns(lows[first:last], highs[first:last])
    ]
    return [
        Batch(
            device,
            runs[turns[: len(runs)] == turn],
            [region for region, its in zip(strided, turns[len(runs) :].tolist(), strict=True) if its == turn],
            owners,
            streams,
            kinds,
        )
        for turn in range(int(turns.max()) + 1)
    ]


def _turns(starts: Sequence[int], stops: Sequence[int]) -> list[int]:
    """Return the batch of each address range: the one after those of all earlier ranges that it intersects."""
    turns = []
    # How many batches have reached each address so far: latest[k] of them from edges[k] to the next edge.
    edges, latest = [0], [0]
    for start, stop in zip(starts, stops, strict=True):
        first, last = bisect.bisect_right(edges, start) - 1, bisect.bisect_left(edges, stop)
        turn = max(latest[first:last])
        turns.append(turn)
        edges[first:last] = [edges[first], start, stop]
        latest[first:last] = [latest[first], turn + 1, latest[last - 1]]
    return turns


def _end(region: Region) -> int:
    """Return the address after the last byte of a normalised region."""
    last: int = region.address + len(region.element)
    for length, stride in zip(region.shape, region.strides, strict=True):
        last += (length - 1) * stride
    return last


def check_value(x: Any, value: Any) -> None:
    """Raise if a value does not fit a tensor without memory: a dry run finds what a run would."""
    encode(value, resolve_dtype(x.dtype))


def writable_view(x: Any) -> View:
    """Return the view of an array that is about to be written.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        If it must not be written; the message says why and what to do.
    """
    if is_tensor(x):
        check_writable(x)
    view = view_of(x)
    if view.read_only is not None:
        raise ValueError(f"cannot fill {type(x).__name__}: {view.read_only}")
    return view
