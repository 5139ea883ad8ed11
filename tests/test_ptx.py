"""Every kernel of both backends, run from its compiled PTX over guarded memory."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

import numpy as np
import ptx
import pytest
from installed import require
from kernel_checks import (
    GUARD,
    ITEMSIZES,
    Kernels,
    check,
    check_ctas,
    compiled,
    contiguous,
    element,
    every_length,
    side_by_side,
    small_strided,
    split,
)

from gpuconst.kernels import runs
from gpuconst.kernels.runs import BLOCK, CHUNK, THREADS, TILE, Region

TIB = 1 << 40
BASE = 1 << 42


@pytest.fixture(params=["cupy", "numba"], scope="module")
def backend(request: pytest.FixtureRequest) -> str:
    require({"cupy": "cupy", "numba": "numba_cuda"}[request.param])
    return str(request.param)


@pytest.fixture(params=["sm_75", "sm_90", "sm_120"], scope="module")
def kernels(backend: str, request: pytest.FixtureRequest) -> Kernels:
    return compiled(backend, request.param)


def test_single_runs(kernels: Kernels) -> None:
    regions = [*every_length()]
    stores = check(kernels, [[region] for region in regions])
    assert stores == widths(regions)


def widths(regions: Iterable[Region]) -> Counter[int]:
    """Return the stores to expect: 16 bytes at every multiple of 16 where they fit, single bytes elsewhere."""
    expected: Counter[int] = Counter()
    for region in regions:
        tiles = max(0, (region.address + region.nbytes) // TILE - -(-region.address // TILE))
        expected += Counter({16: tiles, 1: region.nbytes - 16 * tiles})
    return expected


def test_run_table_of_every_length(kernels: Kernels) -> None:
    regions = side_by_side(every_length())
    assert check(kernels, [regions]) == widths(regions)


def test_run_table_of_thousands_of_tiny_rows(kernels: Kernels) -> None:
    tiny = (contiguous(1 + k % 40, k % 17, 1) for k in range(5000))
    check(kernels, [side_by_side(tiny)])


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 7, 8, 9, 16, 31, 100])
def test_run_table_search(kernels: Kernels, rows: int) -> None:
    lengths = [1 + 3 * CHUNK // 2 * (k * k % 3) for k in range(rows)]
    check(kernels, [side_by_side(contiguous(nbytes, 5, 1) for nbytes in lengths)])


@pytest.mark.parametrize("beside", [[], [contiguous(5, -29, 1)]], ids=["alone", "in a table"])
def test_pitched_rows(kernels: Kernels, beside: list[Region]) -> None:
    cases = []
    for itemsize, offset, nbytes in itertools.product(
        ITEMSIZES, (0, 1, 8, 15), (512, 528, CHUNK - 16, CHUNK, CHUNK + 16, 3 * CHUNK)
    ):
        for pitch in (nbytes + itemsize, nbytes + 16 * itemsize):
            shape = (3, nbytes // itemsize)
            cases.append([Region(offset, shape, (pitch, itemsize), element(itemsize))])
    assert all(split(case)[0]["count"].tolist() == [3] for case in cases)
    check(kernels, [[*case, *beside] for case in cases])


@pytest.mark.parametrize("index64", [False, True])
def test_strided(kernels: Kernels, index64: bool) -> None:
    stores = check(kernels, [[region] for region in small_strided()], index64=index64)
    assert stores.keys() == {1, 2, 4, 8, 16}


@pytest.mark.parametrize("nbytes", [TIB, TIB + 5, TIB + 16, TIB + BLOCK - 1])
@pytest.mark.parametrize("offset", [0, 1, 15])
def test_first_and_last_block_of_a_tebibyte(kernels: Kernels, nbytes: int, offset: int) -> None:
    region = contiguous(nbytes, BASE + offset, 1)
    launch = runs.run_launch(region.address, nbytes, *runs.tile(region.address, region.element))
    body = BASE + offset + -offset % TILE
    end = BASE + offset + nbytes
    last = min(body + (launch.grid - 1) * BLOCK, end // TILE * TILE)  # the first CTA stores the tail
    windows = [(BASE - GUARD, body + BLOCK), (last, end + GUARD)]
    check_ctas(kernels, [region], launch, [0, launch.grid - 1], windows)


def test_table_of_two_tebibytes(kernels: Kernels) -> None:
    first = contiguous(TIB + 3 * CHUNK, BASE, 2)
    second = contiguous(TIB, BASE + 2 * TIB, 4)
    table = runs.table(split([first, second])[0])
    launch = runs.table_launch(TIB, table)
    warps = THREADS // runs.LANES
    assert launch.grid == (2 * TIB // CHUNK + 3) // warps + 1
    windows = [
        (first.address + TIB, first.address + first.nbytes + GUARD),
        (second.address - GUARD, second.address + 5 * CHUNK),  # in the CTA that ends the first run
        (second.address + TIB - 3 * CHUNK, second.address + TIB + GUARD),
    ]
    ctas = [TIB // CHUNK // warps, launch.grid - 1]
    check_ctas(kernels, [first, second], launch, ctas, windows, {TIB: table})


@pytest.mark.parametrize("pitch", [1 << 20, 1 << 33])
@pytest.mark.parametrize("in_a_table", [False, True])
def test_last_stretch_of_a_pitched_tebibyte(kernels: Kernels, pitch: int, in_a_table: bool) -> None:
    rows, nbytes = 1 << 21, 1 << 19
    region = Region(BASE, (rows, nbytes // 2), (pitch, 2), element(2))
    found, _ = split([region])
    table = runs.table(found)
    launch = runs.table_launch(TIB, table) if in_a_table else runs.row_launch(*found[0].item())
    last = Region(BASE + (rows - 1) * pitch, (nbytes // 2,), (2,), region.element)
    end = last.address + nbytes
    window = (end - THREADS // runs.LANES * CHUNK, end + GUARD)
    check_ctas(kernels, [last], launch, [launch.grid - 1], [window], {TIB: table})


@pytest.mark.parametrize("total", [2**31 - 1, 2**31, 2**32 + 5])
@pytest.mark.parametrize("itemsize", [1, 8])
def test_last_of_billions_of_strided_elements(kernels: Kernels, total: int, itemsize: int) -> None:
    region = Region(BASE + itemsize, (total,), (3 * itemsize,), element(itemsize))
    (launch,) = runs.strided_launches(region)
    assert launch.kernel == f"fill_strided{32 if total < 2**31 else 64}"
    first = (launch.grid - 1) * THREADS
    window = (region.address + first * 3 * itemsize, region.address + total * 3 * itemsize + GUARD)
    check_ctas(kernels, [region], launch, [launch.grid - 1], [window])


@pytest.mark.parametrize("planes", [2**11 - 1, 2**11])
def test_last_row_of_billions_of_elements_in_four_dimensions(kernels: Kernels, planes: int) -> None:
    shape, strides = (planes, 64, 64, 256), (1 << 35, 1 << 20, 1 << 10, 2)
    region = Region(BASE, shape, strides, element(1))
    (launch,) = runs.strided_launches(region)
    assert launch.kernel == f"fill_strided{32 if planes < 2**11 else 64}"
    start = BASE + sum(stride * (length - 1) for stride, length in zip(strides[:3], shape[:3], strict=True))
    last = Region(start, (256,), (2,), region.element)
    check_ctas(kernels, [last], launch, [launch.grid - 1], [(start - GUARD, start + 512 + GUARD)])


def interpreted(body: str) -> ptx.Kernel:
    """Return a kernel of one 64-bit parameter, which is in %rd1."""
    registers = ".reg .pred %p<9>;\n.reg .b16 %rs<9>;\n.reg .b32 %r<9>;\n.reg .b64 %rd<9>;"
    return ptx.Kernel(
        f".visible .entry k(.param .u64 k_param_0)\n{{\n{registers}\nld.param.u64 %rd1, [k_param_0];\n{body}\nret;\n}}"
    )


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.s64 %rd2, -1, 1;", 0),
        ("sub.s32 %r1, 1, 2; cvt.s64.s32 %rd2, %r1;", -1),
        ("sub.s32 %r1, 1, 2; cvt.u64.u32 %rd2, %r1;", 2**32 - 1),
        ("mul.lo.s32 %r1, 65537, 65537; cvt.u64.u32 %rd2, %r1;", 131073),
        ("mul.wide.s32 %rd2, -3, 5;", -15),
        ("mul.wide.u32 %rd2, -1, 2;", 2**33 - 2),
        ("mul.hi.u64 %rd2, -1, -1;", 2**64 - 2),
        ("mul.hi.s64 %rd2, -1, 3;", -1),
        ("mul.hi.u32 %r1, -1, 16; cvt.u64.u32 %rd2, %r1;", 15),
        ("mad.lo.s64 %rd2, 3, -5, 1;", -14),
        ("mad.wide.u32 %rd2, -1, 2, 3;", 2**33 + 1),
        ("div.s64 %rd2, -7, 2;", -3),
        ("div.u64 %rd2, -7, 2;", (2**64 - 7) // 2),
        ("rem.s64 %rd2, -7, 2;", -1),
        ("shl.b64 %rd2, 1, 64;", 0),
        ("shr.s64 %rd2, -16, 70;", -1),
        ("shr.u64 %rd2, -16, 60;", 15),
        ("shf.l.wrap.b32 %r1, 5, 6, 1; cvt.u64.u32 %rd2, %r1;", 12),
        ("shf.r.wrap.b32 %r1, 5, 6, 33; cvt.u64.u32 %rd2, %r1;", 2),
        ("bfi.b64 %rd2, 3, 7, 10, 54;", 3 << 10 | 7),
        ("setp.lt.s64 %p1, -1, 0; selp.b64 %rd2, 8, 9, %p1;", 8),
        ("setp.lt.u64 %p1, -1, 0; selp.b64 %rd2, 8, 9, %p1;", 9),
        ("setp.eq.s32 %p1, 0, 0; setp.ne.or.s32 %p2, 0, 0, %p1; @!%p2 mov.u64 %rd1, 0; mov.u64 %rd2, 4;", 4),
    ],
)
def test_the_interpreter_computes_as_the_isa_says(instruction: str, expected: int) -> None:
    memory = ptx.Memory.of({BASE: np.zeros(8, "u1")})
    kernel = interpreted(f"{instruction} st.global.u64 [%rd1], %rd2;")
    kernel.run(memory, [ptx.Launch(1, 1, kernel.pack(BASE))])
    assert memory[BASE].view("u8")[0] == expected % 2**64


def test_lanes_diverge_and_meet_again() -> None:
    memory = ptx.Memory.of({BASE: np.zeros(4 * 64, "u1")})
    kernel = interpreted(
        """mov.u32 %r1, %tid.x; mov.u32 %r2, 0; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;
        setp.gt.u32 %p1, %r1, 40; @%p1 bra $end;
        $loop: add.s32 %r2, %r2, 2; setp.le.u32 %p2, %r2, %r1; @%p2 bra $loop;
        $end: st.global.u32 [%rd3], %r2;"""
    )
    kernel.run(memory, [ptx.Launch(1, 64, kernel.pack(BASE))])
    assert memory[BASE].view("u4").tolist() == [(k // 2 + 1) * 2 if k <= 40 else 0 for k in range(64)]
    assert memory.stores == {4: 64}


@pytest.mark.parametrize(
    ("offset", "reason"), [(-16, "out of bounds"), (28, "out of bounds"), (TIB, "out of bounds"), (2, "misaligned")]
)
def test_a_stray_store_faults(offset: int, reason: str) -> None:
    memory = ptx.Memory.of({BASE: np.zeros(32, "u1")})
    kernel = interpreted("st.global.u32 [%rd1+4], 7;")
    with pytest.raises(ptx.PTXError, match=reason):
        kernel.run(memory, [ptx.Launch(1, 1, kernel.pack(BASE + offset))])
    assert not memory.data.any()


@pytest.mark.parametrize(
    "instruction", ["cvt.rn.f64.u64 %fd1, %rd1;", "bar.sync 0;", "add.s64 %rd1, %rd1, %rd8;", "ld.shared.u32 %r1, [0];"]
)
def test_what_cannot_be_interpreted_is_refused(instruction: str) -> None:
    kernel = interpreted(instruction)
    with pytest.raises(ptx.PTXError):
        kernel.run(ptx.Memory.of({}), [ptx.Launch(1, 1, kernel.pack(0))])
