"""Runs compiled PTX on NumPy: every lane of many launches at once, over memory that checks each access.

For kernels without barriers and shared memory, whose lanes never wait for one another. Lanes are the
elements of NumPy arrays; where they diverge, those furthest behind run until they have caught up. An
instruction that is not known here raises, and so do floating point types: an address that a compiler
has sent through one has lost its low bits.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Lanes = slice | Array  # slice(None) is all of them: their registers are used without a copy

_TYPES = {f"{kind}{8 * n}": np.dtype(f"{'i' if kind == 's' else 'u'}{n}") for kind in "bsu" for n in (1, 2, 4, 8)}
_TYPES["pred"] = np.dtype(bool)
_LANES_AT_ONCE = 1 << 18  # a register of so many lanes stays in the cache


class PTXError(Exception):
    """PTX that cannot be run, or that does what would fault on a GPU."""


class Memory:
    """Segments of a 64-bit address space.

    Attributes
    ----------
    data : numpy.ndarray
        The bytes of all segments; an address and its place in here agree modulo 16.
    stores : Counter
        How many stores of each width, in bytes, were made.
    """

    def __init__(self, data: Array, bases: Sequence[int], starts: Sequence[int], sizes: Sequence[int]) -> None:
        order = np.argsort(np.array(bases, "u8"))
        self.data = data
        self.stores: Counter[int] = Counter()
        self._bases, self._starts, self._sizes = (np.array(x, "u8")[order] for x in (bases, starts, sizes))

    @classmethod
    def of(cls, segments: Mapping[int, Array]) -> Memory:
        """Return memory with a copy of each array at its address."""
        starts = []
        end = 0
        for base, content in segments.items():
            starts.append(end + (base - end) % 16)
            end = starts[-1] + content.nbytes
        memory = cls(np.zeros(end + -end % 16, "u1"), [*segments], starts, [x.nbytes for x in segments.values()])
        for base, content in segments.items():
            memory[base][:] = content.reshape(-1).view("u1")
        return memory

    def __getitem__(self, base: int) -> Array:
        """Return the bytes of the segment at an address."""
        index = np.searchsorted(self._bases, np.uint64(base))
        start = int(self._starts[index])
        return self.data[start : start + int(self._sizes[index])]

    def locate(self, addresses: Array, width: int) -> Array:
        """Return the places in `data` of accesses of `width` bytes."""
        segment = np.searchsorted(self._bases, addresses, side="right") - 1
        offsets = addresses - self._bases[segment]
        room = self._sizes[segment]
        bad = (segment < 0) | (offsets >= room) | (room - offsets < width)
        if bad.any():
            raise PTXError(f"{width} bytes at {addresses[bad][0]:#x} are out of bounds")
        if (misaligned := addresses % width != 0).any():
            raise PTXError(f"{width} bytes at {addresses[misaligned][0]:#x} are misaligned")
        places: Array = self._starts[segment] + offsets
        return places


class Launch(NamedTuple):
    """One launch.

    Attributes
    ----------
    grid, block : int
        CTAs, and threads in each.
    arguments : bytes
        The kernel's parameters as `Kernel.pack` lays them out.
    ctas : sequence of int, optional
        Those to run; all by default.
    """

    grid: int
    block: int
    arguments: bytes
    ctas: Sequence[int] | None = None


class Instruction(NamedTuple):
    """One instruction; `guard` is a predicate register, maybe after a ``!``, or empty."""

    guard: str
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{'@' * bool(self.guard)}{self.guard} {'.'.join([self.name, *self.modifiers])} {self.operands}"


class Kernel:
    """The entry function of a PTX module.

    Attributes
    ----------
    name : str
        As in the module.
    parameters : dict of str to (int, int)
        Offset and size of each parameter, in bytes.
    blocks : list of list of Instruction
        Basic blocks: only the last instruction of one can branch.
    labels : dict of str to int
        Index of the block at each label.
    types : dict of str to numpy.dtype
        Unsigned type of each register, by its name without the number.
    """

    def __init__(self, ptx: str) -> None:
        ptx = re.sub(r"//.*", "", ptx)
        found = re.findall(r"\.entry\s+([\w$]+)\s*\((.*?)\)(?:\s*\.[^{]*)?\s*\{\n(.*?)\n\}", ptx, re.DOTALL)
        if len(found) != 1:
            raise PTXError(f"expected one kernel, found {[name for name, _, _ in found]}")
        self.name, parameters, body = found[0]
        self.parameters: dict[str, tuple[int, int]] = {}
        self._size = 0
        for line in filter(None, map(str.strip, parameters.split(","))):
            declared = re.fullmatch(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+.*?([\w$]+)(?:\[(\d+)\])?", line)
            if declared is None:
                raise PTXError(f"unknown parameter: {line}")
            align, kind, name, length = declared.groups()
            itemsize = _TYPES[kind].itemsize
            self._size += -self._size % int(align or itemsize)
            self.parameters[name] = (self._size, itemsize * int(length or 1))
            self._size += itemsize * int(length or 1)
        self.types: dict[str, np.dtype[Any]] = {}
        self.labels: dict[str, int] = {}
        self.blocks: list[list[Instruction]] = [[]]
        for statement in re.findall(r"[^;\n]*?:(?=\s)|[^;\n]+", body):
            self._parse(statement.strip())

    def _parse(self, statement: str) -> None:
        if label := re.fullmatch(r"([\w$]+):", statement):
            self.blocks.append([])
            self.labels[label[1]] = len(self.blocks) - 1
        elif declared := re.fullmatch(r"\.reg\s+\.(\w+)\s+(%\w+)(?:<\d+>)?", statement):
            if declared[1] in _TYPES:
                self.types[declared[2]] = _TYPES[f"u{declared[1][1:]}" if declared[1] != "pred" else "pred"]
        elif statement not in ("", "{", "}") and not statement.startswith(".pragma"):
            found = re.fullmatch(r"(?:@(!?%\w+)\s+)?([a-z]\w*)((?:\.\w+)*)(?:\s+(.*))?", statement)
            if found is None:
                raise PTXError(f"unknown statement: {statement}")
            guard, name, modifiers, operands = found.groups("")
            split = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+", operands)
            self.blocks[-1].append(Instruction(guard, name, tuple(modifiers.split(".")[1:]), tuple(split)))
            if name in ("bra", "ret"):
                self.blocks.append([])

    def pack(self, *arguments: int | np.generic | bytes) -> bytes:
        """Return the parameter bytes of a launch; there must be an argument for each parameter."""
        packed = bytearray(self._size)
        for (offset, size), value in zip(self.parameters.values(), arguments, strict=True):
            raw = value if isinstance(value, bytes) else int(value).to_bytes(size, "little", signed=int(value) < 0)
            if len(raw) != size:
                raise PTXError(f"a parameter of {size} bytes was given {len(raw)}")
            packed[offset : offset + size] = raw
        return bytes(packed)

    def run(self, memory: Memory, launches: Sequence[Launch]) -> None:
        """Run launches that are independent of one another.

        Raises
        ------
        PTXError
            At an unknown instruction, or an access that is misaligned or out of bounds.
        """
        batch: list[Launch] = []
        lanes = 0
        for launch in launches:
            ctas = range(launch.grid) if launch.ctas is None else launch.ctas
            step = max(1, _LANES_AT_ONCE // launch.block)
            for first in range(0, len(ctas), step):
                batch.append(launch._replace(ctas=ctas[first : first + step]))
                lanes += launch.block * len(ctas[first : first + step])
                if lanes >= _LANES_AT_ONCE:
                    _Run(self, memory, batch).finish()
                    batch, lanes = [], 0
        if batch:
            _Run(self, memory, batch).finish()


class _Run:
    """The lanes of some launches, from the entry to the last return."""

    def __init__(self, kernel: Kernel, memory: Memory, launches: Sequence[Launch]) -> None:
        self._kernel = kernel
        self._memory = memory
        ctas = [launch.ctas or () for launch in launches]
        lanes = [launch.block * len(chosen) for launch, chosen in zip(launches, ctas, strict=True)]
        self._launch = np.repeat(np.arange(len(launches)), lanes)
        self._arguments = np.frombuffer(b"".join(x.arguments for x in launches), "u1").reshape(len(launches), -1)
        self._special = {
            "%tid.x": np.concatenate(
                [np.tile(np.arange(x.block, dtype="u4"), len(c)) for x, c in zip(launches, ctas, strict=True)]
            ),
            "%ctaid.x": np.concatenate(
                [np.repeat(np.array(c, "u4"), x.block) for x, c in zip(launches, ctas, strict=True)]
            ),
            "%ntid.x": np.array([x.block for x in launches], "u4")[self._launch],
            "%nctaid.x": np.array([x.grid for x in launches], "u4")[self._launch],
        }
        self._registers: dict[str, Array] = {}
        self._block = np.zeros(len(self._launch), "i4")

    def finish(self) -> None:
        """Run until every lane has returned."""
        blocks = self._kernel.blocks
        while (current := int(self._block.min())) < len(blocks):
            active = self._block == current
            lanes: Lanes = slice(None) if active.all() else np.flatnonzero(active)
            self._block[lanes] = current + 1
            for instruction in blocks[current]:
                guarded = self._guard(instruction.guard, lanes) if instruction.guard else lanes
                try:
                    self._execute(instruction, guarded)
                except (PTXError, KeyError, ValueError) as error:
                    raise PTXError(f"{self._kernel.name}: {instruction}: {error}") from error

    def _guard(self, guard: str, lanes: Lanes) -> Lanes:
        holds = self._read(guard, _TYPES["pred"], lanes)
        if holds.all():
            return lanes
        return np.flatnonzero(holds) if isinstance(lanes, slice) else lanes[holds]

    def _execute(self, instruction: Instruction, lanes: Lanes) -> None:
        _, name, modifiers, operands = instruction
        if name == "ret":
            self._block[lanes] = len(self._kernel.blocks)
        elif name == "bra":
            self._block[lanes] = self._kernel.labels[operands[0]]
        elif name == "ld" and modifiers[0] == "param":
            self._write(operands[0], self._parameter(operands[1], _TYPES[modifiers[-1]], lanes), lanes)
        elif name in ("ld", "st") and not {"local", "shared", "const"} & {*modifiers}:
            self._access(name, modifiers, operands, lanes)
        elif name == "setp":
            self._compare(modifiers, operands, lanes)
        elif name == "cvt":
            source = self._read(operands[1], _TYPES[modifiers[1]], lanes)
            self._write(operands[0], source.astype(_TYPES[modifiers[0]]), lanes)
        else:
            self._write(operands[0], self._compute(name, modifiers, operands[1:], lanes), lanes)

    def _compute(self, name: str, modifiers: tuple[str, ...], sources: tuple[str, ...], lanes: Lanes) -> Array:
        dtype = _TYPES[modifiers[-1]]
        kinds = [dtype] * len(sources)
        if name in _LAST_OPERANDS:
            own = _LAST_OPERANDS[name]
            kinds[-len(own) :] = own
        elif name == "mad" and modifiers[0] == "wide":
            kinds[-1] = _double(dtype)
        values = [self._read(source, kind, lanes) for source, kind in zip(sources, kinds, strict=True)]
        if name == "mad":
            return _OPERATIONS[f"mul.{modifiers[0]}"](*values[:2]) + values[2]
        variant = f"{name}.{modifiers[0]}"
        return _OPERATIONS[variant if variant in _OPERATIONS else name](*values)

    def _compare(self, modifiers: tuple[str, ...], operands: tuple[str, ...], lanes: Lanes) -> None:
        left, right = (self._read(x, _TYPES[modifiers[-1]], lanes) for x in operands[1:3])
        result = _COMPARISONS[modifiers[0]](left, right)
        if len(operands) == 4:
            result = _OPERATIONS[modifiers[1]](result, self._read(operands[3], _TYPES["pred"], lanes))
        self._write(operands[0], result, lanes)

    def _parameter(self, operand: str, dtype: np.dtype[Any], lanes: Lanes) -> Array:
        name, _, offset = operand[1:-1].partition("+")
        start = self._kernel.parameters[name][0] + int(offset or 0)
        column = np.ascontiguousarray(self._arguments[:, start : start + dtype.itemsize]).view(dtype)[:, 0]
        return column[self._launch[lanes]]

    def _access(self, name: str, modifiers: tuple[str, ...], operands: tuple[str, ...], lanes: Lanes) -> None:
        dtype = _TYPES[modifiers[-1]]
        address, registers = operands if name == "st" else operands[::-1]
        base, _, offset = address[1:-1].partition("+")
        # A scalar address would not be indexed by lane, nor wrap.
        addresses = np.atleast_1d(self._read(base, _TYPES["u64"], lanes)) + np.array([int(offset or 0)]).astype("u8")
        group = _group(registers)
        places = self._memory.locate(addresses, dtype.itemsize * len(group)) // np.uint64(dtype.itemsize)
        view = self._memory.data.view(dtype)
        for k, register in enumerate(group):
            if name == "ld":
                self._write(register, view[places + np.uint64(k)], lanes)
            else:
                view[places + np.uint64(k)] = self._read(register, dtype, lanes)
        if name == "st":
            self._memory.stores[dtype.itemsize * len(group)] += len(addresses)

    def _read(self, operand: str, dtype: np.dtype[Any], lanes: Lanes) -> Array:
        if operand.startswith("!"):
            return ~self._read(operand[1:], dtype, lanes)
        if operand.startswith("{"):
            parts = [self._read(register, dtype, lanes) for register in _group(operand)]
            whole: Array = sum(part << shift for part, shift in zip(parts, _shifts(dtype, parts), strict=True))
            return whole
        if not operand.startswith("%"):
            bits = int(operand, 0) & ((1 << 8 * dtype.itemsize) - 1)
            return np.array([bits], f"u{dtype.itemsize}").view(dtype)
        register = self._special[operand] if operand in self._special else self._registers[operand]
        values = register[lanes]
        return values.astype(f"u{dtype.itemsize}", copy=False).view(dtype)

    def _write(self, register: str, values: Array, lanes: Lanes) -> None:
        if register.startswith("{"):
            group = _group(register)
            for part, shift in zip(group, _shifts(values.dtype, group), strict=True):
                self._write(part, values >> shift, lanes)
            return
        if register not in self._registers:
            self._registers[register] = np.zeros(len(self._block), self._kernel.types[register.rstrip("0123456789")])
        self._registers[register][lanes] = values  # wraps, and extends the sign of a signed value


def _group(registers: str) -> list[str]:
    return registers.strip("{}").replace(" ", "").split(",")


def _shifts(dtype: np.dtype[Any], parts: Sequence[Any]) -> Array:
    """Return by how many bits each of equal parts lies above the first."""
    return np.arange(0, 8 * dtype.itemsize, 8 * dtype.itemsize // len(parts)).astype(dtype)


def _double(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")


def _high(a: Array, b: Array) -> Array:
    exact: Array = a.astype(object) * b.astype(object) >> 8 * a.dtype.itemsize
    return exact.astype(a.dtype)


def _divided(a: Array, b: Array) -> Array:
    if a.dtype.kind == "u":
        return np.floor_divide(a, b)
    return np.where((a < 0) == (b < 0), 1, -1).astype(a.dtype) * (abs(a) // abs(b))


def _shift(shift: Callable[..., Array]) -> Callable[..., Array]:
    return lambda a, amount: shift(a, np.minimum(amount, 64).astype(a.dtype))


def _insert(field: Array, into: Array, position: Array, length: Array) -> Array:
    ones = np.left_shift(np.ones(1, field.dtype), length.astype(field.dtype)) - np.ones(1, field.dtype)
    place = position.astype(field.dtype)
    result: Array = into & ~(ones << place) | (field & ones) << place
    return result


def _funnel(low: Array, high: Array, amount: Array) -> Array:
    both: Array = (high.astype("u8") << np.uint64(32) | low) >> amount.astype("u8")
    return both.astype("u4")


#: The types of the last operands, where they are not the instruction's.
_LAST_OPERANDS = {
    "selp": [_TYPES["pred"]],
    "shl": [_TYPES["u32"]],
    "shr": [_TYPES["u32"]],
    "bfi": [_TYPES["u32"], _TYPES["u32"]],
}
_COMPARISONS: dict[str, Callable[..., Array]] = {
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge},
}
_OPERATIONS: dict[str, Callable[..., Array]] = {
    "mov": lambda a: a,
    "cvta": lambda a: a,
    "add": operator.add,
    "sub": operator.sub,
    "mul.lo": operator.mul,
    "mul.hi": _high,
    "mul.wide": lambda a, b: a.astype(_double(a.dtype)) * b,
    "div": _divided,
    "rem": lambda a, b: a - b * _divided(a, b),
    "neg": operator.neg,
    "not": operator.invert,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "min": np.minimum,
    "max": np.maximum,
    "bfi": _insert,
    "shf.l": lambda low, high, amount: _funnel(low, high, 32 - amount % 32),
    "shf.r": lambda low, high, amount: _funnel(low, high, amount % 32),
    "shl": _shift(np.left_shift),
    "shr": _shift(np.right_shift),
    "selp": lambda a, b, p: np.choose(p, (b, a)),
}
