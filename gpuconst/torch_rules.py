"""The rules for writing into torch's memory behind its back.

A write through a raw pointer bypasses autograd: without these rules, a backward pass would silently use
the overwritten values, where after `torch.Tensor.fill_` it raises.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = [
    "are_plain",
    "check_eager",
    "check_writable",
    "compiling",
    "has_memory",
    "is_dtensor",
    "is_tensor",
    "keeps_data_elsewhere",
    "local_part",
    "mark_stretch_written",
    "mark_written",
    "restricted",
    "storages",
    "stretch",
    "tensor_positions",
]


def is_tensor(x: Any) -> bool:
    """Whether an object is a torch tensor; does not import torch."""
    return isinstance(x, getattr(sys.modules.get("torch"), "Tensor", ()))  # missing while another thread imports torch


def compiling() -> bool:
    """Whether torch.compile is tracing the caller's code instead of running it."""
    compiler = getattr(sys.modules.get("torch"), "compiler", None)
    return compiler is not None and compiler.is_dynamo_compiling()


def check_eager() -> None:
    """Raise if torch is recording operations into a graph, from which a raw write would be missing.

    Raises
    ------
    RuntimeError
        Under `torch.export`, `make_fx`, `torch.jit.trace`, and anything built on them.
    """
    tracing = sys.modules["torch"].jit.is_tracing()
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    if tracing or (proxies is not None and proxies.get_proxy_mode() is not None):
        raise RuntimeError("torch is tracing into a graph, which would lack the fill; use x.fill_() or torch.full_like")


def tensor_positions(arrays: Sequence[Any]) -> Sequence[int]:
    """Return the indices of the torch tensors among some arrays."""
    torch = sys.modules.get("torch")
    if torch is None:
        return []
    every = set(map(type, arrays))
    kinds = {kind for kind in every if issubclass(kind, getattr(torch, "Tensor", ()))}
    if kinds == every:
        return range(len(arrays))
    return [index for index, kind in enumerate(map(type, arrays)) if kind in kinds]


def has_memory(tensor: Any) -> bool:
    """Whether a tensor has memory to write to: meta and fake tensors only have a shape."""
    if type(tensor) in _plain_types():
        return not tensor.is_meta
    tensor = local_part(tensor)
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return not (tensor.is_meta or (fake is not None and isinstance(tensor, fake.FakeTensor)))


@functools.cache
def _plain_types() -> frozenset[type]:
    """Return the types of tensors that hold their memory themselves; called only if there are tensors."""
    torch = sys.modules["torch"]  # already imported, since there are tensors

    return frozenset({torch.Tensor, torch.nn.Parameter})


def are_plain(arrays: Sequence[Any]) -> bool:
    """Whether all are tensors that hold their memory themselves; called only if torch is imported."""
    return _plain_types().issuperset(map(type, arrays))


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor; does not import the module that makes them."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def local_part(tensor: Any) -> Any:
    """Return the plain tensor that holds this process's part of a DTensor; return other tensors as they are."""
    if type(tensor) in _plain_types() or not is_dtensor(tensor):
        return tensor
    return tensor._local_tensor  # to_local() would put it on autograd's tape


def keeps_data_elsewhere(tensor: Any) -> bool:
    """Whether a tensor is of a subclass that keeps its data in other tensors, as a DTensor does."""
    if type(tensor) in _plain_types():
        return False
    return type(tensor).__torch_dispatch__ is not sys.modules["torch"].Tensor.__torch_dispatch__


def check_writable(tensor: Any) -> None:
    """Raise as `torch.Tensor.fill_` would, or where a raw write would mean something else.

    Parameters
    ----------
    tensor : torch.Tensor
        Not a meta or fake one.

    Raises
    ------
    RuntimeError
        If autograd is recording and the tensor requires grad, it has a forward-mode tangent, or it is
        an inference tensor outside of inference mode.
    ValueError
        If it has no shape yet, or is a lazily negated or conjugated view, in which the constant would read
        back changed.
    TypeError
        If it is not a dense tensor, or is being transformed by torch.func.
    """
    torch = sys.modules["torch"]

    if torch.nn.parameter.is_lazy(tensor):
        raise ValueError("the parameter has no shape yet; call its module once, then fill it")
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise TypeError("the tensor is being transformed (vmap, grad) and has no memory; use torch.full_like")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "the tensor requires grad and autograd is recording: an in-place fill would give it a wrong gradient; "
            "fill under torch.no_grad(), or fill x.detach()"
        )
    tensor = local_part(tensor)
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError("the tensor was made in inference mode; fill it there, or fill a clone()")
    if tensor.layout is not torch.strided:
        way_out = "use its to_dense()" if tensor.is_mkldnn else "fill its values()"
        if tensor.layout is torch.sparse_coo and not tensor.is_coalesced():
            way_out = "make it x = x.coalesce(), and fill its values()"
        raise TypeError(f"the tensor's layout is {tensor.layout}, expected torch.strided; {way_out}")
    in_forward_mode = torch.autograd.forward_ad._current_level >= 0
    if in_forward_mode and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
        raise RuntimeError("the tensor has a forward-mode tangent, which a raw write would not zero; use x.fill_()")
    if tensor.is_neg() or tensor.is_conj():
        raise ValueError("the tensor is a lazy negative or conjugate view; use x.fill_(), or fill what it is a view of")


def stretch(tensor: Any) -> tuple[int, int, Any, int] | None:
    """Return the address, bytes, dtype and device of a tensor that is one stretch of memory and may be written.

    The device is -1 for the CPU, else the index of the GPU.

    Return None for any other tensor, which `check_writable` and a look at its strides then deal with. Called
    before them, because it takes a third of their time.

    Parameters
    ----------
    tensor : torch.Tensor
        Of any kind.
    """
    torch = sys.modules["torch"]

    if type(tensor) not in _plain_types() or torch.autograd.forward_ad._current_level >= 0:
        return None
    if not (tensor.is_cpu or tensor.is_cuda):
        return None
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # a sparse or transformed tensor has no memory of its own
        return None
    if not address or not tensor.is_contiguous() or tensor.is_neg() or tensor.is_conj():
        return None
    if tensor.requires_grad and torch.is_grad_enabled():
        return None
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return None
    nbytes, dtype = tensor.nbytes, tensor.dtype
    if tensor.storage_offset() * dtype.itemsize + nbytes > tensor.untyped_storage().nbytes():
        return None
    return address, nbytes, dtype, tensor.get_device()


def mark_stretch_written(tensor: Any) -> None:
    """Do what `mark_written` does, for a tensor that `stretch` accepts."""
    sys.modules["torch"].autograd.graph.increment_version(tensor)


class Restricted(NamedTuple):
    """The tensors among some arrays that `check_writable` refuses at times.

    Attributes
    ----------
    arrays : sequence of array
        All of them.
    grad : list of int
        Indices of those that require grad, and so are refused while autograd records.
    inference : list of int
        Index of an inference tensor, which are all refused outside of inference mode; empty if there is none.
    """

    arrays: Sequence[Any]
    grad: list[int]
    inference: list[int]

    def now(self) -> list[int]:
        """Return the index of one tensor of each kind that may be refused now.

        It stands for the others: checking each would cost more than filling it. A tensor can cease to require grad.
        """
        if not self.grad or not sys.modules["torch"].is_grad_enabled():
            return self.inference
        grad = (position for position in self.grad if self.arrays[position].requires_grad)
        return [*itertools.islice(grad, 1), *self.inference]


def restricted(arrays: Sequence[Any]) -> Restricted:
    """Return the tensors that must not be written in every mode of torch."""
    tensors = [(position, arrays[position]) for position in tensor_positions(arrays)]
    grad = [position for position, x in tensors if x.requires_grad and has_memory(x)]
    inference = (position for position, x in tensors if x.is_inference() and has_memory(x))
    return Restricted(arrays, grad, list(itertools.islice(inference, 1)))


def storages(tensors: Sequence[Any]) -> list[Any]:
    """Return the storage of each tensor, which keeps the memory alive if the tensor is given other memory.

    Parameters
    ----------
    tensors : sequence of torch.Tensor
        Tensors that `check_writable` accepts, or that have no memory.
    """
    if not tensors:
        return []
    parts = tensors if are_plain(tensors) else map(local_part, tensors)
    return list(map(sys.modules["torch"].Tensor.untyped_storage, parts))


def mark_written(tensors: Sequence[Any]) -> None:
    """Tell autograd that tensors were written in place, so that a backward pass that needs the old values raises.

    Parameters
    ----------
    tensors : sequence of torch.Tensor
        Inference tensors among them, which have no version, are skipped.
    """
    if not are_plain(tensors):
        tensors = [*tensors, *map(local_part, tensors)]
    sys.modules["torch"].autograd.graph.increment_version(tensors)
