"""The Gluon kernels, compiled where Triton is new enough and run where it is not.

``python -m gpupipe.benchmarks.gluon_cubins build FOLDER [--arch 90] [--block NAME …]`` compiles the whole-block kernels
(no GPU needed) and writes each as a ``.cubin``, with what a launch must know in ``manifest.json``.
``python -m gpupipe.benchmarks.gluon_cubins run FOLDER [--batch 64] [--record]`` loads them through the CUDA driver
(cuda-bindings), compares each with the plain reference on maps of the network's own size, and times it beside the same
three convolutions in eager PyTorch, half precision, channels last. Last it times the two halves of the network in the
`gluon` engine on these kernels, once their mouths have been compared with the plain network's.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpupipe.benchmarks.common import Row, add_record_options, commit, tuned
from gpupipe.benchmarks.kernel_bench import rows_of, tell
from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.engines.gluon import GluonEngine
from gpupipe.kernels.whole_block import PackedBlock, PackedHead, bytes_moved, pack_head, pack_whole_block, whole_block
from gpupipe.models.unet328 import random_inputs

MANIFEST = "manifest.json"

LARGEST_ERROR, MEAN_ERROR = 1e-2, 4e-4
"""Bounds for a float16 map beside the float32 reference, on values of 0 to about 6; tests bound small maps likewise."""

CHECKED_SAMPLES = 3

EQUAL_VALUES = 0.97
"""Share of a mouth's values that must equal the reference's; the others may be one step away."""

MOUTH_ERROR = 1.5
"""Bound for the root mean square error of the whole network's mouths, in steps of 255: it allows for half precision and
truncation, with seeded weights."""


# ── build ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def build(folder: Path, arch: int, blocks: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Compile for compute capability ``arch`` / 10 and write cubins and manifest into ``folder``.

    Raises:
        RuntimeError: a kernel does not compile, spills, or takes other parameters than its launch would pass.
    """
    import triton

    from gpupipe.kernels.report import compile_variant, compiled_kernel
    from gpupipe.kernels.report_gluon import BLOCKS, variant_of
    from gpupipe.kernels.whole_block_gluon import TILE

    folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for name in blocks or BLOCKS:
        for variant in (variant_of(name, wgmma=False), variant_of(name, wgmma=True)):
            if variant.architectures is not None and arch not in variant.architectures:
                continue
            row = compile_variant(variant, arch)
            if not row.clean:
                reason = row.error or f"{row.stack} bytes of stack, {row.spills} spilled"
                raise RuntimeError(f"{variant.config}: {reason}")
            kernel = compiled_kernel(variant, arch)
            arguments = [one for one in variant.kernel.arg_names if one not in variant.constants]
            check_parameters(kernel, arguments)
            file = f"{len(entries):02d}-sm_{arch}.cubin"
            (folder / file).write_bytes(kernel.asm["cubin"])
            entries.append(
                {
                    "file": file,
                    "config": variant.config,
                    "symbol": kernel.metadata.name,
                    "arguments": arguments,
                    "shared_bytes": kernel.metadata.shared,
                    "num_warps": variant.num_warps,
                    "tile": TILE,
                    "block": dataclasses.asdict(BLOCKS[name]),
                    "registers": row.registers,
                }
            )
    facts = {"arch": arch, "triton": triton.__version__, "commit": commit(), "kernels": entries}
    (folder / MANIFEST).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return entries


def check_parameters(kernel: Any, arguments: Sequence[str]) -> None:
    """Raise unless the compiled kernel takes a pointer for each argument and Triton's two scratch pointers, unused."""
    entry = kernel.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0]
    pointers = entry.count(".param .u64")
    scratch = (kernel.metadata.global_scratch_size, kernel.metadata.profile_scratch_size)
    if pointers != entry.count(".param") or pointers != len(arguments) + 2 or any(scratch):
        raise RuntimeError(
            f"{kernel.metadata.name} takes {entry.count('.param')} parameters, {pointers} of them pointers, and "
            f"scratch of {scratch} bytes; expected {len(arguments)} pointers, two more, and no scratch"
        )


# ── run ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def packed_arguments(pointers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Values of a launch's parameters, and their addresses, which the driver wants; both must outlive the launch.

    The last two are null pointers: Triton's scratch memory, which these kernels do not use.
    """
    values = np.array([*pointers, 0, 0], dtype=np.uint64)
    return values, values.ctypes.data + values.itemsize * np.arange(len(values), dtype=np.uint64)


class Cubin:
    """A kernel from a folder that :func:`build` made, on the current CUDA device."""

    def __init__(self, folder: Path, entry: dict[str, Any]) -> None:
        self._driver = importlib.import_module("cuda.bindings.driver")
        self._entry = entry
        torch.cuda.current_stream().synchronize()  # makes torch's context, which is the driver's current one
        self._image = (folder / entry["file"]).read_bytes()
        self._module = self._done(self._driver.cuModuleLoadData(self._image))
        self._function = self._done(self._driver.cuModuleGetFunction(self._module, entry["symbol"].encode()))
        attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._done(self._driver.cuFuncSetAttribute(self._function, attribute, entry["shared_bytes"]))

    def launch(self, grid: tuple[int, int], tensors: dict[str, Tensor]) -> None:
        """Launch on torch's current stream; ``tensors`` by the names of the kernel's arguments."""
        _values, addresses = packed_arguments([tensors[name].data_ptr() for name in self._entry["arguments"]])
        threads, stream = 32 * self._entry["num_warps"], torch.cuda.current_stream().cuda_stream
        sizes = (*grid, 1, threads, 1, 1, self._entry["shared_bytes"])
        self._done(self._driver.cuLaunchKernel(self._function, *sizes, stream, addresses.ctypes.data, 0))

    def _done(self, answer: Any) -> Any:
        status, *values = answer
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{self._entry['config']}: the CUDA driver says {status!r}")
        return values[0] if values else None


@dataclasses.dataclass(frozen=True)
class Case:
    """A block's input: weights and maps."""

    block: PackedBlock
    head: PackedHead | None
    skip: Tensor
    low: Tensor | None
    index: Tensor | None

    def expected(self) -> Tensor:
        """The plain reference's result."""
        return whole_block(self.skip, self.block, low=self.low, index=self.index, head=self.head)

    def empty(self) -> Tensor:
        """Room for the result."""
        batch = len(self.skip if self.index is None else self.index)
        edge = self.skip.shape[1]
        if self.head is None:
            return self.skip.new_empty(batch, edge, edge, self.block.out_channels)
        return self.skip.new_empty(batch, 3, edge, edge, dtype=torch.uint8)

    def tensors(self, out: Tensor) -> dict[str, Tensor]:
        """What the kernels take, by the names of their arguments."""
        given = {"skip": self.skip, "low": self.low, "index": self.index, "out": out}
        given |= {name: getattr(self.block, name) for name in ("expand", "expand_bias", "depthwise", "project")}
        given |= {"project_bias": self.block.project_bias}
        if self.head is not None:
            given |= {"head": self.head.weight, "head_bias": self.head.bias}
        return {name: value for name, value in given.items() if value is not None}


class Cubins:
    """:func:`~gpupipe.kernels.whole_block.whole_block`, run by a folder's kernels.

    Where a block has two, the later one is used: it multiplies with wgmma.
    """

    def __init__(self, folder: Path, entries: Sequence[dict[str, Any]]) -> None:
        self._kernels = {frozenset(entry["block"].items()): (entry, Cubin(folder, entry)) for entry in entries}

    def __call__(
        self,
        skip: Tensor,
        block: PackedBlock,
        *,
        low: Tensor | None = None,
        index: Tensor | None = None,
        head: PackedHead | None = None,
    ) -> Tensor:
        case = Case(block, head, skip, low, index)
        shape = {"size": skip.shape[1], "low": block.low_channels, "skip": block.skip_channels}
        shape |= {"hidden": block.hidden_channels, "out": block.out_channels}
        shape |= {"residual": block.residual, "head": head is not None}
        entry, kernel = self._kernels[frozenset(shape.items())]
        out = case.empty()
        kernel.launch(grid_of(entry, len(out)), case.tensors(out))
        return out


def case_of(entry: dict[str, Any], batch: int, device: torch.device) -> Case:
    """The input for an entry of the manifest: fixed random weights that keep values near 1, and normal noise."""
    shape = entry["block"]
    low, skip, hidden, out = (shape[name] for name in ("low", "skip", "hidden", "out"))
    torch.manual_seed(0)
    layers = [_layer(low + skip, hidden, 1), _layer(hidden, hidden, 3, hidden), _layer(hidden, out, 1)]
    block = pack_whole_block(*layers, low_channels=low, residual=shape["residual"]).to(device)
    head = pack_head(_layer(out, 3, 1)).to(device) if shape["head"] else None
    size = shape["size"]

    def noise(edge: int, channels: int) -> Tensor:
        return torch.randn(batch, edge, edge, channels, dtype=torch.float16, device=device)

    index = torch.randperm(batch, device=device) if low else None
    return Case(block, head, noise(size, skip), noise(size // 2, low) if low else None, index)


def _layer(inputs: int, outputs: int, kernel: int, groups: int = 1) -> nn.Conv2d:
    made = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)
    nn.init.normal_(made.weight, std=(inputs // groups * kernel**2) ** -0.5)
    nn.init.normal_(made.bias, std=0.3)  # type: ignore[arg-type]
    return made.requires_grad_(False)


def grid_of(entry: dict[str, Any], batch: int) -> tuple[int, int]:
    """How many programs a launch has."""
    edge = entry["block"]["size"]
    rows, columns = entry["tile"]
    return math.ceil(edge / rows) * math.ceil(edge / columns), batch


def check(found: Tensor, expected: Tensor) -> None:
    """Raise ``AssertionError`` unless a kernel's result equals the reference's within the bounds above."""
    error = (found.float() - expected.float()).abs()
    largest, mean, equal = error.max().item(), error.mean().item(), (error == 0).float().mean().item()
    if found.dtype == torch.uint8:
        good, bound = largest <= 1 and equal >= EQUAL_VALUES, f"1 and {EQUAL_VALUES:.0%} equal"
    else:
        good, bound = largest <= LARGEST_ERROR and mean <= MEAN_ERROR, f"{LARGEST_ERROR} and {MEAN_ERROR} on average"
    if not good:
        raise AssertionError(f"errors of {largest:.4g}, {mean:.3g} on average, {equal:.2%} equal; expected {bound}")


def eager(case: Case) -> Tensor:
    """The block as PyTorch would run it: convolutions in half precision, channels last."""
    block = case.block
    x = (case.skip if case.index is None else case.skip.index_select(0, case.index)).permute(0, 3, 1, 2)
    entry = x
    if case.low is not None:
        up = F.interpolate(case.low.permute(0, 3, 1, 2), scale_factor=2, mode="bilinear", align_corners=True)
        entry = torch.cat([up, x], dim=1)
    y = F.conv2d(entry, block.expand[:, :, None, None], block.expand_bias[:, 0]).relu_()
    taps = block.depthwise[:9].t().reshape(block.hidden_channels, 1, 3, 3)
    y = F.conv2d(y, taps, block.depthwise[9], padding=1, groups=block.hidden_channels).relu_()
    y = F.conv2d(y, block.project[:, :, None, None], block.project_bias.half())
    if block.residual:
        y = y + x
    if case.head is None:
        return y
    y = F.conv2d(y, case.head.weight[:3, :, None, None], case.head.bias[:3].half())
    return (torch.sigmoid(y) * 255).to(torch.uint8)


def checked(folder: Path, entry: dict[str, Any], device: torch.device) -> Cubin:
    """The kernel, after a check on a small batch: it gives the reference's result, and not a block's without its bias.

    Raises:
        AssertionError: the check fails.
        RuntimeError: the driver refuses it.
    """
    kernel, case = Cubin(folder, entry), case_of(entry, CHECKED_SAMPLES, device)
    expected = case.expected()
    out = case.empty().fill_(77 if case.head is not None else math.nan)
    kernel.launch(grid_of(entry, CHECKED_SAMPLES), case.tensors(out))
    torch.cuda.synchronize(device)
    check(out, expected)
    unbiased = dataclasses.replace(case.block, expand_bias=torch.zeros_like(case.block.expand_bias))
    try:
        check(out, dataclasses.replace(case, block=unbiased).expected())
    except AssertionError:
        return kernel
    raise AssertionError("the result is as near to a block without expand's bias: the check proves nothing")


def run(folder: Path, device: torch.device, batch: int, rounds: int) -> Iterator[list[Row]]:
    """Check and time every kernel of ``folder``; one that is wrong or fails is a row with an error."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    capability = torch.cuda.get_device_capability(device)
    if capability != divmod(manifest["arch"], 10):
        raise SystemExit(f"{folder} is for sm_{manifest['arch']}; this device has compute capability {capability}")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    timed: set[str] = set()
    for entry in manifest["kernels"]:
        case, size = case_of(entry, batch, device), entry["block"]["size"]
        launch = _launcher(folder, entry, device, grid_of(entry, batch), case.tensors(case.empty()))
        kernels: dict[str, Callable[[], object]] = {"gluon": launch}
        described = str(entry["block"])
        if described not in timed:  # once for both kernels of a block
            timed.add(described)
            kernels["torch"] = tuned(partial(eager, case))
        for provider, function in kernels.items():
            facts = {"case": entry["config"], "registers": entry["registers"], "triton": manifest["triton"]}
            yield rows_of(
                "whole_block",
                provider,
                function,
                frames=batch,
                bytes_a_frame=bytes_moved(case.block, (size, size), head=case.head is not None),
                config=facts | {"compiled_at": manifest["commit"]},
                device=device,
                rounds=rounds,
            )


def check_mouths(found: Tensor, expected: Tensor) -> None:
    """Raise ``AssertionError`` unless mouths, uint8 (B, 3, 320, 320), match the network's, in (0, 1), one by one."""

    def off(expected: Tensor) -> float:
        return float((found.float() + 0.5 - 255 * expected).square().mean().sqrt())

    if not off(expected) <= MOUTH_ERROR:
        raise AssertionError(f"mouths are {off(expected):.3g} steps of 255 off; expected {MOUTH_ERROR} at most")
    if not off(expected.roll(1, 0)) > MOUTH_ERROR:
        raise AssertionError("mouths are as near to those of other samples: the check proves nothing")


def run_halves(folder: Path, device: torch.device, batch: int, rounds: int) -> Iterator[list[Row]]:
    """Time the full-width network's halves on the kernels of ``folder``, once their mouths have passed the check.

    The bytes are the fewest that a half can move: image, features, mouth.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    network = seeded_network(width=1)
    image, audio = (value.to(device, torch.float16) for value in random_inputs(network, batch))
    image, index = image.contiguous(memory_format=torch.channels_last), torch.arange(batch, device=device)
    facts = {"triton": manifest["triton"], "compiled_at": manifest["commit"]}
    halves: dict[str, tuple[Callable[[], object], int]]
    try:
        engine = GluonEngine(network, device=device, run=Cubins(folder, manifest["kernels"]))
        features = engine.encode(image)
        few = slice(CHECKED_SAMPLES)
        found = engine.decode(features, index[few], audio[few])
        check_mouths(found, network.to(device)(image[few].float(), audio[few].float()))
        kept = sum(value[0].nbytes for value in features.values())
        halves = {
            "template half": (lambda: engine.encode(image), image[0].nbytes + kept),
            "speech half": (lambda: engine.decode(features, index, audio), kept + found[0].nbytes),
        }
    except (AssertionError, KeyError, RuntimeError) as error:
        halves = {"both halves": (partial(_raise, error), 0)}
    for name, (function, moved) in halves.items():
        yield rows_of(
            "whole_block",
            "gluon",
            function,
            frames=batch,
            bytes_a_frame=moved,
            config=facts | {"case": name},
            device=device,
            rounds=rounds,
        )


def _launcher(
    folder: Path, entry: dict[str, Any], device: torch.device, grid: tuple[int, int], tensors: dict[str, Tensor]
) -> Callable[[], object]:
    """A launch to time; where the check failed, one that raises its error."""
    try:
        kernel = checked(folder, entry, device)
    except (AssertionError, RuntimeError) as error:
        return partial(_raise, error)
    return partial(kernel.launch, grid, tensors)


def _raise(error: Exception) -> None:
    raise error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="compile; no GPU needed")
    building.add_argument("folder", type=Path)
    building.add_argument("--arch", type=int, default=90, help="compute capability, times ten")
    building.add_argument("--block", nargs="+", metavar="NAME", help="only these blocks")
    running = commands.add_parser("run", help="check and time on the GPU")
    running.add_argument("folder", type=Path)
    running.add_argument("--batch", type=int, default=64)
    running.add_argument("--rounds", type=int, default=10)
    add_record_options(running)
    options = parser.parse_args(arguments)
    if options.command == "build":
        for entry in build(options.folder, options.arch, options.block):
            print(
                f"{entry['file']}  {entry['config']:32} {entry['registers']} registers, {entry['shared_bytes']} bytes"
            )
        return 0
    with torch.inference_mode():
        wanted = (options.folder, torch.device("cuda"), options.batch, options.rounds)
        made = itertools.chain(run(*wanted), run_halves(*wanted))
        return int(tell(made, options.results if options.record else None))


if __name__ == "__main__":
    sys.exit(main())
