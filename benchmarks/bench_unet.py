"""The network alone: gpupipe's engines beside their peers, with nothing cached and with the template's half cached.

    python -m gpupipe.benchmarks.bench_unet [--width 1] [--rounds 20] [--device cuda] [--batch 1 8 …]
        [--precision float16 …] [--engine fused …] [--record]

On a CPU, in float32: eager PyTorch, and ONNX Runtime on the whole network as ``gpupipe export`` writes it, each with
all cores on one frame; ONNX Runtime again with one frame to each core; and gpupipe's `onnxruntime` and `llvm` engines
as a render runs them, side by side in lanes; `llvm` in float16 and bfloat16, too, where the processor has them.

On CUDA: each engine × precision × batch, in the order given, replayed as CUDA graphs; rows are written as soon as they
are measured. ``--engine onnxruntime`` adds ONNX Runtime's CUDA and TensorRT providers on the whole network, where they
are installed.

Providers take turns within a round, so that a noisy neighbour favours none.

Weights and inputs are random but fixed. Two rows go with each time. ``operations`` is the achieved operations a second:
a multiply-add counts as two, and what is counted is the network as trained, even where an engine saves some.
``layerwise_floor`` compares with the time that reading and writing every layer's input and output once would take at
the device's measured copy bandwidth, batch norms folded: running layer by layer cannot be faster.
"""

from __future__ import annotations

import argparse
import io
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gpupipe.benchmarks.common import Row, Spread, add_record_options, append_rows, device_name, row, timed, tuned
from gpupipe.benchmarks.floors import operations_of
from gpupipe.benchmarks.kernel_bench import copy_bandwidth
from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.engines import Engine, EngineName, Precision, make_engine
from gpupipe.engines.choice import LOWER_ON_CPU, find_dtype
from gpupipe.engines.declared import DECLARED, candidates
from gpupipe.engines.llvm_cpu import LlvmEngine
from gpupipe.engines.onnxruntime_cpu import OnnxRuntimeEngine
from gpupipe.errors import DeviceError, first_line
from gpupipe.graphs import replayed
from gpupipe.kernels import dispatch
from gpupipe.lanes import available_cores, map_in_lanes
from gpupipe.models import MODES, UNet328
from gpupipe.models.fold import fold_batch_norms
from gpupipe.models.unet328 import INPUT_SIZE, random_inputs
from gpupipe.onnx_export import export_onnx, export_unet
from gpupipe.quiet_onnxruntime import onnxruntime

WARMUP = 2
BATCHES = (1, 8, 32, 64, 128)
PRECISIONS: tuple[Precision, ...] = ("float16", "bfloat16", "float32")
_CUDA = {"prefer_nhwc": "1", "cudnn_conv_algo_search": "EXHAUSTIVE"}
PEERS: dict[Precision, dict[str, dict[str, str]]] = {
    "float16": {"CUDAExecutionProvider": _CUDA, "TensorrtExecutionProvider": {"trt_fp16_enable": "1"}},
    "float32": {"CUDAExecutionProvider": _CUDA, "TensorrtExecutionProvider": {}},
}
"""ONNX Runtime's providers for a GPU, with the options that make them fastest, by precision."""
_SIDE_BY_SIDE = 2
"""Frames that each lane takes in one call."""


@dataclass
class Contestant:
    """One way to run the network.

    Attributes:
        run: one call.
        frames: how many frames a call paints.
        facts: what a row's ``config`` says of it alone.
        cached: the template's half is not part of the call.
        peak_bytes: the most that PyTorch allocated for it on a GPU: weights, inputs, and what a call needs besides.
    """

    name: str
    run: Callable[[], object]
    frames: int
    facts: dict[str, Any]
    cached: bool = False
    peak_bytes: int | None = None


# ── who takes part ────────────────────────────────────────────────────────────────────────────────────────────────────


def on_cpu(network: UNet328) -> list[Contestant]:
    """Everybody at batch 1, which loses nothing on CPU cores."""
    image, audio = _inputs(network, 1, torch.device("cpu"))
    inputs = {"image": image.numpy(), "audio": audio.numpy()}
    with tempfile.TemporaryDirectory() as folder:
        graph = export_unet(network, Path(folder) / "unet.onnx").read_bytes()
    cores = available_cores()
    whole, narrow = _session(graph, cores), _session(graph, 1)
    eager = make_engine(network, device=torch.device("cpu"), engine="eager")
    index = torch.tensor([0])
    eager_features = eager.encode(image)

    def side_by_side(function: Callable[[], object]) -> tuple[Callable[[], object], int]:
        frames = _SIDE_BY_SIDE * cores
        return lambda: list(map_in_lanes(lambda _: function(), range(frames))), frames

    def in_lanes(engine: Engine, told: dict[str, Any]) -> list[Contestant]:
        features = engine.encode(image)
        uncached = side_by_side(lambda: engine.decode(engine.encode(image), index, audio))
        cached = side_by_side(lambda: engine.decode(features, index, audio))
        return [Contestant(engine.name, *uncached, told), Contestant(engine.name, *cached, told, cached=True)]

    everything = side_by_side(lambda: narrow.run(None, inputs))
    lower: list[Contestant] = []
    for precision in LOWER_ON_CPU:
        dtype = getattr(torch, precision)
        if dispatch.llvm_obstacle(dtype) is None:
            lower += in_lanes(LlvmEngine(network, dtype=dtype), {"precision": precision})
    told = {"precision": "float32"}
    return [
        Contestant("eager, as trained", lambda: network(image, audio), 1, told),
        Contestant("eager", lambda: eager.decode(eager.encode(image), index, audio), 1, told),
        Contestant("eager", lambda: eager.decode(eager_features, index, audio), 1, told, cached=True),
        Contestant("ONNX Runtime, whole network", lambda: whole.run(None, inputs), 1, told),
        Contestant("ONNX Runtime, whole network, a frame a core", *everything, told),
        *in_lanes(OnnxRuntimeEngine(network), told),
        *(in_lanes(LlvmEngine(network), told) if dispatch.llvm_obstacle() is None else []),
        *lower,
    ]


def on_cuda(
    network: UNet328, device: torch.device, batch: int, precision: Precision, engines: Sequence[EngineName]
) -> list[Contestant]:
    """Those of ``engines`` that support a precision, at one batch size; one that cannot be built raises when run."""
    made = []
    for one in candidates(device, find_dtype(device, exact=False, precision=precision)):
        if one.name in engines:
            made += _by_engine(network, device, batch, precision, one.name)
    if "onnxruntime" in engines and precision in PEERS:
        made += onnxruntime_peers(network, device, batch, precision, PEERS[precision])
    return made


def _by_engine(
    network: UNet328, device: torch.device, batch: int, precision: Precision, name: EngineName
) -> list[Contestant]:
    """An engine on CUDA, with nothing cached and with the template's half cached."""
    before = torch.cuda.memory_allocated(device)
    image, audio = _inputs(network, batch, device)
    index, told = torch.arange(batch, device=device), {"precision": precision}
    try:
        engine: Engine = make_engine(network, device=device, engine=name, exact=False, precision=precision)
        image, audio = image.to(engine.dtype), audio.to(engine.dtype)
        features = engine.encode(image)
    except Exception as error:  # compilers raise what they like
        return [Contestant(name, _raising(error), batch, told)]

    def whole() -> Tensor:
        return engine.decode(engine.encode(image), index, audio)

    def half() -> Tensor:
        return engine.decode(features, index, audio)

    of_pytorch = name in ("eager", "compile")
    made = []
    for function, cached in ((half, True), (whole, False)):  # the smaller first: a graph keeps its memory
        torch.cuda.reset_peak_memory_stats(device)
        run = replayed(tuned(function) if of_pytorch else function)
        made.append(Contestant(name, run, batch, told, cached, torch.cuda.max_memory_allocated(device) - before))
    return made


def onnxruntime_peers(
    network: UNet328,
    device: torch.device,
    batch: int,
    precision: Precision,
    providers: Mapping[str, Mapping[str, str]],
) -> list[Contestant]:
    """ONNX Runtime on the whole network, by each of ``providers`` that is installed, with its inputs on the device.

    Args:
        providers: each one's options, by its name.
    """
    installed = [name for name in providers if name in onnxruntime.get_available_providers()]
    if not installed:
        return []
    graph, dtype = io.BytesIO(), getattr(torch, precision)
    image, audio = (value.to(dtype) for value in _inputs(network, 1, torch.device("cpu")))
    folded = fold_batch_norms(network).to(dtype)
    export_onnx(folded, (image, audio), graph, inputs=["image", "audio"], outputs=["output"])
    made = []
    for provider in installed:
        name, told = f"ONNX Runtime, {provider.removesuffix('ExecutionProvider')}", {"precision": precision}
        try:
            session = onnxruntime.InferenceSession(graph.getvalue(), providers=[(provider, dict(providers[provider]))])
            if session.get_providers()[0] != provider:  # it falls back to the CPU
                raise DeviceError(f"{provider} does not load here")
            run: Callable[[], object] = _bound(session, *(value.to(dtype) for value in _inputs(network, batch, device)))
        except Exception as error:  # providers raise what they like
            run = _raising(error)
        made.append(Contestant(name, run, batch, told))
    return made


def _bound(session: onnxruntime.InferenceSession, image: Tensor, audio: Tensor) -> Callable[[], Tensor]:
    """A call of the network on tensors that stay where they are."""
    output = torch.empty(len(image), 3, INPUT_SIZE, INPUT_SIZE, dtype=image.dtype, device=image.device)
    binding = session.io_binding()
    number = np.dtype(str(image.dtype).removeprefix("torch."))
    for bind, name, value in (
        (binding.bind_input, "image", image),
        (binding.bind_input, "audio", audio),
        (binding.bind_output, "output", output),
    ):
        bind(name, value.device.type, value.device.index or 0, number, tuple(value.shape), value.data_ptr())

    def run(image: Tensor = image, audio: Tensor = audio) -> Tensor:  # the defaults keep the bound memory alive
        session.run_with_iobinding(binding)
        return output

    return run


def _raising(error: Exception) -> Callable[[], object]:
    def run() -> object:
        raise error

    return run


def _inputs(network: UNet328, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    image, audio = random_inputs(network, batch)
    return image.to(device), audio.to(device)


def _session(graph: bytes, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


# ── the measurement ───────────────────────────────────────────────────────────────────────────────────────────────────


Measured = dict[int, list[float] | str]
"""Seconds a frame of each contestant, by its place in the list; or the reason why it has none."""


@torch.inference_mode()
def measure(contestants: list[Contestant], device: torch.device, rounds: int, found: Measured) -> None:
    """Fill ``found``, round by round: what an interrupted run has measured is in it."""
    found |= {place: [] for place in range(len(contestants))}
    for turn in range(WARMUP + rounds):
        for place, one in enumerate(contestants):
            times = found[place]
            if isinstance(times, str):
                continue
            try:
                seconds = timed(one.run, device)
            except Exception as error:  # a failure is a row too, and the others go on
                found[place] = f"{type(error).__name__}: {first_line(error)}"
                continue
            if turn >= WARMUP:
                times.append(seconds / one.frames)


def rows_of(
    network: UNet328, contestants: list[Contestant], found: Measured, device: torch.device, batch: int
) -> list[Row]:
    """Rows ``latency``, ``throughput``, ``operations``, ``bandwidth`` (of the bytes that layers one by one would
    move), ``layerwise_floor`` and, on a GPU, ``memory`` of each contestant that was measured, or failed.

    Args:
        batch: the place on the rows' axis.
    """
    image, audio = _inputs(network, 1, torch.device("cpu"))
    work = {
        False: (operations_of(network, image, audio), layerwise_traffic(network, image, audio)),
        True: (_operations_of_speech_half(network, image, audio), _traffic_of_speech_half(network, image, audio)),
    }
    rows = []
    for place, result in found.items():
        if not result:
            continue
        one = contestants[place]
        config = one.facts | {"mode": network.mode, "width": network.width, "cached": one.cached}
        what: dict[str, Any] = {"what": "unet", "provider": one.name, "axis": "batch", "value": batch}
        what |= {"config": config, "device": device}
        if isinstance(result, str):
            rows.append(row(None, metric="latency", unit="ms/frame", error=result, **what))
            continue
        operations, traffic = work[one.cached]
        size = getattr(torch, one.facts["precision"]).itemsize
        moved = size * (traffic.activations + traffic.weights / (batch if device.type == "cuda" else 1))
        rates = Spread.of([operations / 1e9 / seconds for seconds in result])
        floor = Spread.of([100 * moved / copy_bandwidth(device) / seconds for seconds in result])
        rows.append(row(Spread.of([1000 * s for s in result]), metric="latency", unit="ms/frame", **what))
        rows.append(row(Spread.of([1 / s for s in result]), metric="throughput", unit="frames/s", **what))
        rows.append(row(rates, metric="operations", unit="Gop/s", **what))
        bandwidth = Spread.of([moved / 1e9 / seconds for seconds in result])
        rows.append(row(bandwidth, metric="bandwidth", unit="GB/s", **what))
        if one.peak_bytes is not None:
            rows.append(row(Spread.of([one.peak_bytes / 1e6]), metric="memory", unit="MB", **what))
        rows.append(row(floor, metric="layerwise_floor", unit="% of its speed", **what))
    return rows


class Traffic(NamedTuple):
    """How many numbers layers read and write one by one: inputs and outputs, of each frame; weights, of each batch."""

    activations: int
    weights: int


@torch.inference_mode()
def layerwise_traffic(network: UNet328, image: Tensor, audio: Tensor) -> Traffic:
    """Of the whole network on one frame, batch norms folded."""
    return _traffic(fold_batch_norms(network), (image, audio))


def _traffic_of_speech_half(network: UNet328, image: Tensor, audio: Tensor) -> Traffic:
    folded = fold_batch_norms(network)
    whole, template = _traffic(folded, (image, audio)), _traffic(_Encoder(folded), (image,))
    return Traffic(whole.activations - template.activations, whole.weights - template.weights)


def _operations_of_speech_half(network: UNet328, image: Tensor, audio: Tensor) -> int:
    return operations_of(network, image, audio) - operations_of(_Encoder(network), image)


class _Encoder(nn.Module):
    """The template's half, as a module of its own."""

    def __init__(self, network: UNet328) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return self.network.encode(image)


@torch.inference_mode()
def _traffic(module: nn.Module, inputs: tuple[Tensor, ...]) -> Traffic:
    activations = weights = 0

    def count(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal activations, weights
        if not isinstance(layer, nn.Identity):
            activations += sum(value.numel() for value in given) + output.numel()
            weights += sum(weight.numel() for weight in layer.parameters(recurse=False))

    hooks = [leaf.register_forward_hook(count) for leaf in module.modules() if not list(leaf.children())]
    module(*inputs)
    for hook in hooks:
        hook.remove()
    return Traffic(activations, weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, default="ave")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="*", default=BATCHES, help="on CUDA")
    parser.add_argument("--precision", nargs="*", choices=PRECISIONS, default=PRECISIONS, help="on CUDA")
    engines = (*(name for name, one in DECLARED.items() if "cuda" in one.devices), "onnxruntime")
    parser.add_argument("--engine", nargs="*", choices=engines, default=engines, help="on CUDA")
    add_record_options(parser)
    options = parser.parse_args()
    device = torch.device(options.device)
    network = seeded_network(options.mode, width=options.width)
    print(device_name(device))
    failed = False
    for batch, made in _comparisons(network, device, options):
        found: Measured = {}
        try:
            measure(made, device, options.rounds, found)
        finally:  # an interrupted run keeps what it has found
            rows = rows_of(network, made, found, device, batch)
            _show(rows)
            if options.record:
                append_rows(rows, options.results)
        # That an engine does not run here is no failure of it.
        failed |= any(one.error and not one.error.startswith(DeviceError.__name__) for one in rows)
    if failed:
        raise SystemExit(1)


def _comparisons(
    network: UNet328, device: torch.device, options: argparse.Namespace
) -> Iterator[tuple[int, list[Contestant]]]:
    """Batch size, and who takes turns at it."""
    if device.type == "cpu":
        yield 1, on_cpu(network)
    else:
        for precision, batch in itertools.product(options.precision, options.batch):
            yield batch, on_cuda(network, device, batch, precision, options.engine)


def _show(rows: list[Row]) -> None:
    for one in rows:
        if one.metric == "latency":
            cached = "cached" if one.config["cached"] else "whole"
            spread = one.error or f"{one.p50:8.3f} ms/frame ({one.p20:.3f}–{one.p80:.3f})"
            print(f"{one.provider:44} {one.config['precision']:9} batch {one.value:<4} {cached:7} {spread}", flush=True)


if __name__ == "__main__":
    main()
