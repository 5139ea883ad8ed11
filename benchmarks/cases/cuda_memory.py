"""GPU memory to fill in turns: more than the cache holds, with guards between the buffers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from benchmarks.cases.cuda_time import GIB, need, torch_cuda
from benchmarks.contest import VALUE

#: Bytes of all buffers together, unless that takes more than `_MOST` of them: the L2 of an H100 holds 50 MB.
ROTATED = GIB
_MOST = 4096
#: Bytes before and after each buffer that no fill may touch.
_GUARD = 256
_POISON = 0x5A
#: Elements that are compared at once.
_PART = 2**26

#: The dtype that stands for an itemsize, and the value that it is filled with.
DTYPES: dict[int, tuple[str, float]] = {
    1: ("int8", 11),
    2: ("float16", VALUE),
    4: ("float32", VALUE),
    8: ("float64", VALUE),
    16: ("complex128", VALUE),
}
#: Layouts of a buffer, and its length as a multiple of the bytes filled: aligned, one element past an aligned
#: address, rows with gaps of their own length, every other element.
LAYOUTS = {"aligned": 1, "+1": 1, "rows": 2, "every other": 2}


class Rotation:
    """Buffers of one size and layout.

    Parameters
    ----------
    nbytes : int
        Bytes that filling one writes.
    itemsize : int
        Itemsize of the elements, a key of `DTYPES`.
    layout : str
        A key of `LAYOUTS`.
    device : str
        Device of the memory.
    """

    def __init__(self, nbytes: int, itemsize: int, layout: str, device: str = "cuda") -> None:
        import torch

        name, self.value = DTYPES[itemsize]
        self._dtype, self._itemsize = getattr(torch, name), itemsize
        self._count, self._layout = nbytes // itemsize, layout
        self._first = _GUARD + (itemsize if layout == "+1" else 0)
        self._span = nbytes * LAYOUTS[layout]
        self._pitch = -(-(self._first + self._span + _GUARD) // _GUARD) * _GUARD
        buffers = max(1, min(_MOST, ROTATED // nbytes))
        if device == "cuda":
            need(self._pitch * buffers)
        self._memory = torch.empty(self._pitch * buffers, dtype=torch.uint8, device=device)
        self._blocks = [self._memory[index * self._pitch : (index + 1) * self._pitch] for index in range(buffers)]
        self.tensors = [self._tensor(block) for block in self._blocks]

    def _tensor(self, block: Any) -> Any:
        """Return the elements to fill, out of a buffer with its guards."""
        flat = block[self._first : self._first + self._span].view(self._dtype)
        if self._layout == "every other":
            return flat[::2]
        if self._layout == "rows":
            rows = 2 ** (int(math.log2(self._count)) // 2)  # about as many rows as elements in a row
            return flat.view(rows, -1)[:, : self._count // rows]
        return flat

    def check(self, filler: Callable[[Any, float], Callable[[], Any]]) -> None:
        """Fill poisoned buffers, and raise unless every byte is what it should be.

        Parameters
        ----------
        filler : callable
            Takes a tensor and a value, and returns the function that fills it.

        Raises
        ------
        AssertionError
            If an element is not filled, or a byte outside of it is touched.
        """
        import torch

        # On the device: copied from the host, it would first be expanded there to the size of the tensor.
        device = self._memory.device
        poison = torch.full((self._itemsize,), _POISON, dtype=torch.uint8, device=device).view(self._dtype)[0]
        for block in self._blocks[:: max(1, len(self._blocks) - 1)]:
            block.fill_(_POISON)
            tensor = self._tensor(block)
            filler(tensor, self.value)()
            assert not _differs(tensor, torch.tensor(self.value, dtype=self._dtype)), "an element was missed"
            tensor.copy_(poison)  # so that all of the block is poison, unless the fill wrote beside the tensor
            assert not _differs(block, torch.tensor(_POISON, dtype=torch.uint8)), "a byte beside them was written"


def _differs(tensor: Any, value: Any) -> bool:
    """Whether any element differs from a value, part by part: there may be no room for a mask of the tensor's size."""
    value = value.to(tensor.device)
    rows = max(1, _PART // math.prod(tensor.shape[1:]))
    return any(bool((part != value).any()) for part in tensor.split(rows))


_held: dict[tuple[int, int, str], Rotation] = {}


def rotation(nbytes: int, itemsize: int, layout: str) -> Rotation:
    """Return the buffers that all contenders of a row fill in this process; frees those of the row before."""
    torch = torch_cuda()
    key = nbytes, itemsize, layout
    if key not in _held:
        _held.clear()
        torch.cuda.empty_cache()
        _held[key] = Rotation(nbytes, itemsize, layout)
    return _held[key]
