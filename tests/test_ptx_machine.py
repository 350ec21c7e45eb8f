"""The machine that executes compiled kernels without a GPU: what it computes, and what it reports as an error."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", minversion="3.8", reason="what is compiled is what Triton 3.8 makes of the kernels")

from ptx_machine import launch as launching
from ptx_machine.launch import compiled, machine
from ptx_machine.machine import Counts, launch
from ptx_machine.memory import Buffer
from ptx_machine.program import PtxError, parse

TESTS = Path(__file__).resolve().parent

THREADS = 64

KERNEL = """
.version 8.8
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid 64
{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<99>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mad.lo.s32 %r3, %r2, 64, %r1;
    mad.wide.u32 %rd3, %r3, 4, %rd1;
    mad.wide.u32 %rd4, %r3, 4, %rd2;
    ld.global.b32 { %r4 }, [ %rd3 + 0 ];
    shl.b32 %r5, %r1, 2;
    // body
    st.global.b32 [ %rd4 + 0 ], { %r6 };
    ret;
}
"""
"""%r1 is the thread, %r5 its place in shared memory; ``// body`` computes its output, %r6, from its input, %r4."""


def execute(body: str, values: Any = None, *, blocks: int = 1, counts: Counts | None = None) -> np.ndarray:
    """Run the kernel with this body; returns the outputs of the threads of ``blocks`` blocks, as 32-bit numbers."""
    given = np.arange(THREADS * blocks, dtype=np.uint32) if values is None else np.asarray(values)
    given = np.resize(given.view(np.uint32), THREADS * blocks)
    found = np.zeros_like(given)
    buffers = [Buffer(0x1000, given.view(np.uint8)), Buffer(0x100000, found.view(np.uint8))]
    text = KERNEL.replace("// body", body)
    grid, pointers = (blocks, 1, 1), [0x1000, 0x100000]
    launch(text, grid, pointers, buffers, threads=THREADS, shared_bytes=1024, counts=counts)
    return found


# ── what it computes ──────────────────────────────────────────────────────────────────────────────────────────────────


def bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


@pytest.mark.parametrize(
    ("body", "given", "expected"),
    [
        ("add.s32 %r6, %r4, -3;", 1, 0xFFFFFFFE),
        ("mul.hi.s32 %r6, %r4, 0x40000000;", 0xFFFFFFF8, 0xFFFFFFFE),
        ("mul.hi.u32 %r6, %r4, 0x40000000;", 0xFFFFFFF8, 0x3FFFFFFE),
        ("cvt.u16.u32 %rs1, %r4; mul.wide.s16 %r6, %rs1, 2;", 0xFFFF, 0xFFFFFFFE),
        ("cvt.u16.u32 %rs1, %r4; mad.wide.u16 %r6, %rs1, 2, 5;", 0xFFFF, 0x20003),
        ("shr.s32 %r6, %r4, 40;", 0x80000000, 0xFFFFFFFF),
        ("shr.u32 %r6, %r4, 40;", 0x80000000, 0),
        ("shl.b32 %r6, %r4, 32;", 1, 0),
        ("shf.l.wrap.b32 %r6, %r4, %r4, 36;", 0x12345678, 0x23456781),
        ("mov.b32 %r7, 0xF; shf.r.wrap.b32 %r6, %r4, %r7, 8;", 0x12345678, 0x0F123456),
        ("bfe.u32 %r6, %r4, 4, 8;", 0xABCD, 0xBC),
        ("bfe.s32 %r6, %r4, 3, 1;", 8, 0xFFFFFFFF),
        ("mov.b32 %r7, 0x7; bfi.b32 %r6, %r4, %r7, 24, 8;", 0x1FF, 0xFF000007),
        ("mov.b32 %r7, 0x44332211; prmt.b32 %r6, %r4, %r7, 0x5410U;", 0xDDCCBBAA, 0x2211BBAA),
        ("mov.b32 %r7, 0; prmt.b32 %r6, %r4, %r7, 0x4408U;", 0x80, 0x80FF),
        ("div.s32 %r6, %r4, 2;", 0xFFFFFFFD, 0xFFFFFFFF),
        ("min.u32 %r6, %r4, 5;", 0xFFFFFFFF, 5),
        ("max.s32 %r6, %r4, 0;", 0xFFFFFFFF, 0),
        ("add.s16x2 %r6, %r4, %r4;", 0x8001FFFF, 0x0002FFFE),
        ("mov.b32 {%rs1, %rs2}, %r4; mov.b32 %r6, {%rs2, %rs1};", 0x11112222, 0x22221111),
        ("mov.b32 {_, %rs2}, %r4; cvt.u32.u16 %r6, %rs2;", 0xABCD0000, 0xABCD),
        ("cvt.s8.s32 %r7, %r4; cvt.s32.s8 %r6, %r7;", 0x1FE, 0xFFFFFFFE),
        ("setp.lt.s32 %p1, %r4, 0; selp.b32 %r6, 7, 9, %p1;", 0xFFFFFFFF, 7),
        ("setp.lt.u32 %p1, %r4, 0; not.pred %p2, %p1; selp.b32 %r6, 7, 9, %p2;", 0xFFFFFFFF, 7),
        ("mov.b32 %r6, 5; setp.eq.b32 %p1, %r4, 1; @!%p1 mov.b32 %r6, 6;", 1, 5),
        ("mul.f32 %r6, %r4, 0f40000000;", bits(1.5), bits(3)),
        ("fma.rn.f32 %r6, %r4, %r4, 0fBF800000;", bits(1 + 2**-12), bits(2**-11 + 2**-24)),
        ("max.f32 %r6, %r4, 0f00000000;", bits(math.nan), 0),
        ("setp.gt.f32 %p1, %r4, 0f00000000; selp.b32 %r6, 1, 0, %p1;", bits(math.nan), 0),
        ("setp.ne.f32 %p1, %r4, %r4; selp.b32 %r6, 1, 0, %p1;", bits(math.nan), 0),
        ("setp.neu.f32 %p1, %r4, %r4; selp.b32 %r6, 1, 0, %p1;", bits(math.nan), 1),
        ("cvt.rzi.s32.f32 %r6, %r4;", bits(-2.9), 0xFFFFFFFE),
        ("cvt.rzi.u16.f32 %rs1, %r4; cvt.u32.u16 %r6, %rs1;", bits(-1.0), 0),
        ("cvt.rzi.s32.f32 %r6, %r4;", bits(math.nan), 0),
        ("cvt.rn.f32.s32 %r6, %r4;", 0xFFFFFFFF, bits(-1)),
        ("cvt.rn.f16x2.f32 %r6, %r4, 0f3F800000;", bits(2), 0x40003C00),
        ("cvt.rn.relu.f16x2.f32 %r6, %r4, 0f3F800000;", bits(-2), 0x00003C00),
        ("fma.rn.f16x2 %r6, %r4, %r4, %r4;", 0x40003C00, 0x46004000),
        ("mov.b32 %r7, 0x3C00BC00; fma.rn.relu.f16x2 %r6, %r4, %r7, %r7;", 0x3C003C00, 0x40000000),
        ("cvt.rn.bf16x2.f32 %r6, %r4, 0f3F800000;", bits(1 + 2**-7 + 2**-9), 0x3F813F80),
        ("cvt.u16.u32 %rs1, %r4; cvt.f32.bf16 %r6, %rs1;", 0x4000, bits(2)),
        ("ex2.approx.f32 %r6, %r4;", bits(-3), bits(0.125)),
        ("rcp.approx.ftz.f32 %r6, %r4;", bits(-8), bits(-0.125)),
    ],
)
def test_instructions_compute_what_ptx_defines(body: str, given: int, expected: int) -> None:
    assert hex(execute(body.replace("; ", ";\n"), np.uint32([given]))[0]) == hex(expected)


def test_diverging_threads_reconverge() -> None:
    """A loop that each thread runs a different number of times, and a branch of which threads take different sides."""
    body = """
    mov.b32 %r6, 0;
    mov.b32 %r7, 0;
$L__round:
    add.s32 %r6, %r6, %r7;
    add.s32 %r7, %r7, 1;
    setp.lt.u32 %p1, %r7, %r4;
    @%p1 bra $L__round;
    and.b32 %r8, %r4, 1;
    setp.eq.b32 %p2, %r8, 0;
    @%p2 bra $L__even;
    add.s32 %r6, %r6, 1000;
$L__even:
    bar.sync 0;
"""
    n = np.arange(128)
    assert np.array_equal(execute(body, blocks=2), n * (n - 1) // 2 + n % 2 * 1000)


EXCHANGE = """
    st.shared::cta.b32 [ %r5 + 0 ], %r4;
    bar.sync 0;
    xor.b32 %r7, %r5, 128;
    ld.shared.b32 %r6, [%r7];
"""
"""Exchange values with the same thread of the other warp."""

EVERYBODY_READS = """
    st.shared::cta.b32 [ %r5 + 0 ], %r4;
    bar.sync 0;
    mov.b32 %r7, 0;
    ld.shared.b32 %r6, [%r7];
"""

FIRST_IS_WRITTEN = "@%p1 st.shared::cta.b32 [ %r7 + 0 ], %r4;"
"""Executed by the threads for which %p1 holds."""


def test_shared_memory_is_a_block_s_own() -> None:
    assert np.array_equal(execute(EXCHANGE, blocks=3), np.arange(192) ^ 32)
    within_warps = EXCHANGE.replace("128", "16").replace("bar.sync 0", "bar.warp.sync -1")
    assert np.array_equal(execute(within_warps), np.arange(64) ^ 4)


def test_a_shuffle_stays_in_its_warp() -> None:
    assert np.array_equal(execute("shfl.sync.idx.b32 %r6, %r4, 3, 31, -1;"), np.arange(64) // 32 * 32 + 3)


def test_a_matrix_is_stored_and_loaded_transposed() -> None:
    body = """
    and.b32 %r8, %r1, 32;
    and.b32 %r9, %r1, 7;
    shl.b32 %r9, %r9, 4;
    mad.lo.s32 %r9, %r8, 4, %r9;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r9], {%r4};
    ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r6}, [%r9];
"""
    halves = np.arange(128, dtype=np.uint16)
    expected = halves.reshape(2, 8, 8).swapaxes(1, 2).ravel().view(np.uint32)
    assert np.array_equal(execute(body, halves), expected)


# ── what it does not let pass ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (EXCHANGE.replace("bar.sync 0;", ""), "reads what another thread has written without a barrier"),
        (EXCHANGE.replace("bar.sync 0;", "bar.warp.sync -1;"), "reads what another thread has written without a bar"),
        (EXCHANGE + "st.shared::cta.b32 [ %r5 + 0 ], %r4;", "writes what another thread reads without a barrier"),
        (
            EVERYBODY_READS + "setp.eq.b32 %p1, %r1, 63;\n" + FIRST_IS_WRITTEN,
            "writes what another thread reads without",
        ),
        ("ld.shared.b32 %r6, [%r50];", "shared address 4294967295"),  # with a register that was never written
        ("mov.b32 %r7, 0;\nst.shared::cta.b32 [ %r7 + 0 ], %r4;", "write different values to the same place"),
        ("ld.shared.b32 %r6, [%r5+4];", "nothing was written to"),
        ("ld.shared.b32 %r6, [%r5+1];", "no multiple of 4"),
        ("ld.shared.b32 %r6, [%r5+1024];", "in a memory of 1024 bytes"),
        ("ld.global.b32 { %r6 }, [ %rd3 + 4 ];", "in no tensor"),
        ("ld.global.b32 { %r6 }, [ %rd3 + 2 ];", "no multiple of 4"),
        ("mov.b32 %r6, 0;\nst.global.b32 [ %rd2 + 0 ], { %r4 };", "different values to the same place"),
        ("setp.lt.u32 %p1, %r1, 7;\n@%p1 shfl.sync.idx.b32 %r6, %r4, 3, 31, -1;", "only some threads of a warp"),
        ("setp.lt.u32 %p1, %r1, 7;\n@%p1 bra $L__on;\nbar.sync 0;\n$L__on:\nmov.b32 %r6, 0;\nbar.sync 0;", "different"),
        ("sqrt.rn.f32 %r6, %r4;", "not known to this machine"),
    ],
)
def test_what_is_undefined_is_an_error(body: str, expected: str) -> None:
    with pytest.raises(PtxError, match=expected):
        execute(body)


def test_a_copy_beside_the_threads_must_be_waited_for() -> None:
    body = """
    shl.b32 %r7, %r1, 4;
    mul.wide.u32 %rd5, %r1, 4;
    and.b64 %rd5, %rd5, 240;
    add.s64 %rd5, %rd5, %rd1;
    cp.async.cg.shared.global [ %r7 + 0 ], [ %rd5 + 0 ], 0x10;
    cp.async.commit_group;
    cp.async.wait_group 0;
    and.b32 %r8, %r1, 3;
    mad.lo.s32 %r8, %r8, 4, %r7;
    ld.shared.b32 %r6, [%r8];
"""
    assert np.array_equal(execute(body), np.arange(64))
    for wrong in (body.replace("wait_group 0", "wait_group 1"), body.replace("cp.async.wait_group 0;", "")):
        with pytest.raises(PtxError, match="a copy that was not waited for"):
            execute(wrong)


def test_a_later_launch_may_overwrite_what_an_earlier_one_wrote() -> None:
    """A launch may overwrite with other values what the launch before it wrote."""
    given, found = np.arange(THREADS, dtype=np.uint32), np.zeros(THREADS, np.uint32)
    buffers = [Buffer(0x1000, given.view(np.uint8)), Buffer(0x100000, found.view(np.uint8))]
    text = KERNEL.replace("// body", "xor.b32 %r8, %r1, 1;\nmul.wide.u32 %rd4, %r8, 4;\nadd.s64 %rd4, %rd4, %rd2;")
    for _ in range(2):
        given += 1
        launch(text.replace("%r6", "%r4"), (1, 1, 1), [0x1000, 0x100000], buffers, threads=THREADS, shared_bytes=0)
        assert np.array_equal(found, given[np.arange(THREADS) ^ 1])
    swapped = text.replace("%r6", "%r4").replace("xor.b32 %r8, %r1, 1;", "and.b32 %r8, %r1, 62;")
    with pytest.raises(PtxError, match="different values to the same place"):
        launch(swapped, (1, 1, 1), [0x1000, 0x100000], buffers, threads=THREADS, shared_bytes=0)


def test_reading_what_another_block_wrote_is_an_error() -> None:
    body = "mov.b32 %r6, %r4;\nst.global.b32 [ %rd4 + 0 ], { %r4 };\nld.global.b32 { %r7 }, [ %rd2 + 0 ];"
    execute(body)
    with pytest.raises(PtxError, match="another block of the same launch wrote"):
        execute(body, blocks=2)


@pytest.mark.parametrize(
    ("step", "width", "passes", "sectors"),
    [(4, 1, 1, 4), (8, 1, 2, 8), (128, 1, 32, 32), (0, 1, 1, 1), (16, 4, 4, 16), (32, 4, 8, 32)],
)
def test_shared_passes_and_sectors_are_counted(step: int, width: int, passes: int, sectors: int) -> None:
    """Count for a warp whose threads load ``width`` words each, ``step`` bytes apart."""
    counts = Counts()
    lanes = np.arange(32)
    counts.count_shared("ld", lanes, lanes * step, 4 * width)
    counts.count_sectors("ld", lanes, lanes * step, 4 * width)
    assert (counts.shared["ld"], counts.sectors["ld"]) == (passes, sectors)
    words = 1 if step == 0 else 32 * width
    assert counts.fewest_shared["ld"] == -(-words // 32)
    assert counts.fewest_sectors["ld"] == -(-words // 8)


def test_only_warps_that_take_part_are_counted() -> None:
    """Three blocks of two warps: all threads of the first warp add, and one of the second."""
    counts = Counts()
    body = "mov.b32 %r6, 0;\nsetp.lt.u32 %p1, %r1, 32;\n@%p1 add.s32 %r6, %r6, 1;\nsetp.lt.u32 %p2, %r1, 33;"
    execute(body + "\n@%p2 sub.s32 %r6, %r6, 1;\n@!%p2 mul.lo.s32 %r6, %r6, 3;", blocks=3, counts=counts)
    found = [counts.instructions[name] for name in ("setp.lt.u32", "add.s32", "sub.s32", "mul.lo.s32")]
    assert found == [12, 3, 6, 3]


# ── whole kernels ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_passes_its_tests_compiled(arch: int) -> None:
    """Run the tests of Triton's kernels in a separate process: in this one the kernels are for Triton's interpreter."""
    files = sorted(TESTS.glob("test_*_triton.py"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    paths = filter(None, [str(TESTS), environment.get("PYTHONPATH")])
    environment |= {"PTX_MACHINE": str(arch), "PYTHONPATH": os.pathsep.join(paths)}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "ptx_machine.plugin", *map(str, files)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= 100, done.stdout


def counted(batch: int) -> tuple[list[tuple[str, int]], list[float]]:
    """Each launch of an engine at width 1/8 with its instructions per frame, and each half's sum in millions.

    Counted in a separate process, too.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))}
    words = [sys.executable, "-m", "ptx_machine.ledger", "gluon"]
    words += ["--batch", str(batch), "--width", "0.125", "--blocks", "8"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *launches, template, speech = (line.split() for line in done.stdout.splitlines()[1:])
    return [(name, int(n.replace(",", ""))) for name, n, *_ in launches], [float(template[1]), float(speech[1])]


def test_a_frame_s_instructions_are_counted() -> None:
    """A few blocks of a launch stand for all of it: on large maps, a frame costs the same in larger batches."""
    (two, sums), (four, _) = counted(2), counted(4)
    assert len(two) > 30 and all(instructions for _, instructions in two)
    assert sum(sums) == pytest.approx(sum(instructions for _, instructions in two) / 1e6, abs=0.02)
    large = [(a, b) for (_, a), (_, b) in zip(two, four, strict=True) if a > 400_000]
    assert len(large) >= 4
    assert all(a == pytest.approx(b, rel=0.02) for a, b in large)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is not in use")
def test_interpreted_kernels_leave_triton_language_unchanged() -> None:
    """Otherwise a kernel compiled afterwards would call the interpreter's operations."""
    from triton import language

    from gpupipe.kernels.pointwise_triton import pointwise_triton

    def operations() -> dict[str, Any]:
        return {name: getattr(language.core, name) for name in ("program_id", "arange", "load", "dot", "maximum")}

    before = operations()
    assert all(language.core.is_builtin(one) for one in before.values())
    pointwise_triton(torch.zeros(1, 4, 4, 16).half(), torch.zeros(16, 16).half(), torch.zeros(16), relu=True)
    assert operations() == before


def without(pattern: str, number: int) -> Callable[[str], str]:
    """Remove the ``number``-th line that ``pattern`` matches from a program."""

    def remove(text: str) -> str:
        found = list(re.finditer(rf"^\s*{pattern}[^\n]*$", text, re.MULTILINE))[number]
        return text[: found.start()] + text[found.end() :]

    return remove


@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        (without(r"bar\.sync", 0), "barrier|proxy fence"),
        (without(r"bar\.sync", -1), "barrier|proxy fence"),
        (without(r"fence\.proxy", 0), "no proxy fence"),
        (without(r"wgmma\.wait_group", -1), "before it is waited for"),
    ],
)
def test_a_kernel_without_a_barrier_fence_or_wait_is_an_error(
    removed: Callable[[str], str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A barrier, a fence, a wait of the whole-block kernel by wgmma."""
    kernels = compiled("gpupipe.kernels.whole_block_parts", "gpupipe.kernels.whole_block_gluon")
    from gpupipe.kernels.whole_block import pack_whole_block

    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(16, 64, 1), torch.nn.Conv2d(64, 64, 3, padding=1, groups=64), torch.nn.Conv2d(64, 16, 1))
    block, skip = pack_whole_block(*(layer.requires_grad_(False) for layer in layers)), torch.randn(1, 8, 30, 16).half()
    with machine(90):
        kernels.whole_block_gluon(skip, block, wgmma=True)
    monkeypatch.setattr(launching, "launch", lambda ptx, *given, **options: launch(removed(ptx), *given, **options))
    with machine(90), pytest.raises(PtxError, match=expected):
        kernels.whole_block_gluon(skip, block, wgmma=True)


def test_text_that_is_not_ptx_is_refused() -> None:
    for text, expected in (
        ("", "no .entry"),
        (KERNEL.replace("}\n", ""), "does not end"),
        (KERNEL.replace("// body", "!"), "is no instr"),
    ):
        with pytest.raises(PtxError, match=expected):
            parse(text)
