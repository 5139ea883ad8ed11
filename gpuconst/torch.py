"""torch modules from the meta device to filled memory, in one pass."""

from __future__ import annotations

import itertools
import operator
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from .batch import writable_view
from .dtypes import DType, resolve_dtype
from .errors import DeviceUnavailableError, about, first_line
from .filling import fill, fill_many
from .log import debug
from .rules import Rules
from .torch_rules import compiling, has_memory, is_dtensor, keeps_data_elsewhere, local_part
from .values import encode
from .views import shares_memory

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError("torch is not installed; pip install 'gpuconst[torch]'", name="torch") from error

from .torch_memory import HostTensor, host_tensors
from .torch_weights import Computed, computed_weights, refresh

__all__ = ["materialize_"]


M = TypeVar("M", bound=torch.nn.Module)


def materialize_(module: M, rules: Mapping[str, Any], *, device: Any = None) -> M:
    """Give every parameter and buffer of a module its value, and memory where it has none.

    Rules, values and whether each tensor can be written are checked before anything is written. Tensors
    on the meta device get memory of their own, which joins the module once all of it has its values. A
    tensor under several names stays one tensor; types, attributes, hooks, ``requires_grad`` and the
    persistence of buffers are kept. Tensors in real memory are filled in place. Constants take one launch
    per device.

    Parameters
    ----------
    module : torch.nn.Module
        On the meta device, in real memory, or partly in each. Of DTensors, including those of FSDP2, the
        local shards are filled.
    rules : mapping of str to scalar, bytes or callable
        Globs on the qualified names of parameters and buffers (``*`` matches dots too), each with a value
        as for `full`, or a function that initialises a tensor in place, such as those of `torch.nn.init`.
        The first rule that matches wins; a tied tensor matches under any of its names. Functions run under
        ``torch.no_grad()``, in the order of the module. A parametrized or weight-normed weight can be set
        by its own name, which sets its originals to match, or through the names of its originals.
    device : optional
        Where to allocate memory; by default, torch's default device, or the mesh's device for a DTensor.

    Returns
    -------
    torch.nn.Module
        `module` itself.

    Raises
    ------
    ValueError
        If no rule covers a tensor, a rule matches nothing or has no effect, a parametrization cannot give
        its weight the value, a tensor in real memory is not on `device`, a tensor without memory cannot
        be given any, or a function writes nothing to new memory.
    TypeError
        If a value is of the wrong kind for the dtype, a tensor cannot be written, a function returns a
        number or a new tensor, or a Keras layer is on the meta device: its variables would keep the tensors
        without memory.
    OverflowError
        If a value does not fit the dtype.
    DeviceUnavailableError
        If torch cannot use the device.
    OutOfMemoryError
        If the device has no memory left.

    Warns
    -----
    UserWarning
        If the module holds further tensors on the meta device, neither parameters nor buffers.

    Notes
    -----
    An exception raised by a function propagates. A module on the meta device is then unchanged; in real
    memory, whatever functions wrote before it stays written.

    Examples
    --------
    >>> import gpuconst, torch
    >>> with torch.device("meta"):
    ...     model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    >>> rules = {"*.bias": 0.0, "1.weight": 1.0, "*": torch.nn.init.xavier_normal_}
    >>> gpuconst.torch.materialize_(model, rules, device="cpu")[1].weight
    Parameter containing:
    tensor([1., 1., 1.], requires_grad=True)
    """
    if compiling():
        from .torch_eager import eagerly

        materialized: M = eagerly(materialize_, module, rules, device=device)
        return materialized
    start = time.perf_counter()
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module is {type(module).__name__}, expected a torch.nn.Module")
    ordered = Rules(rules)
    with torch.no_grad():
        _reshard(module)
        parts = list(module.named_modules(remove_duplicate=False))
        tensors, weights = _survey(parts)
        _choose(ordered, tensors, weights)
        _check_tensors(tensors)
        _check_keras(parts)
        devices = _Devices(device)
        for tensor in tensors:
            tensor.check(devices.given)
        _check_shared(tensors)
        ruled = [weight for weight in weights if weight.rule is not None]
        for weight in ruled:
            weight.check()
        originals = [weight.originals(devices) for weight in ruled if not callable(weight.value)]
        computed: dict[int, list[_Weight]] = {}  # by functions, whose turn comes with the first original
        for weight in ruled:
            if callable(weight.value):
                computed.setdefault(id(weight.tensors[0]), []).append(weight)

        unfilled = _make([tensor for tensor in tensors if not tensor.has_memory], devices)
        unfilled += [tensor for tensor in tensors if tensor.has_memory and tensor.element is not None]
        for tensor in tensors:
            if tensor.rule is not None and callable(tensor.value):
                _initialise(tensor.value, tensor.made, tensor.said, new=not tensor.has_memory)
            originals += [weight.originals(devices) for weight in computed.get(id(tensor), ())]
        if unfilled:
            fill_many([tensor.made for tensor in unfilled], [tensor.element for tensor in unfilled])
        for tensor, values in itertools.chain.from_iterable(originals):
            tensor.made.copy_(values)
        for tensor in tensors:
            tensor.install()
    for part in dict.fromkeys(part for _, part in parts):
        refresh(part)
        if isinstance(part, torch.nn.RNNBase):
            part.flatten_parameters()
    if not all(tensor.has_memory for tensor in tensors):
        _warn_of_others(parts)
    debug(
        "materialized %d tensors, %d of them with constants; took %.6f s",
        len(tensors),
        sum(tensor.element is not None for tensor in tensors),
        time.perf_counter() - start,
    )
    return module


class _Devices:
    """The devices on which tensors get memory, each looked up once."""

    def __init__(self, device: Any) -> None:
        self.given = None if device is None else _resolved(device)
        self._default: dict[str | None, torch.device] = {}

    def of(self, tensor: torch.Tensor) -> torch.device:
        if self.given is not None:
            return self.given
        mesh: str | None = tensor.device_mesh.device_type if is_dtensor(tensor) else None  # type: ignore[attr-defined]
        if mesh not in self._default:
            self._default[mesh] = _resolved(torch.get_default_device() if mesh is None else mesh)
        return self._default[mesh]


class _Named:
    """Something that rules apply to: its names, and the rule that it follows."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.rule: int | None = None
        self.value: Any = None
        self._glob = ""

    def follow(self, rules: Rules, rule: int) -> None:
        self.rule, self.value, self._glob = rule, rules.values[rule], rules.globs[rule]

    @property
    def said(self) -> str:
        """The name and the rule, for messages."""
        return f"{self.names[0]!r}, by the rule {self._glob!r}"


class _Tensor(_Named):
    """A parameter or buffer, once, however many modules and names it has."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.tensor = self.made = tensor
        self.slots: list[tuple[torch.nn.Module, str]] = []
        self.has_memory = has_memory(tensor)
        self.covered = False  # by the rule of a weight that is computed from it
        self.element: bytes | None = None  # of a constant

    def check(self, device: torch.device | None) -> None:
        """Raise what filling it would raise, and also if it is not on the given device."""
        if self.has_memory and device is not None and local_part(self.tensor).device != device:
            raise ValueError(
                f"{self.names[0]!r} is in real memory on {local_part(self.tensor).device}, and device={str(device)!r} "
                "was given; move it there with module.to(), or drop device to fill it in place"
            )
        if self.rule is not None and not callable(self.value):
            with _ErrorContext(self):
                self.element = encode(self.value, resolve_dtype(self.tensor.dtype))
                if self.has_memory:
                    writable_view(self.tensor)

    def take(self, new: torch.Tensor) -> None:
        """Adopt a tensor with memory, and make it what the old one was."""
        old = self.tensor
        if type(old) is torch.Tensor or is_dtensor(old):
            new.requires_grad_(old.requires_grad)
        else:
            new = torch.Tensor._make_subclass(type(old), new, old.requires_grad)
        vars(new).update(vars(old))
        new._backward_hooks = old._backward_hooks
        new._post_accumulate_grad_hooks = old._post_accumulate_grad_hooks
        self.made = new

    def install(self) -> None:
        if not self.has_memory:
            for owner, name in self.slots:
                setattr(owner, name, self.made)


class _Weight(_Named):
    """A weight that is computed from other tensors, and yet has a name of its own."""

    def __init__(self, computed: Computed, tensors: list[_Tensor], own: list[_Tensor]) -> None:
        super().__init__()
        self.computed = computed
        self.tensors = tensors
        self._own = own

    @property
    def _about(self) -> _ErrorContext:
        names = ", ".join(repr(tensor.names[0]) for tensor in (*self.tensors, *self._own))
        return _ErrorContext(self, f"; drop the rule, or put rules for {names} before it")

    def check(self) -> None:
        """Raise if the weight cannot be set through its originals, whatever its value."""
        with self._about:
            if any(is_dtensor(tensor.tensor) for tensor in self.tensors):
                raise ValueError("a sharded weight is not set through its originals")
            self.computed.outline()

    def originals(self, devices: _Devices) -> list[tuple[_Tensor, torch.Tensor]]:
        """Return the values for the originals that make the weight what its rule says."""
        first = self.tensors[0]
        where = first.tensor.device if first.has_memory else devices.of(first.tensor)
        weight = torch.empty_like(self.computed.outline(), device=where)
        if callable(self.value):
            _initialise(self.value, weight, self.said, new=True)
        with self._about:
            if not callable(self.value):
                fill(weight, self.value)
            return list(zip(self.tensors, self.computed.originals_of(weight), strict=True))


class _ErrorContext:
    """Adds the name and the rule to errors; a class, because a generator as context manager is slower."""

    def __init__(self, named: _Named, way_out: str = "") -> None:
        self._named, self._way_out = named, way_out

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, TypeError | ValueError | OverflowError | RuntimeError):
            said = about(error, self._named.said, self._way_out)
            if said is not error:
                raise said from error


def _survey(parts: Sequence[tuple[str, torch.nn.Module]]) -> tuple[list[_Tensor], list[_Weight]]:
    """Return the tensors of a module, and the weights that it computes, each once and with all its names."""
    tensors: dict[int, _Tensor] = {}
    weights: dict[tuple[int, str], _Weight] = {}
    for prefix, owner in parts:
        for name, tensor in itertools.chain(owner._parameters.items(), owner._buffers.items()):
            if tensor is not None:
                found = tensors.setdefault(id(tensor), _Tensor(tensor))
                found.names.append(f"{prefix}.{name}" if prefix else name)
                found.slots.append((owner, name))
    for prefix, owner in parts:
        for computed in computed_weights(owner):
            its, own = ([tensors[id(x)] for x in part] for part in (computed.originals(), computed.own))
            weight = weights.setdefault((id(owner), computed.name), _Weight(computed, its, own))
            weight.names.append(f"{prefix}.{computed.name}" if prefix else computed.name)
    return list(tensors.values()), list(weights.values())


def _choose(rules: Rules, tensors: Sequence[_Tensor], weights: Sequence[_Weight]) -> None:
    """Give each tensor and weight its rule; refuse tensors without a rule, and rules without a tensor."""
    chosen: dict[str, int] = {}
    for tensor in tensors:
        rule = rules.first(tensor.names)
        if rule is not None:
            tensor.follow(rules, rule)
    for weight in weights:
        rules_of_originals = [tensor.rule for tensor in weight.tensors if tensor.rule is not None]
        rule = rules.first(weight.names)
        if rule is not None and rule <= min(rules_of_originals, default=rule):
            weight.follow(rules, rule)
            for tensor in weight.tensors:
                tensor.rule, tensor.covered = None, True
                chosen.update(dict.fromkeys(tensor.names, rule))
        elif rules_of_originals:
            chosen.update(dict.fromkeys(weight.names, min(rules_of_originals)))
    for named in (*tensors, *weights):
        if named.rule is not None:
            chosen.update(dict.fromkeys(named.names, named.rule))
    rules.check_used([name for named in (*tensors, *weights) for name in named.names], chosen)
    left = [repr(tensor.names[0]) for tensor in tensors if tensor.rule is None and not tensor.covered]
    if left:
        raise ValueError(f"no rule covers {', '.join(left)}; a last rule '*' would cover whatever is left")


def _check_tensors(tensors: Sequence[_Tensor]) -> None:
    """Refuse tensors that cannot be given memory of their own."""
    taken: dict[int, list[tuple[int, int, str]]] = {}
    for found in tensors:
        if found.has_memory:
            continue
        name, tensor = found.names[0], found.tensor
        if torch.nn.parameter.is_lazy(tensor):
            raise ValueError(f"{name!r} has no shape yet; call the module once, then materialize it")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name!r} has the layout {tensor.layout}, expected torch.strided")
        if keeps_data_elsewhere(tensor) and not is_dtensor(tensor):
            raise TypeError(
                f"{name!r} is a {type(tensor).__name__}, which keeps its data in other tensors; "
                "make the module with plain tensors, under torch.device('meta')"
            )
        part = local_part(tensor)
        if not part.numel():
            continue
        start = part.storage_offset()
        stop = start + _reach(part)
        others = taken.setdefault(part.untyped_storage()._cdata, [])
        for first, last, other in others:
            if start < last and first < stop:
                raise ValueError(
                    f"{other!r} and {name!r} are different views of one storage, and would no longer be; register one "
                    "tensor, and take views of it where they are needed, or register a clone() of each"
                )
        others.append((start, stop, name))


def _check_shared(tensors: Sequence[_Tensor]) -> None:
    """Refuse different constants for the same memory, which has room for the last only."""
    spans = []
    for found in tensors:
        part = local_part(found.tensor)
        if found.has_memory and found.element is not None and part.numel():  # of a shard, this process may have nothing
            spans.append((part.data_ptr(), part.data_ptr() + _reach(part) * part.itemsize, found))
    reached: list[tuple[int, _Tensor]] = []
    for start, stop, found in sorted(spans, key=operator.itemgetter(0)):
        reached = [(end, other) for end, other in reached if end > start]
        for _, other in reached:
            if other.element != found.element and shares_memory(other.tensor, found.tensor):
                raise ValueError(f"{other.said}, and {found.said}, share memory; give both the same value")
        reached.append((stop, found))


def _reach(tensor: torch.Tensor) -> int:
    """Return how many elements of its storage a tensor of at least one element spans."""
    return 1 + sum([(n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)])


def _check_keras(parts: Sequence[tuple[str, torch.nn.Module]]) -> None:
    """Refuse Keras layers without memory: their variables hold the tensors too, out of torch's sight."""
    layer = getattr(sys.modules.get("keras"), "Layer", ())
    for name, part in parts:
        if isinstance(part, layer) and not all(map(has_memory, part.parameters())):
            raise TypeError(
                f"{repr(name) if name else 'the module'} is a Keras {type(part).__name__}, whose variables would stay "
                "on the meta device; make it on a real one, with gpuconst.Constant for its initializers"
            )


def _make(tensors: Sequence[_Tensor], devices: _Devices) -> list[_Tensor]:
    """Give tensors memory, filled already if on the CPU; return those still to be filled with constants."""
    unfilled: list[_Tensor] = []
    hosted: list[_Tensor] = []
    specs: list[HostTensor] = []
    for found in tensors:
        old, device = found.tensor, devices.of(found.tensor)
        row = _row(old) if device.type == "cpu" else None
        if row is None:
            found.take(torch.empty_like(old, device=device))
            unfilled += [found] if found.element is not None else []
        else:
            hosted.append(found)
            specs.append(HostTensor(tuple(old.shape), old.dtype, row, found.element))
    for found, new in zip(hosted, host_tensors(specs), strict=True):
        found.take(new)
    return unfilled


def _row(tensor: torch.Tensor) -> DType | None:
    """Return the dtype of a tensor if it is one plain stretch of memory; else None."""
    if is_dtensor(tensor) or not tensor.is_contiguous():
        return None
    try:
        return resolve_dtype(tensor.dtype)
    except TypeError:  # a function may know what to do with it
        return None


def _initialise(function: Callable[[torch.Tensor], Any], tensor: torch.Tensor, said: str, *, new: bool) -> None:
    """Have a function initialise a tensor, and raise if it cannot have done so; `new` memory must be written."""
    unwritten = _Unwritten(tensor) if new else None
    try:
        result = function(tensor)
    except Exception as error:
        error.add_note(f"raised for {said}")
        raise
    if isinstance(result, torch.Tensor) and result is not tensor:
        storage, other = local_part(tensor).untyped_storage(), local_part(result).untyped_storage()
        if storage._cdata != other._cdata:
            raise TypeError(f"{said}: the function returned a new tensor, expected one that writes: t.copy_(…)")
    if isinstance(result, int | float | complex):
        raise TypeError(f"{said}: the function returned {result!r}, expected one that writes: t.fill_(…)")
    if unwritten is not None and unwritten.is_still():
        raise ValueError(
            f"{said}: the function wrote nothing, and there is nothing to keep: the tensor had no memory; write to it, "
            "or make it on a real device"
        )


class _Unwritten:
    """New memory that a function is to initialise, and how to tell whether it has.

    Writes through ``t.data`` or ``t.numpy()`` leave the version as it is, so the memory begins with a mark.
    """

    _MARK = tuple(os.urandom(16))

    def __init__(self, tensor: torch.Tensor) -> None:
        self._part = local_part(tensor)
        storage = self._part.untyped_storage()
        length = min(len(self._MARK), storage.nbytes())
        self._first = torch.empty(0, dtype=torch.uint8, device=self._part.device).set_(storage, 0, (length,), (1,))
        self._first.copy_(torch.tensor(self._MARK[:length], dtype=torch.uint8, device=self._part.device))
        self._was = self._state()

    def _state(self) -> tuple[int, int]:
        return self._part.data_ptr(), 0 if self._part.is_inference() else self._part._version

    def is_still(self) -> bool:
        length = len(self._first)
        return length > 0 and self._state() == self._was and tuple(self._first.tolist()) == self._MARK[:length]


def _warn_of_others(parts: Sequence[tuple[str, torch.nn.Module]]) -> None:
    """Name the tensors without memory that a module holds beside its parameters and buffers."""
    left = []
    for prefix, part in parts:
        for name, value in vars(part).items():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
            registered = name in ("_parameters", "_buffers")
            if not registered and any(isinstance(x, torch.Tensor) and not has_memory(x) for x in held):
                left.append(repr(f"{prefix}.{name}" if prefix else name))
    if left:
        warnings.warn(
            f"{', '.join(left)} still have no memory: they are neither parameters nor buffers; make them anew",
            UserWarning,
            stacklevel=3,
        )


def _resolved(device: Any) -> torch.device:
    """Return a device with its index; refuse one without memory."""
    try:
        probe = torch.empty(0, device=torch.device(device))
    except (AssertionError, RuntimeError) as error:  # a build without CUDA; a device that does not exist
        reason = first_line(error).partition(". ")[0]
        raise DeviceUnavailableError(f"torch cannot use device {str(device)!r}: {reason}") from error
    if not has_memory(probe):
        raise ValueError(f"torch makes tensors without memory on {str(device)!r} here; pass device='cpu' or 'cuda'")
    return probe.device


def _reshard(module: torch.nn.Module) -> None:
    """Have FSDP2 register its shards: writes to gathered parameters would be lost."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for part in module.modules():
            if isinstance(part, fsdp.FSDPModule):
                part.reshard()
