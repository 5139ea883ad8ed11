"""The cases measure what they say: the same work for each contender, checked before it is timed."""

import functools
import itertools
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import cases, harness, trees
from benchmarks.cases import cuda_time, fill, first_touch, handover, many_existing, many_new
from benchmarks.cases.cuda_memory import DTYPES, LAYOUTS, Rotation
from benchmarks.cases.peers import TORCH, TORCH_EMPTY, check_filled
from benchmarks.contest import Contender, MissingError
from benchmarks.results import CaseResult


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("name", [*cases.CPU, *cases.GPU])
def test_rows_are_well_formed(name: str, quick: bool) -> None:
    case = cases.load(name)
    rows = case.rows(quick)
    assert [row.label for row in rows] == [row.label for row in case.rows(quick)]
    assert len({row.label for row in rows}) == len(rows)
    for row in rows:
        assert len({each.name for each in row.contenders}) == len(row.contenders)
        assert {each.ours for each in row.contenders} == {True, False}
    if case.axis:
        assert any(row.x for row in rows)


def test_only_contenders_that_check_their_work_are_not_checked() -> None:
    """They return figures of their own: of all arrays that are made, of their memory, or of a whole process."""
    unchecked = {name for name in cases.CPU if cases.load(name).check is None}
    memory = {"memory", "keras_memory"}
    assert unchecked == {"first_touch", "jax_first_touch", "many_new", "torch_modules", "startup"} | memory


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("name", ["first_touch", "creation", "fill"])
def test_speed_is_that_of_one_array(name: str, quick: bool) -> None:
    for row in cases.load(name).rows(quick):
        assert row.x == row.nbytes == row.arguments["nbytes"]


def _quick(name: str, gpu: bool, folder: Path) -> CaseResult:
    told: list[float] = []
    tree = {"": trees.snapshot(None, folder / "tree")}
    found = harness.run_case(name, tree, quick=True, gpu=gpu, busy=0.0, progress=lambda rows, _: told.append(rows))
    assert sum(told) == pytest.approx(len(found.rows))
    return found


@pytest.mark.parametrize("name", cases.CPU)
def test_case(name: str, tmp_path: Path) -> None:
    found = _quick(name, False, tmp_path)
    rows = cases.load(name).rows(True)
    missing = [reason for measured in found.rows for reason in measured.missing.values()]
    for reason in missing:
        assert "No module named" in reason or "is not installed" in reason, reason
    if missing:
        pytest.skip(missing[0])
    for row, measured in zip(rows, found.rows, strict=True):
        assert list(measured.measured) == [each.name for each in row.contenders]
        assert measured.ours == [each.name for each in row.contenders if each.ours]
        assert all(each.median > 0 for each in measured.measured.values())
        assert all(set(peers) == set(found.peers) & set(measured.measured) for peers in measured.ratios.values())


@pytest.mark.gpu
@pytest.mark.parametrize("name", cases.GPU)
def test_gpu_case(name: str, tmp_path: Path) -> None:
    found = _quick(name, True, tmp_path)
    for row, measured in zip(cases.load(name).rows(True), found.rows, strict=True):
        usable = [each.name for each in row.contenders if each.ours and each.name not in measured.missing]
        assert measured.ours == usable != []


def test_check_sees_a_wrong_value_and_dtype() -> None:
    check_filled(np.full(3, 1.1, np.float32))
    for wrong, message in (([1.1, 1.0], "found 1.0 to 1.1"), ([1.2, 1.1], r"found 1\.1\d* to 1\.2")):
        with pytest.raises(AssertionError, match=message):
            check_filled(np.array(wrong, np.float32))
    with pytest.raises(AssertionError, match="float64"):
        check_filled(np.full(3, 1.1))


def test_torch_takes_part_on_one_thread_on_two_and_on_all_cores() -> None:
    cores = max(2, len(os.sched_getaffinity(0)))
    threads = {each.name: each.threads for each in (*TORCH, TORCH_EMPTY)}
    full = {"torch.full, 1 thread": 1, "torch.full, 2 threads": 2, f"torch.full, {cores} threads": cores}
    assert threads == {**full, f"torch.empty().fill_, {cores} threads": cores}


@pytest.mark.needs("jax", "tensorflow")
@pytest.mark.parametrize("name", ["creation", "fill"])
def test_contenders_fill_as_many_bytes_as_the_row_says(name: str) -> None:
    row = cases.load(name).rows(True)[-1]
    filled = {each.name: np.asarray(each.make(**row.arguments)()).nbytes for each in row.contenders}
    assert filled == dict.fromkeys(filled, row.nbytes)


def test_arrays_that_are_kept_are_checked_and_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_touch, "_kept", [])
    count = 100
    made: list[weakref.ref[np.ndarray]] = []
    wrong: list[int] = []

    def full(nbytes: int) -> np.ndarray:
        array = np.full(nbytes // 4, 2.0 if len(made) in wrong else 1.1, np.float32)
        made.append(weakref.ref(array))
        return array

    contender = first_touch.keeping(Contender("A", lambda nbytes: functools.partial(full, nbytes)))
    measure = contender.make(nbytes=4096, count=count)
    start = time.perf_counter()
    assert 0 < measure() * count <= time.perf_counter() - start
    assert all(array() is not None for array in made)
    wrong += [len(made), len(made) + 2 * count - 1]  # the first of a sample, and the last of another
    for _ in wrong:
        with pytest.raises(AssertionError, match="found 2.0"):
            measure()


def test_check_of_many_sees_a_wrong_one() -> None:
    asked: list[int] = []

    def maker(lengths: dict[str, tuple[int, float]], as_torch: bool) -> dict[str, Any]:
        asked.append(len({value for _, value in lengths.values()}))
        return {name: np.full(length, 1.1, np.float32) for name, (length, _) in lengths.items()}

    many_new._measured(maker)(count=10, different=1, as_torch=False)()
    with pytest.raises(AssertionError, match=r"expected 768 times 2\.1"):
        many_new._measured(maker)(count=10, different=10, as_torch=False)()
    assert asked == [1, 1, 1, 10]


@pytest.mark.parametrize(
    "maker",
    [many_new._gpuconst, many_new._gpuconst_loop, many_new._numpy, many_new._torch],
    ids=lambda m: str(m.__name__),
)
def test_tensors_are_made_where_they_are_asked_for(maker: many_new.Maker) -> None:
    made = maker({"a": (3, 1.5)}, True)["a"]
    assert isinstance(made, torch.Tensor)
    assert made.tolist() == [1.5] * 3


@pytest.mark.needs("jax", "tensorflow")
@pytest.mark.parametrize("step", handover._STEPS)
def test_both_sides_are_handed_over_as_the_same(step: str) -> None:
    ours, theirs = (each.make(step)() for each in handover.CASE.rows(True)[0].contenders)
    assert type(ours) is type(theirs)
    assert getattr(ours, "dtype", None) == getattr(theirs, "dtype", None)


def test_memory_holds_another_value_before_it_is_filled() -> None:
    for _ in range(2):
        memory = fill.poisoned(64)
        assert (memory == -7.0).all()
        memory.fill(1.1)


def test_check_of_existing_tensors_sees_each_element() -> None:
    assert len(set(many_existing.values(3))) == 3
    tensors = many_existing.poisoned(3, 5)
    assert all((tensor == -7.0).all() for tensor in tensors)
    for tensor, value in zip(tensors, many_existing.values(3), strict=True):
        tensor.fill_(value)
    many_existing.check_each((tensors, many_existing.values(3)))
    for wrong in (-7.0, 700.0):
        tensors[1][4] = wrong
        with pytest.raises(AssertionError, match="filled with something else"):
            many_existing.check_each((tensors, many_existing.values(3)))
    assert all((tensor == -7.0).all() for tensor in many_existing.poisoned(3, 5))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("itemsize", DTYPES)
@pytest.mark.parametrize("nbytes", [16, 64, 4096])
def test_gpu_buffers_hold_what_is_asked(nbytes: int, itemsize: int, layout: str) -> None:
    """The layout is that of torch on any device, so it is checked on the CPU's."""
    memory = Rotation(nbytes, itemsize, layout, device="cpu")
    assert {tensor.numel() * tensor.element_size() for tensor in memory.tensors} == {nbytes}
    memory.check(lambda tensor, value: lambda: tensor.fill_(value))


def test_gpu_check_sees_what_is_missed_and_what_is_touched_beside() -> None:
    memory = Rotation(64, 4, "+1", device="cpu")

    def too_short(tensor: torch.Tensor, value: float) -> Callable[[], Any]:
        return lambda: tensor[:-1].fill_(value)

    def too_long(tensor: torch.Tensor, value: float) -> Callable[[], Any]:
        return lambda: tensor.as_strided((17,), (1,)).fill_(value)

    for filler, message in ((too_short, "an element was missed"), (too_long, "a byte beside them was written")):
        with pytest.raises(AssertionError, match=message):
            memory.check(filler)


class _IdleEvent:
    """An event of a device that has done everything before it is asked."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    synchronize = record

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "_IdleEvent") -> float:
        return 6.0


def test_gpu_time_taken_again_is_that_of_other_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[int] = []
    cuda = SimpleNamespace(Event=_IdleEvent, synchronize=lambda: None, _sleep=slept.append)
    monkeypatch.setattr(cuda_time, "torch_cuda", lambda: SimpleNamespace(cuda=cuda))
    filled: list[int] = []
    buffers = itertools.cycle([functools.partial(filled.append, number) for number in range(100)])
    assert cuda_time.device_seconds(buffers, 3) == pytest.approx(0.002)
    assert filled == [0, 1, 2, 3, 4, 5]
    assert slept == [3 * cycles for cycles in cuda_time._CYCLES_A_CALL]


def test_gpu_time_of_a_call_waits_for_the_device_where_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    lasts, number = 0.001, 20
    pause = functools.partial(time.sleep, lasts)
    cuda = SimpleNamespace(synchronize=pause)
    monkeypatch.setattr(cuda_time, "torch_cuda", lambda: SimpleNamespace(cuda=cuda))
    assert lasts <= cuda_time.total_seconds(list, number) < number * lasts
    assert lasts <= cuda_time.total_seconds(list, number, wait=lambda _: pause()) < number * lasts
    assert lasts <= cuda_time.host_seconds(pause, number) < number * lasts
    assert cuda_time.host_seconds(list, number) < lasts


def test_gpu_contenders_need_room_and_name_their_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(mem_get_info=lambda: (200, 1000))
    monkeypatch.setattr(cuda_time, "torch_cuda", lambda: SimpleNamespace(cuda=cuda))
    cuda_time.need(100)
    with pytest.raises(MissingError, match="are free on the card"):
        cuda_time.need(101)
    both = cuda_time.on_each_backend(Contender("fill", lambda: list, ours=True))
    assert {each.name: each.environment for each in both} == {
        f"fill, {backend}": {"GPUCONST_BACKEND": backend} for backend in ("cupy", "numba")
    }
