"""The LLVM kernels: levels against the modules that they are made from, and what kernels are made of."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.kernels import dispatch

if reason := dispatch.llvm_obstacle():
    pytest.skip(f"LLVM kernels do not run here: {reason}", allow_module_level=True)

import llvmlite.binding as llvm

from gpupipe.kernels import common_llvm, levels_llvm
from gpupipe.kernels.common_llvm import Kernel, Processor, Writer, this_processor
from gpupipe.kernels.levels_llvm import Level, first_level, up_level
from gpupipe.models.hoisted import SpeechHalf, TemplateHalf

BOUND = 1e-5
"""Allowed difference, as a share of the largest value: float32 rounding."""

MARGIN = 64
"""Floats around a tensor that no kernel may touch."""


def processors() -> list[Processor]:
    """This one, and what else it can run: with vectors half as long, and fewer of them."""
    here = this_processor()
    older = [Processor("haswell", "", 8, 16)] if here.lanes == 16 else []
    return [here, *older]


@pytest.fixture(scope="module", params=processors(), ids=lambda processor: f"{processor.lanes} lanes")
def processor(request: pytest.FixtureRequest) -> Processor:
    return request.param


@pytest.fixture(scope="module", params=[1 / 8, 3 / 8], ids=["width 1/8", "width 3/8"])
def halves(request: pytest.FixtureRequest) -> tuple[TemplateHalf, SpeechHalf]:
    network = seeded_network(width=request.param)
    return TemplateHalf(network).eval(), SpeechHalf(network).eval()


def guarded(shape: Sequence[int], value: float = float("nan")) -> tuple[Tensor, Callable[[], None]]:
    """A tensor of a value, and what fails if anything was written beside it."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 2 * MARGIN,), 7.0)
    inside = memory[MARGIN:-MARGIN].view(shape)
    inside.fill_(value)

    def check() -> None:
        assert (memory[:MARGIN] == 7).all() and (memory[-MARGIN:] == 7).all()

    return inside, check


def run(level: Level, inputs: Sequence[Tensor], bands: int = 1) -> list[Tensor]:
    """What a level makes, a band of rows at a time, the last first."""
    outputs, checks = zip(*(guarded(shape) for shape in level.shapes), strict=True)
    edges = [level.size * band // bands for band in range(bands + 1)]
    for begin, end in reversed([*pairwise(edges)]):
        scratch, check = guarded((level.kernel.scratch_floats,))
        level.kernel([*inputs, *outputs], scratch, begin, end)
        check()
    for check in checks:
        check()
    return list(outputs)


def stored(planar: Tensor, lanes: int) -> Tensor:
    """(1, C, H, W) as kernels take it: (H, W, C padded), the padding full of what must not matter."""
    pixels = planar[0].permute(1, 2, 0)
    zeros = -pixels.shape[-1] % lanes
    return nn.functional.pad(pixels, (0, zeros), value=float("nan")).contiguous()


def close(found: Tensor, planar: Tensor) -> bool:
    """Whether a padded map is what a module made, its padding 0."""
    expected, channels = planar[0].permute(1, 2, 0), planar.shape[1]
    largest = float(expected.abs().max())
    assert largest > 0.01, "it must make something"
    right = (found[..., :channels] - expected).abs().max() <= BOUND * max(largest, 1)
    return bool(right) and bool((found[..., channels:] == 0).all())


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("name", "size"), [("up1", 20), ("up2", 8), ("up3", 42), ("up4", 80)])
@torch.no_grad()
def test_a_level_of_the_decoder(name: str, size: int, halves: tuple[object, SpeechHalf], processor: Processor) -> None:
    up = getattr(halves[1], name)
    low, skip = noise(1, up.low.in_channels, size // 2, size // 2), noise(1, up.skip.in_channels, size, size)
    level = up_level(up, size, skip_padded=True, processor=processor)
    inputs = [stored(low, processor.lanes), stored(skip, processor.lanes)]
    (found,) = run(level, inputs)
    assert close(found, up(low, skip))
    assert not close(found, up(low, skip.flip(2)))
    assert not close(found, up(low.flip(3), skip))
    for bands in (2, 3):
        assert torch.equal(*run(level, inputs, bands), found)
    assert torch.equal(*run(up_level(up, size, processor=processor), [inputs[0], stored(skip, 1)]), found), "not padded"


@torch.no_grad()
def test_the_upsampling_aligns_corners(halves: tuple[object, SpeechHalf]) -> None:
    up, lanes = copy.deepcopy(halves[1].up3), this_processor().lanes
    low, skip = noise(1, up.low.in_channels, 20, 20), noise(1, up.skip.in_channels, 40, 40)
    (found,) = run(up_level(up, 40), [stored(low, lanes), stored(skip, 1)])
    up.up.align_corners = False
    assert not close(found, up(low, skip))


@torch.no_grad()
def test_the_last_level_makes_the_mouth(halves: tuple[object, SpeechHalf], processor: Processor) -> None:
    up, head, size = halves[1].up5, halves[1].outc.conv, 48
    low, skip = noise(1, up.low.in_channels, size // 2, size // 2), noise(1, up.skip.in_channels, size, size)
    level = up_level(up, size, head=head, processor=processor)
    inputs = [stored(low, processor.lanes), skip[0].permute(1, 2, 0).contiguous()]
    (found,) = run(level, inputs)
    mouth = torch.sigmoid(head(up(low, skip)))[0]
    assert (found - mouth).abs().max() <= BOUND
    assert (found - mouth.flip(0)).abs().max() > 100 * BOUND, "its channels differ"
    assert torch.equal(*run(level, inputs, bands=5), found)


@torch.no_grad()
def test_the_first_level_makes_what_the_first_block_makes_too(
    halves: tuple[TemplateHalf, object], processor: Processor
) -> None:
    template, size = halves[0], 24
    image = noise(1, 6, 2 * size, 2 * size)
    level = first_level(template.hidden, template.down1, size, processor=processor)
    hidden, x2 = run(level, [image[0]])
    expected = template.hidden(image)
    assert (hidden - expected[0].permute(1, 2, 0)).abs().max() <= BOUND
    assert close(x2, template.down1(expected))
    for again, once in zip(run(level, [image[0]], bands=4), (hidden, x2), strict=True):
        assert torch.equal(again, once)


@torch.no_grad()
def test_a_wrong_number_is_seen_as_such(halves: tuple[TemplateHalf, object]) -> None:
    """A NaN spreads to the rows that read it, and to no others."""
    image = noise(1, 6, 40, 40)
    image[0, 0, 20, 20] = float("nan")
    hidden, x2 = run(first_level(halves[0].hidden, halves[0].down1, 20), [image[0]])
    rows = [found.isnan().flatten(1).any(dim=1).nonzero().flatten().tolist() for found in (hidden, x2)]
    assert rows == [[19, 20, 21], [8, 9, 10, 11, 12]], (
        "x2's rows 9 to 11 read those of hidden, and make their neighbours"
    )


MACHINES = {
    "AVX-512": ("x86_64-unknown-linux-gnu", Processor("sapphirerapids", "", 16, 32), r"%zmm\d+, -?\d*\(%rsp\)", 0),
    "AVX2": ("x86_64-unknown-linux-gnu", Processor("haswell", "", 8, 16), r"%ymm\d+, -?\d*\(%rsp\)", 6),
    "NEON": ("aarch64-unknown-linux-gnu", Processor("neoverse-v1", "+neon", 4, 32), r"st[rp]\tq.*\[sp", 3),
}
"""Machines to compile for: triple, processor, how a vector is written to the stack, and how often that may be.

Taps of depthwise convolutions may go there, once a row: sixteen registers do not hold them beside the sums."""


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("level", ["first", "up4"])
def test_sums_stay_in_registers(name: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At full width; and nothing is called, as the C library's fma would be where the processor has none."""
    triple, processor, spill, most = MACHINES[name]
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(triple).create_target_machine(processor.name, processor.features, jit=True)
    network, plans = seeded_network(width=1), []
    monkeypatch.setattr(levels_llvm, "Kernel", lambda plan, *_: plans.append(plan))

    def assembled(processor: Processor) -> str:
        if level == "first":
            template = TemplateHalf(network)
            first_level(template.hidden, template.down1, 160, processor=processor)
        else:
            up_level(SpeechHalf(network).up4, 160, skip_padded=True, processor=processor)
        return target.emit_assembly(common_llvm._improved(plans[-1].write(processor).finish(), target))

    assembly = assembled(processor)
    assert not re.search(r"\t(call|bl)\w*\t", assembly)
    assert len(re.findall(spill, assembly)) <= most
    too_many = replace(processor, registers=2 * processor.registers)
    assert len(re.findall(spill, assembled(too_many))) > 10 + most, "of tiles for registers that there are not"


@dataclass(frozen=True)
class Sigmoid:
    """A kernel of one stage: the sigmoid of ``end`` vectors."""

    maps: int = 2

    def write(self, processor: Processor) -> Writer:
        w = Writer(processor, self.maps)
        source, target = w.maps
        with w.loop(w.begin, w.end) as i:
            w.store(w.sigmoid(w.load(w.at(source, w.times(i, w.lanes)))), w.at(target, w.times(i, w.lanes)))
        return w


@dataclass(frozen=True)
class Transposed:
    """A kernel of one stage: a row of (lanes, 3) to three vectors, each without its last two lanes."""

    maps: int = 2

    def write(self, processor: Processor) -> Writer:
        w = Writer(processor, self.maps)
        for channel in range(3):
            w.store(w.gather(w.at(w.maps[0], channel), 3), w.at(w.maps[1], channel * w.lanes), w.lanes - 2)
        return w


def test_sigmoid(processor: Processor) -> None:
    values = torch.cat([torch.linspace(-120, 120, 3200 - 4), torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])])
    found, check = guarded(values.shape)
    Kernel(Sigmoid(), torch.zeros(16), processor)([values, found], torch.zeros(16), 0, 3200 // processor.lanes)
    check()
    torch.testing.assert_close(found, torch.sigmoid(values), rtol=1e-6, atol=1e-37, equal_nan=True)


def test_gathered_and_partly_stored(processor: Processor) -> None:
    lanes = processor.lanes
    values, found = torch.arange(3 * lanes, dtype=torch.float32), torch.zeros(3, lanes)
    Kernel(Transposed(), torch.zeros(16), processor)([values, found], torch.zeros(16), 0, 1)
    expected = values.view(lanes, 3).T.clone()
    expected[:, -2:] = 0
    assert torch.equal(found, expected)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was compiled; the cache folder is a new one."""
    monkeypatch.setenv("GPUPIPE_CACHE", str(tmp_path / "cache"))
    compile_ = common_llvm._compiled
    sources: list[str] = []

    def noted(source: str, machine: object) -> bytes:
        sources.append(source)
        return compile_(source, machine)

    monkeypatch.setattr(common_llvm, "_compiled", noted)
    return sources


def sigmoid_of_one() -> float:
    found = torch.zeros(16)
    kernel = Kernel(Sigmoid(), torch.zeros(16), this_processor())
    kernel([torch.ones(16), found], torch.zeros(16), 0, 1)
    return round(float(found[0]), 4)


def test_a_kernel_is_compiled_once(compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert [sigmoid_of_one(), sigmoid_of_one()] == [0.7311, 0.7311]
    assert len(compiled) == 1
    for name, other in (("_sources", lambda: "others"), ("_PASSES", common_llvm._PASSES)):
        monkeypatch.setattr(common_llvm, name, other)
        sigmoid_of_one()
        assert len(compiled) == 2, "written by other code; and kept after that, too"
    assert len([*(tmp_path / "cache" / "llvm").glob("*.o")]) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "a bit"])
def test_a_damaged_file_is_compiled_again(damage: str, compiled: list[str], tmp_path: Path) -> None:
    sigmoid_of_one()
    (file,) = (tmp_path / "cache" / "llvm").iterdir()
    whole = file.read_bytes()
    damaged = {"cut": whole[:-1], "empty": b"", "a bit": whole[:50] + bytes([whole[50] ^ 1]) + whole[51:]}
    file.write_bytes(damaged[damage])
    assert sigmoid_of_one() == 0.7311
    assert len(compiled) == 2
    assert file.read_bytes() == whole


def test_kernels_work_where_nothing_can_be_kept(
    compiled: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file for the folder")
    assert sigmoid_of_one() == 0.7311
    assert f"{tmp_path / 'cache'}" in caplog.text
    assert "; kernels are compiled again next time" in caplog.text


@pytest.mark.parametrize(
    ("features", "lanes"),
    [
        ({"avx512f": True, "avx2": True, "fma": True}, 16),
        ({"avx512f": False, "avx2": True, "fma": True}, 8),
        ({"avx2": True, "fma": False}, 0),
        ({"neon": True}, 4),
        ({}, 0),
    ],
)
def test_vectors_are_as_long_as_the_processor_s(
    features: dict[str, bool], lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Features(dict[str, bool]):
        def flatten(self) -> str:
            return ""

    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: Features(features))
    monkeypatch.setattr(common_llvm, "this_processor", common_llvm.this_processor.__wrapped__)
    assert common_llvm.this_processor().lanes == lanes
    told = dispatch.llvm_obstacle.__wrapped__()
    assert told == (None if lanes else "this processor has none of AVX-512, AVX2 with FMA, and NEON")


def test_without_llvm_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert dispatch.llvm_obstacle.__wrapped__() == "llvmlite is not installed"
