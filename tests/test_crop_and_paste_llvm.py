"""The LLVM kernels around the network: the same bits as plain torch, for every processor that can be tried here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from unittest import mock

import numpy as np
import pytest
import torch
from clips import mouths
from torch import Tensor

from gpupipe.kernels import crop_resize, dispatch, paste_blend
from gpupipe.landmarks import Box

if reason := dispatch.llvm_obstacle():
    pytest.skip(f"LLVM kernels do not run here: {reason}", allow_module_level=True)

import llvmlite.binding as llvm

from gpupipe.kernels import crop_resize_llvm, kernel_llvm, nv12_llvm, paste_blend_llvm
from gpupipe.kernels.common_llvm import Processor, this_processor
from gpupipe.kernels.kernel_llvm import Plan
from gpupipe.kernels.nv12 import to_nv12

WIDTH, HEIGHT = 640, 360
BOXES: list[Box] = [
    (150, 0, 332, 182),
    (151, 3, 184, 340),
    (608, 299, 640, 360),
    (0, 1, 640, 360),
    (0, 0, 328, 328),
    (3, 0, 500, 33),
    (100, 359, 300, 360),
    (150, 2, 333, 185),
]
"""From the narrowest that the kernels take to the whole frame, in every corner, with edges within 2×2 cells."""
NARROW: Box = (10, 20, 41, 51)

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
AVX2, AVX512 = Processor("haswell", "", 8, 16), Processor("sapphirerapids", "", 16, 32)
NEON = Processor("neoverse-v1", "+neon", 4, 32)


@pytest.fixture(params=["this processor", "with AVX2"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels for this processor, and for one with vectors half as long."""
    if request.param != "this processor":
        if this_processor().lanes != 16:
            pytest.skip("this processor has no longer vectors than AVX2")
        for module in (crop_resize_llvm, paste_blend_llvm):
            monkeypatch.setattr(module, "this_processor", lambda: AVX2)
    for module in (crop_resize_llvm, paste_blend_llvm):
        module._kernel.cache_clear()
    yield
    for module in (crop_resize_llvm, paste_blend_llvm):
        module._kernel.cache_clear()


@pytest.fixture(scope="module")
def frames() -> Tensor:
    """Noise, and full steps, which the cubic overshoots."""
    made = np.random.default_rng(0).integers(256, size=(2, HEIGHT, WIDTH, 3), dtype=np.uint8)
    made[1] = np.where(made[1] < 128, 0, 255)
    return torch.from_numpy(made)


def in_torch(module: object) -> mock._patch[mock.Mock]:
    return mock.patch.object(module, "backend", return_value="torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_crops_and_inputs_are_plain_torch_s(dtype: torch.dtype, frames: Tensor) -> None:
    boxes, index = torch.tensor(BOXES), torch.arange(len(BOXES)) % 2
    with mock.patch.object(crop_resize, "crop_resize", side_effect=AssertionError("plain torch ran")):
        found = crop_resize.crop_and_input(frames, index, boxes, dtype=dtype)
    with in_torch(crop_resize):
        expected = crop_resize.crop_and_input(frames, index, boxes, dtype=dtype)
        others = crop_resize.crop_and_input(frames, index[:1], boxes[:1] - torch.tensor([0, 0, 0, 1]))
    assert found[1].dtype == dtype
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(found[0][0], others[0][0]), "a row less"


def finished(
    frames: Tensor, box: Box, *, nv12: bool, feather: float, keep: Tensor | None, number: int = 1
) -> tuple[Tensor, Tensor]:
    """A frame as the kernels finish it, and as plain torch does."""
    index, boxes = torch.tensor([number]), torch.tensor([box])
    given = (mouths(1, number), crop_resize.crop_resize(frames, index, boxes), torch.tensor([0]), frames, index, boxes)
    background = (to_nv12(frames) if nv12 else frames)[number : number + 1]
    made = []
    for by in ("llvm", "torch"):
        memory = torch.full((background.numel() + 128,), 7, dtype=torch.uint8)
        out = memory[64:-64].view(background.shape)
        out.copy_(background)
        with mock.patch.object(paste_blend, "backend", return_value=by):
            paste_blend.paste_blend(*given, out, nv12=nv12, feather=feather, keep=keep)
        assert (memory[:64] == 7).all() and (memory[-64:] == 7).all(), "it wrote beside the frame"
        assert not torch.equal(out, background)
        made.append(out)
    return made[0], made[1]


@pytest.mark.parametrize("nv12", [False, True], ids=["bgr", "nv12"])
@pytest.mark.parametrize(("feather", "kept"), [(0.0, False), (8.0, False), (0.0, True), (40.0, True)])
@pytest.mark.parametrize("box", BOXES)
def test_finished_frames_are_plain_torch_s(box: Box, feather: float, kept: bool, nv12: bool, frames: Tensor) -> None:
    keep = torch.rand(frames.shape[:3], generator=torch.Generator().manual_seed(1)) < 0.3 if kept else None
    with mock.patch.object(paste_blend, "_finish", wraps=paste_blend._finish) as plain:
        found, expected = finished(frames, box, nv12=nv12, feather=feather, keep=keep)
    assert plain.call_count == 1, "plain torch ran once, to compare with"
    assert torch.equal(found, expected)


def test_what_differs_by_a_step_is_noticed(frames: Tensor) -> None:
    found, _ = finished(frames, BOXES[0], nv12=True, feather=8.0, keep=None)
    for other in ({"feather": 8.5}, {"feather": 8.0, "number": 0}):
        _, expected = finished(frames, BOXES[0], **({"nv12": True, "keep": None} | other))  # type: ignore[arg-type]
        assert not torch.equal(found, expected)


@pytest.mark.parametrize(
    ("triple", "processor"), [(X86, AVX2), (X86, AVX512), (ARM, NEON)], ids=["AVX2", "AVX-512", "NEON"]
)
def test_they_compile_to_instructions_alone(triple: str, processor: Processor) -> None:
    """Nothing is called, as the C library's functions would be where a processor has no instruction."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(triple).create_target_machine(processor.name, processor.features, jit=True)
    plans: list[Plan] = [nv12_llvm._ToNv12(WIDTH, HEIGHT), nv12_llvm._FromNv12(WIDTH, HEIGHT)]
    plans += [crop_resize_llvm._Plan(WIDTH, dtype) for dtype in (torch.float32, torch.float16)]
    plans += [paste_blend_llvm._Plan(HEIGHT, WIDTH, *how) for how in product((False, True), repeat=3)]
    for plan in plans:
        assembly = target.emit_assembly(kernel_llvm._improved(plan.write(processor).finish(), target))
        assert "kernel:" in assembly
        assert not re.search(r"\t(call|bl)\w*\t", assembly), plan


def test_what_kernels_do_not_take_is_done_in_torch(frames: Tensor) -> None:
    """A narrow box; frames that are not contiguous; mouths in bytes."""
    index, boxes = torch.tensor([0]), torch.tensor([NARROW])
    assert not crop_resize_llvm.takes(frames, boxes, torch.float32)
    crops, image = crop_resize.crop_and_input(frames, index, boxes)
    assert torch.equal(crops, crop_resize.crop_resize(frames, index, boxes))
    found, expected = finished(frames, NARROW, nv12=True, feather=8.0, keep=None)
    assert torch.equal(found, expected)
    wide = torch.tensor(BOXES[:1])
    assert crop_resize_llvm.takes(frames, wide, torch.float32)
    assert not crop_resize_llvm.takes(frames[:, :, ::2], wide, torch.float32)
    assert not crop_resize_llvm.takes(frames, wide, torch.bfloat16)
    given = (crops, frames, wide, frames, None)
    assert paste_blend_llvm.takes(image[:, :3].contiguous(), *given)
    assert not paste_blend_llvm.takes(image[:, :3].byte(), *given)
    assert not paste_blend_llvm.takes(image[:, ::2], *given)
