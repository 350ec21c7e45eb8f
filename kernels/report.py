"""What the compiler makes of every Triton kernel on every architecture; no GPU is needed.

``python -m gpupipe.kernels.report [--arch 90 …] [--json FILE]`` compiles each kernel as it is launched (see
:func:`variants`) and prints a row for each configuration: registers, stack frame, spills, shared memory, and how wide
its loads and stores of global memory are (the width that carries the most). It exits with 1 on a spill, a stack frame,
more shared memory than an architecture has, or a compile error.

Nothing here runs a kernel: it says what was compiled, not how fast it is.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from gpupipe.kernels import crop_resize_triton, nv12_triton, paste_blend_triton
from gpupipe.kernels.launch_triton import FUSION
from gpupipe.kernels.whole_block import gluon_obstacle
from gpupipe.lanes import available_cores

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities, times ten: A100, RTX 30, RTX 40 and L4, H100, B200, RTX 50."""

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that a program can have, by architecture: CUDA C++ Programming Guide, "Compute Capabilities"."""


@dataclass(frozen=True)
class Variant:
    """One kernel as one launch would have it compiled.

    Attributes:
        kernel: the ``@triton.jit`` function.
        name: the noun it belongs to.
        config: what distinguishes it from the noun's other variants.
        types: the type of each argument that is not a constant: ``*u8``, ``i32``, ``fp32``. Pointers are taken to be
            aligned to 16 bytes, as torch allocates them.
        constants: the ``constexpr`` arguments, and those that are None or 1 in this configuration.
        multiples: integer arguments that are multiples of 16, as a 1280×720 or 1920×1080 frame's are.
        architectures: those it is compiled for; None is all.
    """

    kernel: Any
    name: str
    config: str
    types: dict[str, str]
    constants: dict[str, Any]
    multiples: tuple[str, ...] = ()
    num_warps: int = 4
    architectures: tuple[int, ...] | None = None
    num_stages: int | None = None


@dataclass(frozen=True)
class Row:
    """A variant compiled for an architecture; sizes in bytes, ``None`` where it did not compile or fit."""

    kernel: str
    config: str
    arch: str
    registers: int | None = None
    stack: int | None = None
    spills: int | None = None
    shared_bytes: int | None = None
    load_bits: int | None = None
    store_bits: int | None = None
    error: str | None = None
    loads: dict[str, int] = field(default_factory=dict)
    stores: dict[str, int] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Compiled, with no spill, no stack frame, and no more shared memory than there is."""
        return self.error is None and not self.spills and not self.stack


def variants() -> list[Variant]:
    """Every kernel, as the pipeline and the benchmarks launch it; half precision is float16, frames are BGR.

    The kernels around the network are given frames of 1280×720 or 1920×1080. Each option of paste_blend is here, and
    each type of mouth in the layout that the engines give it, but not every combination of them.
    """
    found = [*_crop_variants(), *_paste_variants(), *_nv12_variants()]
    if gluon_obstacle() is None:
        from gpupipe.kernels.report_gluon import gluon_variants

        found += gluon_variants()
    from gpupipe.kernels.report_network import network_variants

    return found + network_variants()


def _crop_variants() -> Iterator[Variant]:
    crop = dict.fromkeys(("frames", "crops"), "*u8") | dict.fromkeys(("index", "boxes"), "*i64")
    crop |= {"frame_stride": "i32", "row_stride": "i32"}
    for config, image, channels_last in (
        ("crop328 + planar float32", "*fp32", False),
        ("crop328 + channels-last float16", "*fp16", True),
    ):
        types = crop | {"image": image}
        constants: dict[str, Any] = {"CHANNELS_LAST": channels_last, "BLOCK": crop_resize_triton.BLOCK}
        kernel = crop_resize_triton._crop_resize_kernel
        yield Variant(kernel, "crop_resize", config, types, constants, ("frame_stride", "row_stride"))


def _paste_variants() -> Iterator[Variant]:
    paste = dict.fromkeys(("crops", "frames", "out"), "*u8") | dict.fromkeys(("crop_index", "index", "boxes"), "*i64")
    strides = ["mouth_stride", "frame_stride", "row_stride", "keep_stride", "keep_row_stride", "out_stride"]
    sizes = ["frame_height", "frame_width", "mouth_row_stride"]
    others = ["channel_stride", "mouth_column_stride", "tiles"]
    rows, columns = paste_blend_triton.TILE
    for config, mouth, unit_stride, nv12, feather, keep in (
        ("BGR, channels-last float32", "*fp32", "channel_stride", False, False, False),
        ("BGR, channels-last float32, feather, keep", "*fp32", "channel_stride", False, True, True),
        ("BGR, channels-last float16, feather", "*fp16", "channel_stride", False, True, False),
        ("BGR, planar uint8", "*u8", "mouth_column_stride", False, False, False),
        ("NV12, channels-last float32, feather", "*fp32", "channel_stride", True, True, False),
        ("NV12, channels-last float16", "*fp16", "channel_stride", True, False, False),
        ("NV12, channels-last float16, feather", "*fp16", "channel_stride", True, True, False),
        ("NV12, channels-last float16, feather, keep", "*fp16", "channel_stride", True, True, True),
        ("NV12, planar uint8, feather", "*u8", "mouth_column_stride", True, True, False),
        ("NV12, planar uint8, feather, keep", "*u8", "mouth_column_stride", True, True, True),
    ):
        types = paste | {"mouth": mouth, "feather": "fp32"} | dict.fromkeys([*strides, *sizes, *others], "i32")
        constants: dict[str, Any] = {unit_stride: 1, "NV12": nv12, "FEATHER": feather, "KEEP": keep}
        constants |= {"TILE_ROWS": rows, "TILE_COLUMNS": columns}
        if keep:
            types["keep"] = "*u8"
        else:
            constants["keep"] = None
        multiples = [*strides, *sizes, *(["channel_stride"] if unit_stride == "mouth_column_stride" else [])]
        kernel = paste_blend_triton._paste_blend_kernel
        yield Variant(kernel, "paste_blend", config, types, constants, tuple(multiples))


def _nv12_variants() -> list[Variant]:
    size = {"height": "i32", "width": "i32"}
    block = {"BLOCK": nv12_triton.BLOCK}
    cell = {"frames": "*u8", "out": "*u8", "frame_stride": "i32", "row_stride": "i32", **size}
    words = {"frames": "*i32", "out": "*i32", **size}
    return [
        Variant(nv12_triton._to_nv12_wide_kernel, "to_nv12", "16×2 pixels", words, block, ("height", "width")),
        Variant(nv12_triton._to_nv12_cell_kernel, "to_nv12", "2×2 pixels", cell, block),
        Variant(nv12_triton._from_nv12_wide_kernel, "from_nv12", "16×2 pixels", words, block, ("height", "width")),
        Variant(nv12_triton._from_nv12_cell_kernel, "from_nv12", "2×2 pixels", cell, block),
    ]


def compiled_kernel(variant: Variant, arch: int) -> Any:
    """What Triton makes of ``variant`` for compute capability ``arch`` / 10."""
    names = variant.kernel.arg_names
    constants = {name: value for name, value in variant.constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else variant.types[name] for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in variant.multiples
    }
    if variant.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    else:
        Source = ASTSource
    source = Source(fn=variant.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": variant.num_warps, **FUSION}
    if variant.num_stages is not None:
        options["num_stages"] = variant.num_stages
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compile_variant(variant: Variant, arch: int) -> Row:
    """Compile for compute capability ``arch`` / 10 and read off the row."""
    label = (variant.name, variant.config, f"sm_{arch}")
    try:
        compiled = compiled_kernel(variant, arch)
        ptx = compiled.asm["ptx"]
        registers, stack, spills = _resources(ptx, arch)
    except Exception as error:  # whatever a compiler raises is this row's result
        return Row(*label, error=f"{type(error).__name__}: {error}".strip())
    shared = compiled.metadata.shared
    if arch in SHARED_KIB and shared > 1024 * SHARED_KIB[arch]:  # the driver would refuse to load it
        told = f"{shared} bytes of shared memory; expected {1024 * SHARED_KIB[arch]} at most"
        return Row(*label, registers, stack, spills, shared, error=told)
    loads, stores = _widths(ptx, "ld"), _widths(ptx, "st")
    return Row(
        *label,
        registers=registers,
        stack=stack,
        spills=spills,
        shared_bytes=shared,
        load_bits=_main_width(loads),
        store_bits=_main_width(stores),
        loads={f"{bits} bits": count for bits, count in sorted(loads.items())},
        stores={f"{bits} bits": count for bits, count in sorted(stores.items())},
    )


def _resources(ptx: str, arch: int) -> tuple[int, int, int]:
    """Registers, stack frame and spilled bytes, as Triton's own ptxas reports them."""
    target = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        told = subprocess.run(
            [_assembler(arch), "-v", f"--gpu-name={target.group(1)}", str(source), "-o", f"{folder}/kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    stack, stores, loads = map(int, _numbers(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", told))
    (registers,) = map(int, _numbers(r"Used (\d+) registers", told))
    return registers, stack, stores + loads


def _assembler(arch: int) -> str:
    """Path of Triton's own ptxas, of which Triton 3.5 has only one."""
    path: str = (get_ptxas(arch) if inspect.signature(get_ptxas).parameters else get_ptxas()).path
    return path


def _numbers(pattern: str, text: str) -> tuple[str, ...]:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the assembler said {text!r}; expected {pattern!r} in it")
    return found.groups()


def _widths(ptx: str, operation: str) -> dict[int, int]:
    """Bits of an access of global memory → how many such instructions there are."""
    counts: dict[int, int] = {}
    for vector, bits in re.findall(rf"\b{operation}\.global(?:\.\w+::\w+|\.\w+)*?(?:\.v(\d))?\.[busf](\d+)\b", ptx):
        width = int(vector or 1) * int(bits)
        counts[width] = counts.get(width, 0) + 1
    return counts


def _main_width(counts: dict[int, int]) -> int:
    """The width that carries the most bits; the wider of two that carry as much."""
    return max(counts, key=lambda bits: (bits * counts[bits], bits), default=0)


def report(architectures: Iterable[int] = ARCHITECTURES, kernels: Collection[str] | None = None) -> list[Row]:
    """Compile everything, or the named kernels only.

    Raises:
        RuntimeError: Triton's interpreter is on, which leaves nothing to compile.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set; the kernels are interpreted, and cannot be compiled")
    jobs = [
        (variant, arch)
        for arch in architectures
        for variant in variants()
        if (kernels is None or variant.name in kernels)
        and (variant.architectures is None or arch in variant.architectures)
    ]
    with ThreadPoolExecutor(available_cores()) as threads:
        return list(threads.map(lambda job: compile_variant(*job), jobs))


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    names = ("kernel", "config", "arch", "registers", "stack", "spills", "shared_bytes", "load_bits", "store_bits")
    lines = [names, *(tuple(str(getattr(row, name)) for name in names) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text += [f"{row.kernel}, {row.config}, {row.arch}: {row.error}" for row in rows if row.error]
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m gpupipe.kernels.report", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, times ten")
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="only these kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as a list")
    options = parser.parse_args(arguments)
    rows = report(options.arch, options.kernel)
    print(table(rows))
    if (reason := gluon_obstacle()) is not None:
        print(f"without the Gluon kernels: {reason}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    return 0 if all(row.clean for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
