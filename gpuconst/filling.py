"""Existing memory, filled in place: `fill`, `fill_many`, `plan_fill`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any, NoReturn, TypeVar

import numpy as np

from .array import Array
from .backends import Place, select
from .batch import Batch, check_value, each_with_value, gather, writable_view
from .dtypes import resolve_dtype
from .kernels import host_fill
from .kernels.cuda_driver import is_capturing, on_any_thread
from .kernels.runs import Region
from .log import debug
from .streams import check_captured, current_streams, stream_handle, torch_stream
from .torch_rules import (
    check_eager,
    check_writable,
    compiling,
    has_memory,
    is_tensor,
    mark_stretch_written,
    mark_written,
    restricted,
    storages,
    stretch,
    tensor_positions,
)
from .values import encode
from .views import View, extents

__all__ = ["FillPlan", "fill", "fill_many", "plan_fill"]


#: Up to this many arrays, it is worth checking whether they can be filled one by one.
FEW = 100

T = TypeVar("T")


def fill(x: T, fill_value: Any, *, stream: Any = None) -> T:
    """Fill an array with a constant, in place, and return it.

    Everything is checked before anything is written. On CUDA, the fill is asynchronous, on the current
    stream of the library that owns the array.

    Parameters
    ----------
    x : array
        A writable NumPy or CuPy array, a torch tensor, a gpuconst `Array`, or any object with DLPack,
        the buffer protocol or ``__cuda_array_interface__``; contiguous, strided, flipped or expanded.
        Of a DTensor, the local part is filled. For a meta or fake tensor, only the value is checked.
    fill_value : scalar or bytes
        As for `full`; it must fit the dtype of `x`.
    stream : optional
        The CUDA stream to fill on, instead of the owner's current one.

    Returns
    -------
    array
        `x` itself.

    Raises
    ------
    TypeError
        If `x` is not an array, or the value is of the wrong kind for its dtype.
    ValueError
        If `x` is read-only or immutable (JAX, TensorFlow), describes memory that cannot exist, or a
        stream is given for CPU memory.
    OverflowError
        If the value does not fit the dtype of `x`.
    RuntimeError
        If autograd is recording and `x` requires grad (`torch.Tensor.fill_` refuses only leaves, and
        records the fill of other tensors); or if a framework is capturing a CUDA graph and the fill would
        go to another stream and be missing from it.
    DeviceUnavailableError
        If no backend can reach the memory of `x`.
    """
    if compiling():
        from .torch_eager import eagerly

        filled: T = eagerly(fill, x, fill_value, stream=stream)
        return filled
    is_torch = type(x) is not np.ndarray and is_tensor(x)
    if is_torch:
        check_eager()
    found = _fast_path(x, fill_value, is_torch) if stream is None else None
    if found is not None:
        store, arguments, _ = found
        if is_torch:
            mark_stretch_written(x)  # first, since a fill that is interrupted has written too
        store(*arguments)
        return x
    if is_torch and not has_memory(x):
        check_value(x, fill_value)
        return x
    view = writable_view(x)
    element = encode(fill_value, view.dtype)
    place = select(view.device)
    handle = stream_handle(stream, place) if stream is not None else _owners_stream(x, view, place)
    if view.stream is not None:
        _wait_for_owner(x, view.stream, handle, place)
    if is_torch:
        mark_written([x])
    place.module.fill(Region(view.address, view.shape, view.strides, element), place.index, handle)
    if isinstance(x, Array) and handle != view.stream and not is_capturing(place.index, handle):
        x._stream = on_any_thread(handle)
    return x


def _fast_path(x: Any, fill_value: Any, is_torch: bool) -> tuple[Callable[..., None], tuple[Any, ...], str] | None:
    """Return a function that fills an ordinary tensor, NumPy array or `Array`, its arguments, and the device.

    Return None for any other array. These need no closer look, which would cost more than filling up to 64 KiB.
    """
    if is_torch:
        found = stretch(x)
        if found is None:
            return None
        address, nbytes, torch_dtype, index = found
        dtype = resolve_dtype(torch_dtype)
        place, handle = (select("cpu"), 0) if index < 0 else (select(f"cuda:{index}"), torch_stream(index))
    elif type(x) is Array:
        address, nbytes, dtype, place, handle = x._address, x.nbytes, x._dtype, x._place, x._stream
    elif type(x) is np.ndarray and x.flags.writeable:
        return host_fill.fill_array, (x, encode(fill_value, resolve_dtype(x.dtype))), "cpu"
    else:
        return None
    element = encode(fill_value, dtype)
    if place.device != "cpu":
        check_captured(handle, place)
    return place.module.fill_stretch, (address, nbytes, element, place.index, handle), place.device


def _owners_stream(x: Any, view: View, place: Place) -> int:
    """Return the handle of the stream that orders work on an array."""
    if place.device == "cpu":
        return 0
    theirs = current_streams([type(x)], place.index) if view.stream is None else [view.stream]
    handle = theirs[0] if theirs else 0
    check_captured(handle, place)
    return handle


def _wait_for_owner(x: Any, owner: int, handle: int, place: Place) -> None:
    """Make the requested stream wait for the one that the array was last filled, exported or used on.

    It does not wait for a framework's current stream: as in the framework's own calls, callers who pass
    a stream order it themselves.
    """
    if isinstance(x, Array):
        place.module.hand_over(x._memory, owner, handle)
    else:
        place.module.order(owner, handle, place.index)


def fill_many(xs: Iterable[Any], fill_values: Any, *, stream: Any = None) -> None:
    """Fill many arrays with constants, in one launch per device.

    Everything is checked before anything is written: either every array is filled, or none is touched.
    Arrays whose address ranges intersect are filled in order, in successive launches. An array with
    gaps takes launches of its own, unless it consists of evenly spaced long rows. The call is equivalent
    to a `plan_fill` that is used once.

    Parameters
    ----------
    xs : iterable of array
        Any mix of arrays that `fill` takes.
    fill_values : scalar, bytes, or iterable of them
        One value for all, or one for each array.
    stream : optional
        The CUDA stream to fill on, instead of the owners' current ones.

    Raises
    ------
    TypeError, ValueError, OverflowError, RuntimeError
        As for `fill`, with the index of the array in the message; also ValueError if there are not as
        many values as arrays.
    """
    if compiling():
        from .torch_eager import eagerly

        eagerly(fill_many, xs, fill_values, stream=stream)
        return
    start = time.perf_counter()
    arrays, values = each_with_value(xs, fill_values)
    if stream is None and _filled_in_turn(arrays, repeat(fill_values) if values is None else values):
        _log_done("filled", len(arrays), sum(x.nbytes for x in arrays), len(arrays), start)
        return
    steps = _prepared(arrays, fill_values, values, stream)
    _fill(steps, stream, _tensors(arrays))
    _log_done("filled", len(arrays), sum(step.nbytes for step in steps), len(steps), start)


def _filled_in_turn(arrays: Sequence[Any], values: Iterable[Any]) -> bool:
    """Fill a few small ordinary arrays on the CPU; if any is something else, fill none and return False.

    Preparing a launch takes as long as filling a hundred of them. Errors are left for the long way to report.
    """
    if not 0 < len(arrays) <= FEW:
        return False
    tensors = _tensors(arrays)
    if tensors:
        check_eager()
    stores = []
    for x, value in zip(arrays, values, strict=False):
        try:
            found = _fast_path(x, value, is_tensor(x))
        except (TypeError, ValueError, OverflowError):
            return False
        if found is None or found[2] != "cpu" or x.nbytes >= host_fill.SMALLEST_SHARED:
            return False
        stores.append(found)
    if tensors:
        mark_written(tensors)
    for store, arguments, _ in stores:
        store(*arguments)
    return True


def plan_fill(xs: Iterable[Any], fill_values: Any) -> FillPlan:
    """Prepare many arrays to be filled with constants again and again.

    Parameters
    ----------
    xs : iterable of array
        Any mix of arrays that `fill` takes; the plan keeps them alive.
    fill_values : scalar, bytes, or iterable of them
        One value for all, or one for each array.

    Returns
    -------
    FillPlan

    Raises
    ------
    TypeError, ValueError, OverflowError, RuntimeError
        As for `fill_many`.

    Examples
    --------
    >>> import gpuconst, torch
    >>> buffers = [torch.empty(n) for n in (3, 1000, 64)]
    >>> plan = gpuconst.plan_fill(buffers, [0.0, 1.0, -0.5])
    >>> plan.fill()
    >>> buffers[2][:2]
    tensor([-0.5000, -0.5000])
    """
    if compiling():
        from .torch_eager import eagerly

        plan: FillPlan = eagerly(FillPlan, xs, fill_values)
        return plan
    return FillPlan(xs, fill_values)


class FillPlan:
    """Arrays and values, checked and laid out once, so that each fill costs one launch per device.

    Made by `plan_fill`. A plan writes to the addresses that the arrays had when it was made, and keeps
    that memory alive. It becomes stale when an array is given other memory: call `stale` after anything
    that may have done so, and make a new plan if it returns any index. After ``module.double()`` or
    ``tensor.data = …``, a stale plan fills memory that is no longer read. No plan survives an operation
    that frees the memory itself: ``tensor.resize_``, ``untyped_storage().resize_`` (which FSDP uses to
    reshard), ``tensor.share_memory_`` (and so sending it through `torch.multiprocessing`),
    ``SharedMemory.close`` or ``ndarray.resize`` with ``refcheck=False``. A fill after it overwrites memory
    that belongs to something else, or crashes.
    """

    __slots__ = ("__weakref__", "_arrays", "_extents", "_nbytes", "_restricted", "_steps", "_storages", "_tensors")

    def __init__(self, xs: Iterable[Any], fill_values: Any) -> None:
        start = time.perf_counter()
        self._arrays, values = each_with_value(xs, fill_values)
        self._steps = _prepared(self._arrays, fill_values, values, None)
        for step in self._steps:
            step.settle()
        self._nbytes = sum(step.nbytes for step in self._steps)
        self._tensors = _tensors(self._arrays)
        self._storages = storages(self._tensors)
        self._restricted = restricted(self._arrays)
        self._extents = extents(self._arrays)
        self._log_done("planned to fill", start)

    def fill(self, *, stream: Any = None) -> None:
        """Fill the arrays.

        Parameters
        ----------
        stream : optional
            The CUDA stream to fill on, instead of the owners' current ones. It may be capturing a CUDA
            graph; the plan must then live as long as the graph.

        Raises
        ------
        ValueError
            If a stream is given and all arrays are on the CPU, or it belongs to another device.
        RuntimeError
            If autograd is recording and an array required grad when the plan was made; if an array is an
            inference tensor and inference mode is off; or if a framework is capturing a CUDA graph and
            the fill would go to another stream and be missing from it.
        """
        if compiling():
            from .torch_eager import eagerly

            eagerly(FillPlan.fill, self, stream=stream)
            return
        start = time.perf_counter()
        for position in self._restricted.now():
            try:
                check_writable(self._arrays[position])
            except RuntimeError as error:
                raise RuntimeError(f"xs[{position}]: {error}") from None
        _check_stream(stream, self._steps)
        _fill(self._steps, stream, self._tensors)
        self._log_done("filled", start)

    def stale(self) -> list[int]:
        """Return the indices of the arrays whose memory has moved or changed size since the plan was made.

        Returns
        -------
        list of int
            Empty as long as the plan may be used. Arrays that have become read-only are not reported, nor is a
            module that has got other parameters since (``load_state_dict(assign=True)``): the plan knows the old ones.
        """
        moved: list[int] = np.flatnonzero((extents(self._arrays) != self._extents).any(axis=0)).tolist()
        return moved

    def _log_done(self, what: str, start: float) -> None:
        _log_done(what, len(self._arrays), self._nbytes, len(self._steps), start)

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} holds addresses, and cannot be copied or pickled; make another: gpuconst.plan_fill")

    def __repr__(self) -> str:
        devices = ", ".join(dict.fromkeys(step.place.device for step in self._steps))
        return f"gpuconst.FillPlan({len(self._arrays)} arrays, {len(self._steps)} batches, on {devices or 'no device'})"


class _Step:
    """One launch: a batch, the place that fills it, and the arrays whose streams it must respect."""

    __slots__ = ("_batch", "_ours", "_prepared_on", "_run", "nbytes", "place")

    def __init__(self, place: Place, batch: Batch, arrays: Sequence[Any]) -> None:
        self.place = place
        self._batch = batch
        self.nbytes = batch.nbytes
        self._run: Callable[[int], None] | None = None
        self._prepared_on = 0
        on_gpu = place.device != "cpu"
        self._ours = [x for x in arrays if isinstance(x, Array) and x.device == place.device] if on_gpu else []

    def prepare(self, stream: Any) -> None:
        self._prepared_on, _ = self._streams(stream)
        self._run = self.place.module.prepare(
            self._batch.runs, self._batch.strided, self.place.index, self._prepared_on
        )

    def settle(self) -> None:
        """Wait until the table is in place, so that any stream can read it; a single run has none."""
        if len(self._batch.runs) > 1:
            self.place.module.synchronize(self.place.index, self._prepared_on)

    def join(self, stream: Any) -> tuple[int, list[int]]:
        """Return the stream to fill on, which now waits for the arrays, and those that have to wait for it afterwards.

        Raises
        ------
        ValueError, RuntimeError
            If the stream is of another device, or a graph that is being captured forbids it.
        """
        place = self.place
        handle, others = self._streams(stream)
        for other in others:
            place.module.order(other, handle, place.index)
        for array in self._ours:
            if array._stream != handle:
                place.module.hand_over(array._memory, array._stream, handle)
                if not is_capturing(place.index, handle):  # else nothing runs there yet that the array could wait for
                    array._stream = on_any_thread(handle)
        return handle, others if stream is None else []  # else the caller orders what comes after it

    def fill(self, handle: int, others: Sequence[int]) -> None:
        """Fill on a stream, and make others wait for it."""
        assert self._run is not None
        self._run(handle)
        for other in others:
            self.place.module.order(handle, other, self.place.index)

    def _streams(self, stream: Any) -> tuple[int, list[int]]:
        """Return the stream to fill on, and the other streams that the arrays are used on, which it waits for."""
        if self.place.device == "cpu":
            return 0, []
        if stream is not None:
            return stream_handle(stream, self.place), self._batch.streams
        handles = current_streams(self._batch.kinds, self.place.index) + self._batch.streams
        first, *others = dict.fromkeys(handles or [array._stream for array in self._ours[:1]] or [0])
        check_captured(first, self.place)
        return first, others


def _prepared(arrays: Sequence[Any], fill_values: Any, values: Sequence[Any] | None, stream: Any) -> list[_Step]:
    """Check everything and prepare every step, table and memory included, so that none is filled if one cannot be."""
    steps = [_Step(select(batch.device), batch, arrays) for batch in gather(arrays, fill_values, values)]
    _check_stream(stream, steps)
    for step in steps:
        step.prepare(stream)
    return steps


def _fill(steps: Sequence[_Step], stream: Any, tensors: Sequence[Any]) -> None:
    if tensors:
        check_eager()
    joined = [(step, *step.join(stream)) for step in steps]  # what can be refused is, before anything is written
    if tensors:
        mark_written(tensors)  # first, since a fill that is interrupted has written too
    for step, handle, others in joined:
        step.fill(handle, others)


def _check_stream(stream: Any, steps: Sequence[_Step]) -> None:
    if stream is not None and steps and all(step.place.device == "cpu" for step in steps):
        raise ValueError(f"stream={stream!r} was given, but all arrays are on the CPU, which has none; drop it")


def _tensors(arrays: Sequence[Any]) -> list[Any]:
    """Return the torch tensors, whose version counters must go up."""
    positions = tensor_positions(arrays)
    return list(arrays) if len(positions) == len(arrays) else [arrays[position] for position in positions]


def _log_done(what: str, arrays: int, nbytes: int, launches: int, start: float) -> None:
    seconds = time.perf_counter() - start
    debug("%s %d arrays, %d bytes, in %d launches; took %.6f s", what, arrays, nbytes, launches, seconds)
