"""The network's benchmark: who takes part on a GPU, as far as a CPU can tell."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gpupipe.benchmarks import bench_inverted_residual, bench_unet
from gpupipe.benchmarks.common import Row
from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.engines.eager import EagerEngine
from gpupipe.errors import DeviceError

CPU = torch.device("cpu")


@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-4), ("float16", 2e-2)])
@torch.inference_mode()
def test_onnxruntime_paints_the_network_s_mouths_where_its_inputs_lie(precision: Any, bound: float) -> None:
    network = seeded_network(width=1 / 8)
    (peer,) = bench_unet.onnxruntime_peers(network, CPU, 2, precision, {"CPUExecutionProvider": {}})
    image, audio = bench_unet._inputs(network, 2, CPU)
    painted = peer.run()
    assert isinstance(painted, torch.Tensor)
    assert (painted.float() - network(image, audio)).abs().max() <= bound
    assert (painted.float() - network(image, audio.flip(0))).abs().max() > bound, "a near miss passes, too"
    assert (peer.name, peer.frames) == ("ONNX Runtime, CPU", 2)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_is_not_installed_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    network = seeded_network(width=1 / 8)
    assert bench_unet.onnxruntime_peers(network, CPU, 1, "float32", {"TensorrtExecutionProvider": {}}) == []
    # One that says it is, and does not load, is a row with its reason.
    names = ["TensorrtExecutionProvider"]
    monkeypatch.setattr(bench_unet.onnxruntime, "get_available_providers", lambda: names)
    (peer,) = bench_unet.onnxruntime_peers(network, CPU, 1, "float32", {"TensorrtExecutionProvider": {}})
    with pytest.raises(Exception, match="TensorrtExecutionProvider"):
        peer.run()


def run_main(monkeypatch: pytest.MonkeyPatch, made: list[bench_unet.Contestant]) -> list[Row]:
    """Run the command on these contestants; the rows that it records, however it ends."""
    recorded: list[Row] = []
    monkeypatch.setattr(bench_unet, "_comparisons", lambda *_: [(1, made)])
    monkeypatch.setattr(bench_unet, "append_rows", lambda rows, *_: recorded.extend(rows))
    monkeypatch.setattr("sys.argv", ["bench_unet", "--device", "cpu", "--width", "0.125", "--rounds", "3", "--record"])
    return recorded


@pytest.mark.parametrize(
    ("rounds", "measured"), [(bench_unet.WARMUP + 2, {"a": 3, "b": 2}), (bench_unet.WARMUP, {"a": 1}), (0, {})]
)
def test_an_interrupted_comparison_keeps_its_rounds(
    rounds: int, measured: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def interrupted() -> None:
        calls.append(1)
        if len(calls) > rounds:
            raise KeyboardInterrupt

    told = {"precision": "float32"}
    made = [bench_unet.Contestant(name, run, 1, told) for name, run in (("a", lambda: None), ("b", interrupted))]
    recorded = run_main(monkeypatch, made)
    with pytest.raises(KeyboardInterrupt):
        bench_unet.main()
    assert {row.provider: row.n for row in recorded if row.metric == "latency"} == measured


@pytest.mark.parametrize(("error", "status"), [(DeviceError("too old"), 0), (RuntimeError("ptxas failed"), 1)])
def test_a_failure_is_the_command_s(error: Exception, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not an engine that does not run here."""
    failing = bench_unet.Contestant("a", bench_unet._raising(error), 1, {"precision": "float16"})
    recorded = run_main(monkeypatch, [failing])
    with pytest.raises(SystemExit) if status else contextlib.nullcontext():
        bench_unet.main()
    assert [row.error for row in recorded] == [f"{type(error).__name__}: {error}"]


def test_the_floor_counts_bytes_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 value is two bytes; weights are read once a batch."""
    monkeypatch.setattr(bench_unet, "copy_bandwidth", lambda device: 1e12)
    network = seeded_network(width=1 / 8)
    traffic = bench_unet.layerwise_traffic(network, *bench_unet._inputs(network, 1, CPU))
    for name, size in (("float32", 4), ("bfloat16", 2)):
        made = [bench_unet.Contestant("a", lambda: None, 1, {"precision": name})]
        rows = bench_unet.rows_of(network, made, {0: [0.5]}, CPU, 1)
        (share,) = (row.p50 for row in rows if row.metric == "layerwise_floor")
        assert share == pytest.approx(100 * size * sum(traffic) / 1e12 / 0.5)


def test_what_is_measured_is_recorded_before_the_next_comparison(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded: list[Row] = []

    def comparisons(*_: object) -> Any:
        told = {"precision": "float32"}
        yield 1, [bench_unet.Contestant("first", lambda: None, 1, told)]
        assert {one.provider for one in recorded} == {"first"}
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_unet, "_comparisons", comparisons)
    monkeypatch.setattr(bench_unet, "append_rows", lambda rows, *_: recorded.extend(rows))
    monkeypatch.setattr("sys.argv", ["bench_unet", "--device", "cpu", "--width", "0.125", "--rounds", "1", "--record"])
    with pytest.raises(KeyboardInterrupt):
        bench_unet.main()
    assert "first" in capsys.readouterr().out


@torch.inference_mode()
def test_everybody_on_a_cpu_paints_what_it_says_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many frames, by as many threads, with the template's half or without."""
    monkeypatch.setattr(bench_unet, "available_cores", lambda: 3)
    threads: list[int] = []
    session, lanes, encoded, painted = bench_unet._session, bench_unet.map_in_lanes, [], []

    def counted(function: Any, items: Any) -> Any:
        done = list(lanes(function, items))
        painted.extend(done)
        return done

    monkeypatch.setattr(bench_unet, "_session", lambda graph, n: (threads.append(n), session(graph, n))[1])
    monkeypatch.setattr(bench_unet, "map_in_lanes", counted)
    network = seeded_network(width=1 / 8)
    made = bench_unet.on_cpu(network)
    assert threads == [3, 1]
    for kind in (EagerEngine, bench_unet.OnnxRuntimeEngine, bench_unet.LlvmEngine):
        encode = kind.encode
        monkeypatch.setattr(kind, "encode", lambda *given, encode=encode: (encoded.append(1), encode(*given))[1])
    mouth = network(*bench_unet._inputs(network, 1, CPU))
    for one in made:
        encoded.clear()
        painted.clear()
        result = one.run()
        mouths = painted or [result]
        assert len(mouths) == one.frames, one
        for found in mouths:
            values = torch.as_tensor(found[0] if isinstance(found, list) else found).float()
            values = values / (255 if values.max() > 1 else 1)
            assert (values - mouth).abs().max() < (0.005 if one.facts["precision"] == "float32" else 0.05), one
        ours = one.name in ("eager", "onnxruntime", "llvm")
        assert len(encoded) == (one.frames if ours and not one.cached else 0), one
    assert {(one.name, one.cached) for one in made} >= {(name, c) for name in ("eager", "onnxruntime") for c in (0, 1)}


@torch.inference_mode()
def test_a_cached_half_is_not_counted_and_weights_are_read_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_unet, "copy_bandwidth", lambda device: 1e12)
    monkeypatch.setattr(bench_unet, "timed", lambda run, device: 8.0)
    monkeypatch.setattr("gpupipe.benchmarks.common.device_name", str)
    network, told = seeded_network(width=1 / 8), {"precision": "float16"}
    made = [bench_unet.Contestant("a", lambda: None, 4, told, cached) for cached in (False, True)]
    found: bench_unet.Measured = {}
    bench_unet.measure(made, CPU, 1, found)
    assert found == {0: [2.0], 1: [2.0]}, "a frame's share of four"

    class Speech(torch.nn.Module):
        """The other half."""

        def __init__(self) -> None:
            super().__init__()
            self.network = bench_unet.fold_batch_norms(network)

        def forward(self, audio: torch.Tensor) -> torch.Tensor:
            return self.network.decode(features, audio)

    image, audio = bench_unet._inputs(network, 1, CPU)
    features = network.encode(image)
    with (speech := FlopCounterMode(display=False)):
        network.decode(features, audio)
    operations = bench_unet.operations_of(network, image, audio)
    traffic = bench_unet.layerwise_traffic(network, image, audio)
    half = bench_unet._traffic(Speech(), (audio,))
    for device, batch in ((CPU, 1), (torch.device("cuda"), 4)):
        rows = bench_unet.rows_of(network, made, found, device, batch)
        by = {(row.metric, row.config["cached"]): row.p50 for row in rows}
        assert by["latency", False] == 2000 and by["throughput", True] == 0.5
        assert by["operations", False] == pytest.approx(operations / 2e9)
        assert by["operations", True] == pytest.approx(speech.get_total_flops() / 2e9)
        assert by["bandwidth", False] == pytest.approx((traffic.activations + traffic.weights / batch) / 1e9)
        assert by["bandwidth", True] == pytest.approx(2 * (half.activations + half.weights / batch) / 2e9)
    layers = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.Identity(), torch.nn.ReLU())
    counted = bench_unet._traffic(layers, (torch.zeros(1, 2, 4, 5),))
    assert counted == ((2 + 3 + 3 + 3) * 20, 2 * 3 + 3), "what is left of a batch norm is no layer"


@pytest.mark.cuda
@torch.inference_mode()
def test_an_engine_on_a_gpu_gives_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_unet, "copy_bandwidth", lambda device: 1e12)
    decode, decoded = EagerEngine.decode, []
    tunes = torch.backends.cudnn

    def counted(*given: Any) -> torch.Tensor:
        decoded.append(tunes.benchmark)
        return decode(*given)

    monkeypatch.setattr(EagerEngine, "decode", counted)
    network, gpu = seeded_network(width=1 / 8), torch.device("cuda")
    made = bench_unet.on_cuda(network, gpu, 2, "float16", ["eager", "onnxruntime"])
    launched = len(decoded)
    found: bench_unet.Measured = {}
    bench_unet.measure(made, gpu, 1, found)
    rows = [row for row in bench_unet.rows_of(network, made, found, gpu, 2) if row.provider == "eager"]
    assert len(decoded) == launched > 0, "it is replayed"
    assert all(decoded) and not tunes.benchmark, "PyTorch's layers are at their best, ours as in a render"
    speed = {"latency", "throughput", "operations", "bandwidth", "layerwise_floor"}
    assert {row.metric for row in rows} == speed | {"memory"}
    assert all(row.p50 > 0 for row in rows if row.p50 is not None)
    assert {row.config["cached"] for row in rows} == {True, False}
    assert all(row.error is None and row.value == 2 for row in rows)


def test_layers_beside_our_kernels_are_at_their_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what they are compared with runs as in a render."""
    seen: dict[str, set[bool]] = {"_layered": set(), "inverted_residual": set()}
    for name, switches in seen.items():

        def recorded(*_: Any, switches: set[bool] = switches, **__: Any) -> None:
            switches.add(torch.backends.cudnn.benchmark)

        monkeypatch.setattr(bench_inverted_residual, name, recorded)
    for _ in itertools.islice(bench_inverted_residual.cases(CPU, 1, 1), 4):
        pass
    assert seen == {"_layered": {True}, "inverted_residual": {False}}
