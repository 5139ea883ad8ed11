"""What torch asks of those who write into its memory behind its back.

A write through a raw pointer skips autograd: without these rules a backward pass would silently use
the overwritten values, where `torch.Tensor.fill_` raises.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["check_writable", "has_memory", "is_tensor", "local_part", "mark_written"]


def is_tensor(x: Any) -> bool:
    """Whether an object is a torch tensor, asked without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def has_memory(tensor: Any) -> bool:
    """Whether there is anything to write: meta and fake tensors only have a shape."""
    tensor = local_part(tensor)
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return not (tensor.is_meta or (fake is not None and isinstance(tensor, fake.FakeTensor)))


def local_part(tensor: Any) -> Any:
    """Return the plain tensor that holds this process's part of a DTensor, other tensors as they are."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        return tensor._local_tensor  # to_local() would put it on autograd's tape
    return tensor


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
        If it is a lazily negated or conjugated view, in which the constant would read back changed.
    TypeError
        If it is no dense tensor, or of a subclass that keeps its data elsewhere.
    """
    import torch

    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "the tensor requires grad and autograd is recording: an in-place fill would give it a wrong gradient; "
            "fill under torch.no_grad(), or fill x.detach()"
        )
    tensor = local_part(tensor)
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError("the tensor was made in inference mode; fill it there, or fill a clone()")
    if tensor.layout is not torch.strided:
        raise TypeError(f"the tensor's layout is {tensor.layout}, expected torch.strided; fill its values()")
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(f"{type(tensor).__name__} keeps its data in other tensors; fill those")
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise TypeError("the tensor is being transformed (vmap, grad) and has no memory; use torch.full_like")
    if torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
        raise RuntimeError("the tensor has a forward-mode tangent, which a raw write would not zero; use x.fill_()")
    if tensor.is_neg() or tensor.is_conj():
        raise ValueError("the tensor is a lazy negative or conjugate view; fill x.resolve_neg().resolve_conj()")


def mark_written(tensors: Sequence[Any]) -> None:
    """Tell autograd that tensors were written in place, so that a backward that needs the old values raises.

    Parameters
    ----------
    tensors : sequence of torch.Tensor
        Inference tensors among them, which have no version, are passed over.
    """
    import torch

    written = [*tensors, *(part for tensor in tensors if (part := local_part(tensor)) is not tensor)]
    torch.autograd.graph.increment_version([tensor for tensor in written if not tensor.is_inference()])
