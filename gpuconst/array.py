"""`Array`: memory filled with a constant, and every protocol that hands it on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np

from . import handover
from .backends import Place, select
from .dlpack import CPU, CUDA, retag
from .dtypes import DType
from .errors import CopyNeededError
from .streams import consumer_handle

__all__ = ["Array"]

_CPU_DEVICE = (CPU, 0)


class Array:
    """Memory on one device, filled with a constant.

    Made by `full` and the functions like it, not directly. An Array does no arithmetic: hand it to a
    framework that does, with `to_torch`, `to_jax`, `to_tensorflow`, `to_cupy` or `to_numpy`, or to
    anything that speaks DLPack. All of them share its memory, which lives as long as any of them; only
    `to_numpy` of CUDA memory makes a copy.
    """

    __slots__ = ("__weakref__", "_address", "_carrier", "_dtype", "_memory", "_place", "_shape", "_stream")

    def __init__(
        self, memory: Any, address: int, shape: tuple[int, ...], dtype: DType, place: Place, stream: int
    ) -> None:
        self._memory = memory
        self._carrier: Any = None
        self._address = address
        self._shape = shape
        self._dtype = dtype
        self._place = place
        self._stream = stream

    @property
    def _exporter(self) -> Any:
        """The carrier, an array of the backend's library; made on first use, since few are ever needed."""
        carrier = self._carrier
        if carrier is None:
            carrier = self._place.module.carve(self._memory, self._address, self._shape, self._dtype.carrier)
            self._carrier = carrier
        return carrier

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements along each dimension; the array is always C-ordered."""
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy dtype of the elements; an ml_dtypes type for bfloat16 and float8."""
        return self._dtype.numpy

    @property
    def device(self) -> str:
        """Where the memory is: ``"cpu"`` or ``"cuda:N"``."""
        return self._place.device

    @property
    def backend(self) -> str:
        """The library that filled it: ``"cupy"`` or ``"numba"``, or ``"numpy"`` on the CPU."""
        return self._place.backend

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes in one element."""
        return self._dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes in all elements."""
        return self.size * self._dtype.itemsize

    def data_ptr(self) -> int:
        """Return the address of the first element, a multiple of 256."""
        return self._address

    def __repr__(self) -> str:
        return (
            f"gpuconst.Array(shape={self.shape}, dtype={self._dtype.name}, device={self.device!r}, "
            f"backend={self.backend!r})"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} cannot be copied or pickled; pickle to_numpy(), or fill anew")

    def __bool__(self) -> NoReturn:
        raise TypeError("an Array has no truth value; ask for its size, or to_numpy()")

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a 0-d array has no len()")
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        """Return an iterator over the first dimension, as NumPy's; CUDA memory is refused."""
        return iter(np.asarray(self))

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return the DLPack device type and index of the memory."""
        return _CPU_DEVICE if self._place.device == "cpu" else (CUDA, self._place.index)

    def __dlpack__(
        self,
        *,
        stream: int | Any | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Export the memory as a DLPack capsule.

        Parameters
        ----------
        stream : int, optional
            The consumer's CUDA stream, numbered as in the array API standard: None or 1 for the legacy
            default stream, 2 for the per-thread one, -1 for no synchronisation, else a handle. The
            stream is made to wait for the fill. On the CPU, only None is allowed.
        max_version : tuple of int, optional
            The latest DLPack version that the consumer understands; if it is missing or below 1.0, the
            capsule is a legacy one.
        dl_device : tuple of int, optional
            Where the consumer wants the data: this array's own device, or ``(1, 0)``, host memory.
        copy : bool, optional
            True: always copy. False: never copy. None: copy only if `dl_device` needs it.

        Returns
        -------
        PyCapsule

        Raises
        ------
        BufferError
            If `dl_device` is another device, or needs a copy and `copy` is False.
        RuntimeError
            If `stream` is given for CPU memory.
        ValueError
            If `stream` is 0, which the standard leaves ambiguous, or is not a stream number.
        """
        if copy is None and dl_device is None and stream is None and self._place.device == "cpu":
            if self._dtype.native:
                return self._exporter.__dlpack__(max_version=max_version)
            return retag(self._exporter.__dlpack__(max_version=max_version), self._dtype, max_version)
        return self._export(stream, max_version, dl_device, copy)

    def _export(
        self, stream: Any, max_version: tuple[int, int] | None, dl_device: tuple[int, int] | None, copy: bool | None
    ) -> Any:
        here = self.__dlpack_device__()
        target = here if dl_device is None else tuple(dl_device)
        if target not in (here, _CPU_DEVICE):
            allowed = " or ".join(map(str, dict.fromkeys([here, _CPU_DEVICE])))
            raise BufferError(f"cannot export from DLPack device {here} to {target}; only to {allowed}")
        if target != here and copy is False:
            raise CopyNeededError(f"memory of {self.device} cannot be read as host memory, and copy=False was given")
        on_cpu = self._place.device == "cpu"
        if on_cpu and stream is not None:
            raise RuntimeError(f"stream={stream!r} was given, but the memory is on the CPU, which has none")
        consumer = None if on_cpu else consumer_handle(stream, self._place.index)
        source = self
        if copy or target != here:
            source = self._copied_to(self._place if target == here else select("cpu"))
        if consumer is not None and target == here:
            source._place.module.hand_over(source._memory, self._stream, consumer)
        # Streams are ordered above, alike for every backend: -1 tells the carrier's exporter not to.
        capsule = source._exporter.__dlpack__(stream=None if target == _CPU_DEVICE else -1, max_version=max_version)
        return retag(capsule, self._dtype, max_version, copied=source is not self)

    def _copied_to(self, place: Place) -> Array:
        stream = 0 if place.device == "cpu" else self._stream
        memory, address = place.module.allocate(self.nbytes, place.index, stream)
        here = self._place
        here.module.copy(address, self._address, self.nbytes, here.index, self._stream)
        if place.device == "cpu":
            here.module.synchronize(here.index, self._stream)
        return Array(memory, address, self.shape, self._dtype, place, stream)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """CUDA Array Interface, version 3; absent on the CPU and for dtypes that it cannot name."""
        if self._place.device == "cpu" or not self._dtype.native:
            raise AttributeError(f"{self!r} has no __cuda_array_interface__")
        return {
            "shape": self.shape,
            "typestr": self._dtype.numpy.str,
            "data": (self._address, False),
            "version": 3,
            "stream": self._stream or 1,  # 0 is ambiguous there, 1 is the legacy default stream
        }

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return a NumPy view of CPU memory; CUDA memory is refused, since only `to_numpy` copies it."""
        if self._place.device != "cpu":
            raise TypeError(f"{self!r} is not in host memory; copy it with to_numpy()")
        return np.array(self.to_numpy(), dtype=dtype, copy=copy)

    def to_numpy(self) -> np.ndarray:
        """Return a NumPy array: a view of CPU memory, or a copy of CUDA memory.

        bfloat16 and float8 elements have their ml_dtypes types.

        Returns
        -------
        numpy.ndarray
        """
        host = self if self._place.device == "cpu" else self._copied_to(select("cpu"))
        # Always a new view: changing its shape or making it read-only must not affect the carrier.
        view: np.ndarray = host._exporter.view(self._dtype.numpy)
        return view

    def to_torch(self) -> Any:
        """Return a torch tensor that shares the memory.

        Returns
        -------
        torch.Tensor

        Raises
        ------
        ImportError
            If torch is not installed.
        TypeError
            If torch lacks the dtype.
        """
        return handover.to_torch(self)

    def to_jax(self) -> Any:
        """Return a JAX array that shares the memory.

        Returns
        -------
        jax.Array

        Raises
        ------
        ImportError
            If JAX is not installed.
        TypeError
            If JAX would copy: 64-bit types while ``jax_enable_x64`` is off.
        BufferError
            If JAX copied nevertheless.
        """
        return handover.to_jax(self)

    def to_tensorflow(self) -> Any:
        """Return a TensorFlow tensor that shares the memory.

        Returns
        -------
        tensorflow.Tensor

        Raises
        ------
        ImportError
            If TensorFlow is not installed.
        TypeError
            If the dtype is a float8, which TensorFlow does not import through DLPack.
        BufferError
            If the memory is on a GPU and TensorFlow cannot use one.
        """
        if self._place.device != "cpu":  # TensorFlow reads on streams of its own
            self._place.module.synchronize(self._place.index, self._stream)
        return handover.to_tensorflow(self)

    def to_cupy(self) -> Any:
        """Return a CuPy array that shares the memory.

        Returns
        -------
        cupy.ndarray

        Raises
        ------
        ImportError
            If CuPy is not installed.
        BufferError
            If the memory is on the CPU: CuPy would copy it.
        TypeError
            If the dtype is a float8, which CuPy lacks.
        """
        return handover.to_cupy(self)
