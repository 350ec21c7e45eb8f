"""The LLVM kernels: levels and depths against the modules that they are made from, and what kernels are made of."""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.kernels import dispatch

if reason := dispatch.llvm_obstacle():
    pytest.skip(f"LLVM kernels do not run here: {reason}", allow_module_level=True)

import llvmlite.binding as llvm

from gpupipe.kernels import common_llvm, kernel_llvm, levels_llvm, maps_llvm
from gpupipe.kernels.common_llvm import Processor, Writer, this_processor
from gpupipe.kernels.kernel_llvm import Kernel
from gpupipe.kernels.levels_llvm import Level, down_level, first_level, up_level
from gpupipe.kernels.maps_llvm import speech_depths, template_depths
from gpupipe.models import MODES, Mode
from gpupipe.models.hoisted import SpeechHalf, TemplateHalf

BOUND = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Allowed difference by type, as a share of the largest value: rounding."""

MARGIN = 64
"""Floats around a tensor that no kernel may touch."""


def processors() -> list[Processor]:
    """This one, and what else it can run: with vectors half as long, and fewer of them; in float16, too, for which an
    older one is compiled to compute in float32 and round; and in bfloat16."""
    found = [this_processor()]
    if found[0].lanes == 16:
        found.append(Processor("haswell", "", 8, 16))
    if this_processor(torch.float16).lanes:
        found.append(this_processor(torch.float16))
    elif found[0].lanes > 4:
        found.append(Processor("haswell", "", 16, 16, torch.float16))
    return [*found, this_processor(torch.bfloat16)]


def named(processor: Processor) -> str:
    return f"{processor.lanes} {str(processor.dtype).removeprefix('torch.')}"


@pytest.fixture(scope="module", params=processors(), ids=named)
def processor(request: pytest.FixtureRequest) -> Processor:
    if not request.param.lanes:
        pytest.skip(f"LLVM kernels do not run here: {dispatch.llvm_obstacle(request.param.dtype)}")
    return request.param


@pytest.fixture(scope="module", params=[1 / 8, 3 / 8], ids=["width 1/8", "width 3/8"])
def halves(request: pytest.FixtureRequest) -> tuple[TemplateHalf, SpeechHalf]:
    network = seeded_network(width=request.param)
    return TemplateHalf(network).eval(), SpeechHalf(network).eval()


def guarded(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Callable[[], None]]:
    """A tensor of NaN, and what fails if anything was written beside it."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 2 * MARGIN,), 7.0, dtype=dtype)
    inside = memory[MARGIN:-MARGIN].view(shape)
    inside.fill_(float("nan"))

    def check() -> None:
        assert (memory[:MARGIN] == 7).all() and (memory[-MARGIN:] == 7).all()

    return inside, check


def run(level: Level, inputs: Sequence[Tensor], *, dtype: torch.dtype | None = None) -> list[Tensor]:
    """What a level makes, of the type of what it reads if nothing else is said."""
    dtype = dtype or inputs[0].dtype
    outputs, checks = zip(*(guarded(shape, dtype) for shape in level.shapes), strict=True)
    scratch, check = guarded((level.kernel.scratch_bytes // 2,), torch.float16)
    level.kernel([*inputs, *outputs], scratch)
    for check_one in (check, *checks):
        check_one()
    return list(outputs)


def stored(planar: Tensor, processor: Processor, *, padded: bool = True) -> Tensor:
    """(1, C, H, W) as kernels take it: (H, W, C padded), the padding full of what must not matter."""
    pixels = planar[0].permute(1, 2, 0).to(processor.dtype)
    zeros = -pixels.shape[-1] % processor.lanes if padded else 0
    return nn.functional.pad(pixels, (0, zeros), value=float("nan")).contiguous()


def near(found: Tensor, expected: Tensor) -> bool:
    """Whether maps are the same up to rounding."""
    largest = float(expected.abs().max())
    assert largest > 0.01, "it must make something"
    return bool((found.float() - expected).abs().max() <= BOUND[found.dtype] * max(largest, 1))


def close(found: Tensor, planar: Tensor) -> bool:
    """Whether a padded map is what a module made, its padding 0."""
    expected, channels = planar[0].permute(1, 2, 0), planar.shape[1]
    return near(found[..., :channels], expected) and bool((found[..., channels:] == 0).all())


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("name", "size"), [("up1", 20), ("up2", 8), ("up3", 42), ("up4", 80)])
@torch.no_grad()
def test_a_level_of_the_decoder(name: str, size: int, halves: tuple[object, SpeechHalf], processor: Processor) -> None:
    up = getattr(halves[1], name)
    low, skip = noise(1, up.low.in_channels, size // 2, size // 2), noise(1, up.skip.in_channels, size, size)
    read = stored(low, processor)
    (found,) = run(up_level(up, size, processor=processor), [read, stored(skip, processor)])
    assert close(found, up(low, skip))
    assert not close(found, up(low, skip.flip(2)))
    assert not close(found, up(low.flip(3), skip))
    level = up_level(up, size, skip_padded=False, processor=processor)
    assert torch.equal(*run(level, [read, stored(skip, processor, padded=False)]), found)


@pytest.mark.parametrize(("name", "size"), [("down2", 10), ("down3", 21), ("down4", 20)])
@torch.no_grad()
def test_a_level_of_the_encoder(
    name: str, size: int, halves: tuple[TemplateHalf, object], processor: Processor
) -> None:
    down = getattr(halves[0], name)
    x = noise(1, next(down.parameters()).shape[1], 2 * size, 2 * size)
    (found,) = run(down_level(down, size, processor=processor), [stored(x, processor)])
    assert close(found, down(x))
    assert not close(found, down(x.flip(2)))


@torch.no_grad()
def test_the_encoder_s_depths(halves: tuple[TemplateHalf, object], processor: Processor) -> None:
    template = halves[0]
    x5 = noise(1, next(template.down5.parameters()).shape[1], 20, 20)
    (found,) = run(template_depths(template, processor=processor), [stored(x5, processor)])
    assert close(found, template.bottleneck(template.down5(x5)))
    assert not close(found, template.bottleneck(template.down5(x5.flip(3))))


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_the_speech_s_depths(mode: Mode, processor: Processor) -> None:
    """Channels at width 3/8 are summed in one block of inputs, in two, and in more."""
    speech = SpeechHalf(seeded_network(mode, width=3 / 8)).eval()
    audio, bottleneck = noise(1, *speech.audio_shape), noise(1, speech.audio_expand.out_channels, 10, 10)
    level = speech_depths(speech, processor=processor)
    (found,) = run(level, [stored(audio, processor), stored(bottleneck, processor)])
    assert close(found, speech.deepest(bottleneck, audio))
    assert not close(found, speech.deepest(bottleneck.flip(2), audio))
    assert not close(found, speech.deepest(bottleneck, audio.flip(2)))


@torch.no_grad()
def test_the_upsampling_aligns_corners(halves: tuple[object, SpeechHalf]) -> None:
    up, here = copy.deepcopy(halves[1].up3), this_processor()
    low, skip = noise(1, up.low.in_channels, 20, 20), noise(1, up.skip.in_channels, 40, 40)
    (found,) = run(up_level(up, 40, processor=here), [stored(low, here), stored(skip, here)])
    up.up.align_corners = False
    assert not close(found, up(low, skip))


@torch.no_grad()
def test_the_last_level_makes_the_mouth(halves: tuple[object, SpeechHalf], processor: Processor) -> None:
    up, head, size = halves[1].up5, halves[1].outc.conv, 64
    low, skip = noise(1, up.low.in_channels, size // 2, size // 2), noise(1, up.skip.in_channels, size, size)
    level = up_level(up, size, skip_padded=False, head=head, processor=processor)
    (found,) = run(level, [stored(low, processor), stored(skip, processor, padded=False)], dtype=torch.float32)
    mouth = torch.sigmoid(head(up(low, skip)))[0]
    assert (found - mouth).abs().max() <= BOUND[processor.dtype]
    assert (found - mouth.flip(0)).abs().max() > 0.1, "its channels differ"


@torch.no_grad()
def test_the_first_level_makes_what_the_first_block_makes_too(
    halves: tuple[TemplateHalf, object], processor: Processor
) -> None:
    template, size = halves[0], 24
    image = noise(1, 6, 2 * size, 2 * size)
    level = first_level(template.hidden, template.down1, size, processor=processor)
    hidden, x2 = run(level, [image[0].to(processor.sums)], dtype=processor.dtype)
    expected = template.hidden(image)
    assert near(hidden, expected[0].permute(1, 2, 0))
    assert close(x2, template.down1(expected))
    assert not close(x2, template.down1(expected.flip(2)))


@torch.no_grad()
def test_a_wrong_number_is_seen_as_such(halves: tuple[TemplateHalf, object]) -> None:
    """A NaN spreads to the rows that read it, and to no others."""
    image = noise(1, 6, 40, 40)
    image[0, 0, 20, 20] = float("nan")
    level = first_level(halves[0].hidden, halves[0].down1, 20, processor=this_processor())
    hidden, x2 = run(level, [image[0]])
    rows = [found.isnan().flatten(1).any(dim=1).nonzero().flatten().tolist() for found in (hidden, x2)]
    assert rows == [[19, 20, 21], [8, 9, 10, 11, 12]], (
        "x2's rows 9 to 11 read those of hidden, and make their neighbours"
    )


@pytest.mark.skipif(not this_processor(torch.bfloat16).lanes, reason="this processor does not multiply in bfloat16")
@torch.no_grad()
def test_sums_of_bfloat16_are_not_rounded_on_their_way() -> None:
    """At full width, where they lie in memory between groups of inputs. If they were rounded there, errors would be
    1.3 % in place of 0.8, and 0.9 in place of 0.45."""
    speech, here = SpeechHalf(seeded_network(width=1)).eval(), this_processor(torch.bfloat16)
    audio, bottleneck = noise(1, *speech.audio_shape), noise(1, speech.audio_expand.out_channels, 10, 10)
    low, skip = noise(1, speech.up1.low.in_channels, 10, 10), noise(1, speech.up1.skip.in_channels, 20, 20)
    for level, inputs, expected, bound in (
        (speech_depths(speech, processor=here), (audio, bottleneck), speech.deepest(bottleneck, audio), 0.0105),
        (up_level(speech.up1, 20, processor=here), (low, skip), speech.up1(low, skip), 0.0065),
    ):
        (found,) = run(level, [stored(one, here) for one in inputs])
        error = found[..., : expected.shape[1]].float() - expected[0].permute(1, 2, 0)
        assert error.square().mean().sqrt() < bound * expected.square().mean().sqrt()


X86, ARM = ("x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu")
ZMM, YMM, Q = (r"%zmm\d+, -?\d*\(%rsp\)", r"%ymm\d+, -?\d*\(%rsp\)", r"st[rp]\tq.*\[sp")
MACHINES = {
    "AVX-512": (X86, Processor("sapphirerapids", "", 16, 32), ZMM, 0),
    "AVX512-FP16": (X86, Processor("sapphirerapids", "", 32, 32, torch.float16), ZMM, 3),
    "AVX512-BF16": (X86, Processor("znver4", "", 16, 32, torch.bfloat16), ZMM, 0),
    "AVX2": (X86, Processor("haswell", "", 8, 16), YMM, 6),
    "NEON": (ARM, Processor("neoverse-v1", "+neon", 4, 32), Q, 3),
    "NEON, float16": (ARM, Processor("neoverse-v1", "+neon,+fullfp16", 8, 32, torch.float16), Q, 4),
}
"""Machines to compile for: triple, processor, how a vector is written to the stack, and how often that may be.

Outside the loops over channels: taps of depthwise convolutions, which sixteen registers do not hold beside the sums,
and what sums in pairs are added to."""


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("level", ["first", "up4", "depths"])
def test_sums_stay_in_registers(name: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At full width; and nothing is called, as the C library's fma would be where the processor has none."""
    triple, processor, spill, most = MACHINES[name]
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(triple).create_target_machine(processor.name, processor.features, jit=True)
    network, plans = seeded_network(width=1), []
    for module in (levels_llvm, maps_llvm):
        monkeypatch.setattr(module, "Kernel", lambda plan, *_: plans.append(plan))

    def assembled(processor: Processor) -> str:
        template = TemplateHalf(network)
        if level == "first":
            first_level(template.hidden, template.down1, 160, processor=processor)
        elif level == "depths":
            template_depths(template, processor=processor)
        else:
            up_level(SpeechHalf(network).up4, 160, processor=processor)
        return target.emit_assembly(kernel_llvm._improved(plans[-1].write(processor).finish(), target))

    assembly = assembled(processor)
    assert not re.search(r"\t(call|bl)\w*\t", assembly)
    assert len(re.findall(spill, assembly)) <= most
    too_many = replace(processor, registers=2 * processor.registers)
    assert len(re.findall(spill, assembled(too_many))) > 10 + most, "of tiles for registers that there are not"


@dataclass(frozen=True)
class Sigmoid:
    """A kernel of one stage: the sigmoid of so many values."""

    size: int
    maps: int = 2

    def write(self, processor: Processor) -> Writer:
        w = Writer(processor, self.maps)
        source, target = w.maps
        with w.loop(0, self.size, w.lanes) as i:
            w.store(w.sigmoid(w.load(w.at(source, i))), w.at(target.to(torch.float32), i))
        return w


@dataclass(frozen=True)
class Transposed:
    """A kernel of one stage: a row of (lanes, 3) to three vectors, each without its last two lanes."""

    maps: int = 2

    def write(self, processor: Processor) -> Writer:
        w = Writer(processor, self.maps)
        source, target = w.maps[0].to(w.sums), w.maps[1]
        for channel in range(3):
            w.store(w.gather(w.at(source, channel), 3), w.at(target, channel * w.lanes), w.lanes - 2)
        return w


def test_sigmoid(processor: Processor) -> None:
    values = torch.cat([torch.linspace(-120, 120, 3200 - 4), torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])])
    values = values.to(processor.dtype)
    found, check = guarded(values.shape)
    Kernel(Sigmoid(len(values)), None, processor)([values, found])
    check()
    torch.testing.assert_close(found, torch.sigmoid(values.float()), rtol=1e-6, atol=1e-37, equal_nan=True)


def test_gathered_and_partly_stored(processor: Processor) -> None:
    lanes = processor.lanes
    values, found = torch.arange(3 * lanes, dtype=processor.sums), torch.zeros(3, lanes, dtype=processor.dtype)
    Kernel(Transposed(), None, processor)([values, found])
    expected = values.view(lanes, 3).T.clone()
    expected[:, -2:] = 0
    assert torch.equal(found.to(processor.sums), expected)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was compiled; the cache folder is a new one."""
    monkeypatch.setenv("GPUPIPE_CACHE", str(tmp_path / "cache"))
    compile_ = kernel_llvm._compiled
    sources: list[str] = []

    def noted(source: str, machine: object) -> bytes:
        sources.append(source)
        return compile_(source, machine)

    monkeypatch.setattr(kernel_llvm, "_compiled", noted)
    return sources


def sigmoid_of_one() -> float:
    found = torch.zeros(16)
    Kernel(Sigmoid(16), None, this_processor())([torch.ones(16), found])
    return round(float(found[0]), 4)


def test_a_kernel_is_compiled_once(compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert [sigmoid_of_one(), sigmoid_of_one()] == [0.7311, 0.7311]
    assert len(compiled) == 1
    for name, other in (("_sources", lambda plan: "others"), ("_PASSES", kernel_llvm._PASSES)):
        monkeypatch.setattr(kernel_llvm, name, other)
        sigmoid_of_one()
        assert len(compiled) == 2, "written by other code; and kept after that, too"
    assert len([*(tmp_path / "cache" / "llvm").glob("*.o")]) == 2


def test_a_plan_s_own_module_is_part_of_what_a_kernel_is_made_of(tmp_path: Path) -> None:
    """Wherever it lies."""
    digests = set()
    for number in range(2):
        path = tmp_path / f"plans_{number}.py"
        path.write_text(f"class Plan:\n    rounds = {number}\n")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        digests.add(kernel_llvm._sources(module.Plan))
        del sys.modules[path.stem]
    assert len(digests) == 2


def test_so_is_what_kernels_have_constants_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    digests = set()
    for number in range(2):
        (tmp_path / "nv12.py").write_text(f"FRACTION_BITS = {number}\n")
        monkeypatch.setattr(kernel_llvm, "__file__", str(tmp_path / "kernel_llvm.py"))
        kernel_llvm._sources.cache_clear()
        digests.add(kernel_llvm._sources(Sigmoid))
    kernel_llvm._sources.cache_clear()
    assert len(digests) == 2


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
    sigmoid_of_one()
    assert len(compiled) == 2 and len(caplog.records) == 1, "told once"


@pytest.mark.parametrize(
    ("features", "lanes", "float16_lanes", "bfloat16_lanes"),
    [
        ({"avx512f": True, "avx2": True, "fma": True, "avx512fp16": True, "avx512bf16": False}, 16, 32, 0),
        ({"avx512f": True, "avx2": True, "fma": True, "avx512fp16": False, "avx512bf16": True}, 16, 0, 16),
        ({"avx512f": False, "avx2": True, "fma": True, "avx512fp16": True, "avx512bf16": True}, 8, 0, 0),
        ({"avx2": True, "fma": False}, 0, 0, 0),
        ({"neon": True}, 4, 0, 0),
        ({"neon": True, "fullfp16": True, "bf16": True}, 4, 8, 0),
        ({}, 0, 0, 0),
    ],
)
def test_vectors_are_as_long_as_the_processor_s(
    features: dict[str, bool],
    lanes: int,
    float16_lanes: int,
    bfloat16_lanes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: llvm.FeatureMap(features))
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    monkeypatch.setattr(common_llvm, "this_processor", common_llvm.this_processor.__wrapped__)
    wanted = {
        torch.float32: (lanes, "this processor has none of AVX-512, AVX2 with FMA, and NEON"),
        torch.float16: (float16_lanes, "this processor does not multiply in float16, as with AVX512-FP16 or NEON"),
        torch.bfloat16: (bfloat16_lanes, "this processor does not multiply in bfloat16, as with AVX512-BF16"),
    }
    for dtype, (number, reason) in wanted.items():
        assert common_llvm.this_processor(dtype).lanes == number
        assert dispatch.llvm_obstacle.__wrapped__(dtype) == (None if number else reason)


@pytest.mark.parametrize(
    ("told", "lanes", "float16_lanes", "features"),
    [
        ({"neon": True, "fp16_arith": True, "bf16": True}, 4, 8, "+fullfp16,+lse,+neon"),
        ({"neon": True, "fp16_arith": False}, 4, 0, "+lse,+neon"),
        (None, 0, 0, "+lse"),  # PyTorch before 2.11
    ],
)
def test_torch_tells_what_llvm_does_not_find_on_arm(
    told: dict[str, bool] | None, lanes: int, float16_lanes: int, features: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: llvm.FeatureMap(lse=True))
    if told is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    found = [common_llvm.this_processor.__wrapped__(dtype) for dtype in (torch.float32, torch.float16)]
    assert [one.lanes for one in found] == [lanes, float16_lanes]
    monkeypatch.setattr(dispatch.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(common_llvm, "this_processor", common_llvm.this_processor.__wrapped__)
    why = dispatch.llvm_obstacle.__wrapped__(torch.float16)
    assert (why is None) == bool(float16_lanes)
    assert why is None or ("PyTorch tells from 2.11 on" in why) == (told is None)
    assert found[0].features == features


def test_without_llvm_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert dispatch.llvm_obstacle.__wrapped__() == "llvmlite is not installed"
