"""A plan fills what `fill_many` fills, as often as it is asked, and knows which arrays have left it."""

import copy
import doctest
import gc
import logging
import pickle
import re
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from many import Entry, FreshBuffer, cases, filled, noise
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import swap_tensors

import gpuconst
from gpuconst import filling


@given(cases())
def test_every_fill_writes_what_one_fill_after_the_other_writes(case: tuple[int, list[Entry]]) -> None:
    size, entries = case
    memory = noise(size)
    plan = gpuconst.plan_fill([entry.over(memory) for entry in entries], [entry.value for entry in entries])
    np.testing.assert_array_equal(memory, noise(size))
    for _ in range(2):
        memory[:] = noise(size)
        plan.fill()
        np.testing.assert_array_equal(memory, filled(size, entries))
    assert plan.stale() == []


def test_pitched_rows_of_one_length_are_filled_to_the_last() -> None:
    arrays = [np.zeros((8, 2000), np.float32) for _ in range(6)]
    gpuconst.plan_fill([x[:, :1000] for x in arrays], range(1, 7)).fill()
    for value, x in enumerate(arrays, start=1):
        assert (x[:, :1000] == value).all()
        assert not x[:, 1000:].any()


def test_megabytes_of_short_arrays_leave_no_longer_one_out() -> None:
    values = np.arange(600) % 251
    short = np.zeros((600, 20_000), np.uint8)[:, : 16 << 10]  # more than one thread fills alone
    longer = [np.zeros(nbytes, np.uint8) for nbytes in (100 << 10, 3 << 20)]
    gpuconst.plan_fill([*short, *longer], [*values, 7, 8]).fill()
    assert (short == values[:, None]).all()
    assert all((x == value).all() for x, value in zip(longer, (7, 8), strict=True))


def test_later_changes_of_the_lists_do_not_matter() -> None:
    arrays, values = [torch.zeros(3), torch.zeros(3)], [1, 2]
    plan = gpuconst.plan_fill(arrays, values)
    first = arrays.pop(0)
    values[1] = 5
    plan.fill()
    assert first.tolist() == [1, 1, 1]
    assert arrays[0].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "xs", [[], [np.zeros(0), torch.zeros(0, 3), gpuconst.zeros(0, device="cpu")], [torch.zeros(3, device="meta")]]
)
def test_nothing_to_fill(xs: list[Any]) -> None:
    plan = gpuconst.plan_fill(xs, 1)
    plan.fill()
    plan.fill(stream=7)
    assert plan.stale() == []
    assert repr(plan) == f"gpuconst.FillPlan({len(xs)} arrays, 0 batches, on no device)"


def test_what_a_plan_says_of_itself() -> None:
    x = torch.zeros(3)
    assert repr(gpuconst.plan_fill([x, x[1:], np.zeros(2)], 1)) == "gpuconst.FillPlan(3 arrays, 2 batches, on cpu)"


def test_what_is_tied_to_a_plan_need_not_keep_it_alive() -> None:
    plan = gpuconst.plan_fill([np.zeros(2)], 1)
    assert weakref.ref(plan)() is plan


def test_the_example_in_the_documentation() -> None:
    failed, attempted = doctest.testmod(filling)
    assert (failed, attempted > 0) == (0, True)


def test_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "gpuconst"):
        plan = gpuconst.plan_fill([torch.zeros(6), np.zeros((4, 2))[:, 0]], 1)
        plan.fill()
    planned, done = caplog.messages
    assert re.fullmatch(r"planned to fill 2 arrays, 56 bytes, in 1 launches; took 0\.\d{6} s", planned)
    assert re.fullmatch(r"filled 2 arrays, 56 bytes, in 1 launches; took 0\.\d{6} s", done)


# Arrays that have moved


def resized_storage(x: torch.Tensor, nbytes: int) -> None:
    x.untyped_storage().resize_(nbytes)


MOVES: dict[str, Callable[[torch.nn.Linear], Any]] = {
    "double": lambda module: module.double(),
    "half": lambda module: module.half(),
    "new data": lambda module: setattr(module.weight, "data", torch.ones(40, 50)),
    "new data of another shape": lambda module: setattr(module.weight, "data", torch.ones(3)),
    "resized to more": lambda module: module.weight.data.resize_(80, 50),
    "set": lambda module: module.weight.set_(torch.ones(40, 50)),  # type: ignore[call-overload]
    "freed": lambda module: resized_storage(module.weight.data, 0),
    "less storage": lambda module: resized_storage(module.weight.data, 16),
    "swapped": lambda module: swap_tensors(module.weight, torch.nn.Parameter(torch.ones(40, 50))),  # type: ignore[no-untyped-call]
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("among", [[], [np.zeros(3)]], ids=["torch", "torch and NumPy"])
def test_what_has_moved_is_stale(move: str, among: list[Any]) -> None:
    module, other = torch.nn.Linear(50, 40, bias=False), torch.zeros(3)
    with torch.no_grad():
        plan = gpuconst.plan_fill([other, *among, module.weight, other[1:]], 1)
        assert plan.stale() == []
        MOVES[move](module)
    assert plan.stale() == [1 + len(among)]


def test_a_parameter_that_is_resized_in_place_is_stale() -> None:
    x = torch.zeros(4)
    plan = gpuconst.plan_fill([x], 1)
    x.resize_(2)
    assert plan.stale() == [0]
    x.resize_(4)
    assert plan.stale() == []
    x.resize_(4000)
    assert plan.stale() == [0]


def test_views_of_what_was_freed_are_stale() -> None:
    base, other = torch.zeros(8), torch.zeros(8)
    plan = gpuconst.plan_fill([other[::2], base[1:3], base[::2], other], 1)
    resized_storage(base, 0)
    assert plan.stale() == [1, 2]


def test_a_numpy_array_that_was_resized_is_stale() -> None:
    arrays = [np.zeros(3), np.zeros(3)]
    plan = gpuconst.plan_fill(arrays, 1)
    arrays[1].resize(100_000, refcheck=False)
    assert plan.stale() == [1]


def test_a_numpy_array_that_was_cut_short_is_stale_wherever_it_is() -> None:
    arrays = [np.zeros(3), np.zeros(3)]
    plan = gpuconst.plan_fill(arrays, 1)
    arrays[1].resize(2, refcheck=False)
    assert plan.stale() == [1]


class Closable:
    def __init__(self) -> None:
        self.memory = np.zeros(3)
        self.error: Exception | None = None

    def __dlpack__(self, **arguments: Any) -> Any:
        if self.error is not None:
            raise self.error
        return self.memory.__dlpack__(**arguments)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.memory.__dlpack_device__()


@pytest.mark.parametrize("error", [BufferError, ValueError, TypeError])
def test_what_exports_its_memory_no_more_is_stale(error: type[Exception]) -> None:
    x = Closable()
    plan = gpuconst.plan_fill([np.zeros(3), x], 1)
    assert plan.stale() == []
    x.error = error("the exporter is closed")
    assert plan.stale() == [1]


def test_what_exports_other_memory_is_stale() -> None:
    x = Closable()
    plan = gpuconst.plan_fill([np.zeros(3), x], 1)
    x.memory = np.zeros(3)
    assert plan.stale() == [1]


def test_a_fake_tensor_has_no_memory_that_could_move() -> None:
    with FakeTensorMode():
        fake = torch.zeros(3)
    x = torch.zeros(3)
    plan = gpuconst.plan_fill([fake, x], 5)
    plan.fill()
    assert plan.stale() == []
    assert x.tolist() == [5, 5, 5]


UNMOVED: dict[str, Callable[[torch.nn.Linear], Any]] = {
    "nothing": lambda module: None,
    "a training step": lambda module: torch.optim.SGD(module.parameters(), 0.1).step(),
    "a gradient": lambda module: module(torch.ones(1, 50)).sum().backward(),
    "float again": lambda module: module.float(),
    "frozen": lambda module: module.requires_grad_(False),
    "loaded": lambda module: module.load_state_dict(copy.deepcopy(module.state_dict())),
    "reshaped": lambda module: setattr(module.weight, "data", module.weight.data.view(50, 40)),
}


@pytest.mark.parametrize("change", UNMOVED)
def test_what_is_where_it_was_is_not_stale(change: str) -> None:
    module = torch.nn.Linear(50, 40)
    with torch.no_grad():
        plan = gpuconst.plan_fill(module.parameters(), 0.5)
    UNMOVED[change](module)
    assert plan.stale() == []
    with torch.no_grad():
        plan.fill()
    assert all((x == 0.5).all() for x in module.parameters())


# What is kept alive


def test_arrays_live_as_long_as_the_plan() -> None:
    arrays: list[Any] = [torch.zeros(300), torch.zeros(2, 3).T, np.zeros(3000), gpuconst.zeros(3, device="cpu")]
    references = [weakref.ref(x) for x in arrays]
    plan = gpuconst.plan_fill(arrays, 1)
    arrays.clear()
    gc.collect()
    assert all(reference() is not None for reference in references)
    plan.fill()
    assert all((np.asarray(reference()) == 1).all() for reference in references)
    del plan
    gc.collect()
    assert [reference() for reference in references] == [None] * 4


GIVEN_OTHER_MEMORY: dict[str, Callable[[torch.nn.Parameter], Any]] = {
    "new data": lambda x: setattr(x, "data", torch.ones(30)),
    "set": lambda x: x.set_(torch.ones(30)),  # type: ignore[call-overload]
    "another dtype": lambda x: setattr(x, "data", x.data.double()),
    "swapped": lambda x: swap_tensors(x, torch.nn.Parameter(torch.ones(30))),  # type: ignore[no-untyped-call]
}


@pytest.mark.parametrize("give", GIVEN_OTHER_MEMORY)
def test_the_memory_lives_as_long_as_the_plan_whatever_the_tensor_is_given(give: str) -> None:
    memory = np.zeros(30, np.float32)
    x, owner = torch.nn.Parameter(torch.from_numpy(memory)), weakref.ref(memory)
    with torch.no_grad():
        plan = gpuconst.plan_fill([np.zeros(3), x], 5)
        GIVEN_OTHER_MEMORY[give](x)
        del memory
        gc.collect()
        assert owner() is not None
        plan.fill()
        np.testing.assert_array_equal(owner(), 5)
        assert not (x == 5).any()
    del plan
    gc.collect()
    assert owner() is None


def test_a_plan_is_not_copied() -> None:
    plan = gpuconst.plan_fill([torch.zeros(3)], 1)
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(
            TypeError, match=r"FillPlan\(1 arrays.* cannot be copied or pickled; make another: gpuconst\."
        ):
            duplicate(plan)


def test_a_bytearray_cannot_move_as_long_as_the_plan_lives() -> None:
    x = bytearray(5)
    plan = gpuconst.plan_fill([x], 7)
    with pytest.raises(BufferError):
        x.extend(bytes(1000))
    plan.fill()
    assert x == bytes([7] * 5)
    del plan
    x.extend(bytes(1000))


def test_an_export_lives_as_long_as_the_plan() -> None:
    x = FreshBuffer()
    plan = gpuconst.plan_fill([x], 1)
    plan.fill()
    gc.collect()
    assert [bytes(buffer) for made in x.made if (buffer := made()) is not None] == [b"\1" * 4096]
    del plan
    gc.collect()
    assert not any(made() for made in x.made)


# What torch asks


def test_backward_raises_after_a_fill() -> None:
    saved = torch.ones(3, requires_grad=True) * 1
    result = (saved * saved).sum()
    with torch.no_grad():
        plan = gpuconst.plan_fill([np.zeros(2), saved], 5)
        torch.autograd.grad(result, saved, retain_graph=True)  # nothing has been written yet
        plan.fill()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()  # type: ignore[no-untyped-call]


def test_every_fill_counts_as_a_write() -> None:
    x = torch.zeros(3)
    plan = gpuconst.plan_fill([x, np.zeros(3)], 1)
    assert x._version == 0
    plan.fill()
    plan.fill()
    assert x._version == 2


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[1:], lambda x: x[::2], lambda x: x * 1])
def test_what_requires_grad_is_filled_only_outside_of_autograd(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    free, x = torch.zeros(3), view(torch.zeros(4, requires_grad=True))
    before = x._version
    with torch.no_grad():
        plan = gpuconst.plan_fill([free, torch.zeros(3, device="meta", requires_grad=True), x], 5)
    with pytest.raises(RuntimeError, match=r"^xs\[2\]: the tensor requires grad .*no_grad"):
        plan.fill()
    assert not any([free.any(), x.any(), free._version, x._version - before])
    with torch.no_grad():
        plan.fill()
    assert (x == 5).all()


def test_freezing_one_tensor_leaves_the_others_to_autograd() -> None:
    frozen, x = (torch.ones(3, requires_grad=True) for _ in range(2))
    with torch.no_grad():
        plan = gpuconst.plan_fill([frozen, x], 2.0)
    frozen.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"^xs\[1\]: the tensor requires grad"):
        plan.fill()
    assert x.tolist() == [1, 1, 1]
    x.requires_grad_(False)
    plan.fill()
    assert x.tolist() == [2, 2, 2]


@pytest.mark.parametrize("inference", [False, True])
def test_a_meta_tensor_that_may_not_be_written_holds_nothing_up(inference: bool) -> None:
    with torch.inference_mode(inference):
        meta = torch.zeros(3, device="meta", requires_grad=not inference)
    x = torch.zeros(3)
    plan = gpuconst.plan_fill([meta, x], 5)
    plan.fill()
    assert (x == 5).all()


def test_inference_tensors_are_filled_only_in_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.zeros(3)
        plan = gpuconst.plan_fill([x], 5)
    with pytest.raises(RuntimeError, match="made in inference mode"):
        plan.fill()
    assert not x.any()
    with torch.inference_mode():
        plan.fill()
    assert (x == 5).all()


# Threads


def test_plans_under_threads() -> None:
    wrong: list[Any] = []
    shared = [torch.zeros(n) for n in range(1, 60)]
    everyone = gpuconst.plan_fill([*shared, *(x[::2] for x in shared)], [1] * 59 + [2] * 59)

    def work(value: int) -> None:
        arrays: list[Any] = [torch.zeros(n % 7 + 1, dtype=torch.int32) for n in range(50)]
        arrays += [np.zeros((4, n), np.int32)[:, ::2] for n in range(1, 20)]
        plans = [gpuconst.plan_fill(arrays, value + k) for k in range(4)]
        for k in range(60):
            plans[k % 4].fill()
            wrong.extend(x for x in arrays if not (x == value + k % 4).all())
            everyone.fill()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(value,)) for value in range(0, 600, 100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert all((x[::2] == 2).all() and (x[1::2] == 1).all() for x in shared)
