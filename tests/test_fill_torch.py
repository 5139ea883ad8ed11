"""What torch asks of those who write into its memory: autograd stays right, and what has no memory is left alone."""

import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad
from torch._subclasses.fake_tensor import FakeTensorMode

import gpuconst
from gpuconst.kernels import host


def saved_by_autograd() -> tuple[torch.Tensor, torch.Tensor]:
    """Return a tensor that autograd has saved for a backward pass, and the result to start that from."""
    saved = torch.ones(3, requires_grad=True) * 1
    return saved, (saved * saved).sum()


@pytest.mark.parametrize("fill", [torch.Tensor.fill_, gpuconst.fill])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_backward_raises_after_the_saved_values_were_filled(
    fill: Callable[..., Any], context: Callable[[], AbstractContextManager[None]]
) -> None:
    saved, result = saved_by_autograd()
    with context():
        fill(saved, 5.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()  # type: ignore[no-untyped-call]


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a slice": lambda x: x[1:2],
    "a detached tensor": lambda x: x.detach(),
    "an expanded tensor": lambda x: x[:1].expand(5),
    "an empty slice": lambda x: x[3:],
}


@pytest.mark.parametrize("view", VIEWS)
def test_filling_a_view_counts_as_writing_its_base(view: str) -> None:
    saved, result = saved_by_autograd()
    with torch.no_grad():
        gpuconst.fill(VIEWS[view](saved), 5.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()  # type: ignore[no-untyped-call]


FILLS: dict[str, Callable[[torch.Tensor], Any]] = {
    "fill": lambda x: gpuconst.fill(x, 5.0),
    "fill_many": lambda x: gpuconst.fill_many([x], 5.0),
    "a plan": lambda x: gpuconst.plan_fill([x], 5.0).fill(),
}


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("step", [1, 2])
def test_a_fill_that_is_interrupted_counts_as_a_write(fill: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = [(host, "fill_stretch"), (host, "fill_laid_out")]  # of contiguous tensors, and of all others
    for module, name in stores:
        monkeypatch.setattr(module, name, interrupted(getattr(module, name)))
    saved, result = saved_by_autograd()
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        FILLS[fill](saved[::step])
    assert saved[0] == 5.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()  # type: ignore[no-untyped-call]


def interrupted(store: Callable[..., None]) -> Callable[..., None]:
    """Return a store that is interrupted when it has done its work."""

    def run(*arguments: Any, **keywords: Any) -> None:
        store(*arguments, **keywords)
        raise KeyboardInterrupt

    return run


def test_data_is_outside_of_autograd_as_with_fill_() -> None:
    saved, result = saved_by_autograd()
    gpuconst.fill(saved.data, 5.0)
    result.backward()  # type: ignore[no-untyped-call]


def test_a_refused_fill_does_not_count_as_a_write() -> None:
    x = torch.ones(3, dtype=torch.int8)
    with pytest.raises(OverflowError):
        gpuconst.fill(x, 300)
    assert x._version == 0
    assert x.tolist() == [1, 1, 1]


LEAVES: dict[str, Callable[[], torch.Tensor]] = {
    "leaf": lambda: torch.ones(3, requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(torch.ones(3)),
    "view of a leaf": lambda: torch.ones(3, requires_grad=True)[:2],
    "result": lambda: torch.ones(3, requires_grad=True) * 1,
}


@pytest.mark.parametrize("kind", LEAVES)
def test_what_requires_grad_is_filled_only_outside_of_autograd(kind: str) -> None:
    x = LEAVES[kind]()
    with pytest.raises(RuntimeError, match=r"requires grad .*no_grad"):
        gpuconst.fill(x, 5.0)
    assert (x == 1).all()
    with torch.no_grad():
        assert gpuconst.fill(x, 5.0) is x
    assert (x == 5).all()
    assert x.requires_grad
    gpuconst.fill(x.detach(), 6.0)
    assert (x == 6).all()


def test_an_inference_tensor_is_filled_only_in_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.ones(3)
        gpuconst.fill(x, 5.0)
    assert (x == 5).all()
    with pytest.raises(RuntimeError, match="made in inference mode"):
        gpuconst.fill(x, 6.0)
    assert (x == 5).all()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use of it
def test_a_forward_mode_tangent_is_not_left_behind() -> None:
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.ones(3), torch.ones(3))  # type: ignore[no-untyped-call]
        with pytest.raises(RuntimeError, match="tangent"):
            gpuconst.fill(x, 5.0)
        gpuconst.fill(torch.ones(3), 5.0)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x.conj(), id="conjugate"),
        pytest.param(lambda x: x.conj().imag, id="negative"),
        pytest.param(lambda x: x.conj().imag[:1], id="contiguous negative"),
        pytest.param(lambda x: x.conj()[1:], id="slice of a conjugate"),
    ],
)
def test_lazily_changed_views_are_refused(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    base = torch.ones(3, dtype=torch.complex64)
    with pytest.raises(ValueError, match="lazy negative or conjugate view"):
        gpuconst.fill(view(base), 2.0)
    assert (base == 1).all()
    assert (view(base).fill_(2.0) == 2).all()  # the way out that the message names


def test_a_real_view_of_a_complex_tensor() -> None:
    x = torch.ones(3, dtype=torch.complex64)
    gpuconst.fill(x.imag, 2.0)
    assert (x == 1 + 2j).all()


def test_a_meta_tensor_is_left_alone() -> None:
    x = torch.zeros(3, device="meta")
    assert gpuconst.fill(x, 5.0) is x


def test_a_fake_tensor_is_left_alone() -> None:
    with FakeTensorMode():
        x = torch.zeros(3)
        assert gpuconst.fill(x, 5.0) is x


@pytest.mark.parametrize("context", [lambda: torch.device("meta"), FakeTensorMode], ids=["meta", "fake"])
@pytest.mark.parametrize(("value", "error"), [(300, OverflowError), (0.5, TypeError), ("1", TypeError)])
def test_a_value_is_checked_for_tensors_without_memory_too(
    context: Callable[[], AbstractContextManager[Any]], value: Any, error: type[Exception]
) -> None:
    with context():
        x = torch.zeros(3, dtype=torch.int8)
        with pytest.raises(error):
            gpuconst.fill(x, value)
        for prepare in (gpuconst.fill_many, gpuconst.plan_fill):
            with pytest.raises(error, match=r"^xs\[1\]: "):
                prepare([x, x], [1, value])


class KeepsDataElsewhere(torch.Tensor):
    """A subclass of the kind that wraps another tensor."""

    data_of_it: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "KeepsDataElsewhere":
        made: KeepsDataElsewhere = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.data_of_it = inner
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(func)


def nested(layout: torch.layout = torch.strided) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        return torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)], layout=layout)


def sparse(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compressed layouts are in beta
        return torch.eye(4).to_sparse(layout=layout, blocksize=(2, 2) if layout is torch.sparse_bsr else None)


WITHOUT_MEMORY: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "coordinates": (lambda: sparse(torch.sparse_coo), r"layout is torch\.sparse_coo, .*; fill its values\(\)$"),
    "coordinates, not coalesced": (
        lambda: torch.sparse_coo_tensor(torch.tensor([[0, 0]]), torch.ones(2), (3,), check_invariants=False),
        r"layout is torch\.sparse_coo, .*; make it x = x\.coalesce\(\), and fill its values\(\)$",
    ),
    "MKL-DNN": (lambda: torch.zeros(3).to_mkldnn(), r"layout is torch\._mkldnn, .*; use its to_dense\(\)$"),
    "compressed rows": (lambda: sparse(torch.sparse_csr), r"layout is torch\.sparse_csr"),
    "compressed blocks": (lambda: sparse(torch.sparse_bsr), r"layout is torch\.sparse_bsr"),
    "nested, with gaps": (lambda: nested().transpose(1, 2), "is nested and has gaps"),
    "jagged": (lambda: nested(torch.jagged), "jagged"),
    "wrapper": (lambda: KeepsDataElsewhere(torch.zeros(3)), "KeepsDataElsewhere keeps its data in other tensors"),
    "half complex": (lambda: torch.empty(3, dtype=torch.complex32), r"unknown dtype torch\.complex32"),
    "bits": (lambda: torch.empty(3, dtype=torch.bits8), r"unknown dtype torch\.bits8"),
}


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("kind", WITHOUT_MEMORY)
def test_what_is_no_dense_tensor_of_a_known_dtype_is_refused(kind: str) -> None:
    make, message = WITHOUT_MEMORY[kind]
    with pytest.raises(TypeError, match=message):
        gpuconst.fill(make(), 5)


@pytest.mark.parametrize("fill", [gpuconst.fill, lambda x, value: gpuconst.fill_many([x] * 200, value)])
def test_a_nested_tensor_without_gaps_is_one_stretch_of_memory(fill: Callable[..., Any]) -> None:
    x = nested()
    fill(x, 5)
    assert [part.tolist() for part in x.unbind()] == [[[5] * 3] * 2, [[5] * 3] * 4]
    assert x._version > 0


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize(
    "transform", [torch.vmap, torch.func.functionalize, lambda f: torch.func.grad(lambda x: f(x).sum())]
)
def test_a_tensor_being_transformed_is_refused(transform: Callable[..., Any], recording: bool) -> None:
    def fill(x: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(recording):
            return gpuconst.fill(x, 5.0)

    x = torch.ones(2, 3)
    with pytest.raises(TypeError, match=r"is being transformed .* torch.full_like"):
        transform(fill)(x)
    assert (x == 1).all()


def test_a_functional_tensor_is_refused() -> None:
    x = torch._to_functional_tensor(torch.ones(3))
    with pytest.raises(ValueError, match="its address is null"):
        gpuconst.fill(x, 5.0)


def test_a_parameter_without_a_shape_is_refused() -> None:
    weight = torch.nn.LazyLinear(3).weight
    with torch.no_grad(), pytest.raises(ValueError, match="no shape yet; call its module once"):
        gpuconst.fill(weight, 5.0)


@pytest.mark.parametrize("nbytes", [0, 4, 119])
def test_a_storage_that_was_made_too_small_is_refused(nbytes: int) -> None:
    x = torch.ones(30)
    x.untyped_storage().resize_(nbytes)
    with pytest.raises(ValueError, match=rf"storage was resized to {nbytes} bytes, it needs 120"):
        gpuconst.fill(x, 5.0)


@pytest.mark.parametrize("layout", [lambda x: x[10:], lambda x: x[10::2]], ids=["contiguous", "strided"])
def test_a_view_beyond_what_is_left_of_a_storage_is_refused(layout: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.ones(31)
    view = layout(x)
    x.untyped_storage().resize_(100)
    with pytest.raises(ValueError, match="storage was resized to 100 bytes, it needs 124"):
        gpuconst.fill(view, 5.0)


def test_a_view_into_what_is_left_of_a_storage_is_filled() -> None:
    x = torch.ones(30)
    view = x[2:5]
    x.untyped_storage().resize_(20)
    gpuconst.fill(view, 5.0)
    assert view.tolist() == [5, 5, 5]


def test_of_a_storage_that_was_freed_nothing_is_missing_from_an_empty_view() -> None:
    x = torch.ones(30)
    view = x[30:]
    x.untyped_storage().resize_(0)
    assert gpuconst.fill(view, 5.0) is view


def test_a_copy_on_write_tensor_gets_memory_of_its_own() -> None:
    x = torch.ones(3)
    copied = x._lazy_clone()
    gpuconst.fill(copied, 5.0)
    assert x.tolist() == [1, 1, 1]
    assert copied.tolist() == [5, 5, 5]


def test_a_subclass_with_a_torch_function_is_filled() -> None:
    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]

    x = torch.ones(3).as_subclass(Logged)
    assert (gpuconst.fill(x, 5.0) == 5).all()


@pytest.mark.parametrize("context", [nullcontext, lambda: torch.device("meta")])
def test_torchs_default_device_does_not_matter(context: Callable[[], AbstractContextManager[Any]]) -> None:
    x = torch.ones(3)
    with context():
        gpuconst.fill(x, 5.0)
    assert x.tolist() == [5, 5, 5]


def test_a_module_is_whole_afterwards() -> None:
    module = torch.nn.Linear(4, 3)
    with torch.no_grad():
        gpuconst.fill(module.weight, 0.5)
        gpuconst.fill(module.bias, 0.25)
    again = torch.nn.Linear(4, 3)
    again.load_state_dict(copy.deepcopy(module).state_dict())
    result = again(torch.ones(2, 4))
    assert (result == 2.25).all()
    result.sum().backward()
    assert again.weight.grad is not None


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Return a device mesh of this process alone."""
    distributed: Any = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_of_a_dtensor_the_local_part_is_filled(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    x = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
    assert gpuconst.fill(x, 5.0) is x
    assert (x.to_local() == 5).all()
    assert x._version == 1


def test_a_dtensor_parameter_follows_the_rules_of_leaves(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    x = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Replicate()]))
    with pytest.raises(RuntimeError, match="requires grad"):
        gpuconst.fill(x, 5.0)
    with torch.no_grad():
        gpuconst.fill(x, 5.0)
    assert (x.to_local() == 5).all()  # type: ignore[attr-defined]


def test_backward_raises_after_a_dtensor_was_filled(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    leaf = distribute_tensor(torch.ones(3), mesh, [Replicate()]).requires_grad_()
    saved = leaf * 1
    result = (saved * saved).sum()
    with torch.no_grad():
        gpuconst.fill(saved, 5.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()  # type: ignore[no-untyped-call]


def test_filling_a_dtensor_counts_as_writing_its_local_part(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate

    saved, result = saved_by_autograd()
    with torch.no_grad():
        gpuconst.fill(DTensor.from_local(saved, mesh, [Replicate()], run_check=False), 5.0)
    assert saved.tolist() == [5, 5, 5]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()  # type: ignore[no-untyped-call]


def test_the_local_part_of_a_dtensor_lives_as_long_as_the_plan(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate

    memory = np.zeros(30, np.float32)
    x, owner = DTensor.from_local(torch.from_numpy(memory), mesh, [Replicate()], run_check=False), weakref.ref(memory)
    plan = gpuconst.plan_fill([x], 5)
    x._local_tensor = torch.ones(30)
    assert plan.stale() == [0]
    del memory
    gc.collect()
    assert owner() is not None
    plan.fill()
    np.testing.assert_array_equal(owner(), 5)


def test_a_dtensor_without_memory_is_left_alone(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate

    with FakeTensorMode():
        x = DTensor.from_local(torch.zeros(3), mesh, [Replicate()])
        assert gpuconst.fill(x, 5.0) is x
    x = DTensor.from_local(torch.zeros(3, device="meta"), mesh, [Replicate()])
    assert gpuconst.fill(x, 5.0) is x
