"""The network's benchmark: who takes part on a GPU, as far as a CPU can tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpupipe.benchmarks import bench_unet
from gpupipe.benchmarks.common import Row
from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.engines.eager import EagerEngine

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


@pytest.mark.cuda
@torch.inference_mode()
def test_an_engine_on_a_gpu_gives_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_unet, "copy_bandwidth", lambda device: 1e12)
    decode, decoded = EagerEngine.decode, []
    monkeypatch.setattr(EagerEngine, "decode", lambda *given: decoded.append(1) or decode(*given))
    network, gpu = seeded_network(width=1 / 8), torch.device("cuda")
    made = bench_unet.on_cuda(network, gpu, 2, "float16", ["eager", "onnxruntime"])
    launched = len(decoded)
    rows = [row for row in bench_unet.rows_of(network, made, gpu, 2, rounds=1) if row.provider == "eager"]
    assert len(decoded) == launched > 0, "it is replayed"
    assert {row.metric for row in rows} == {"latency", "operations", "layerwise_floor"}
    assert {row.config["cached"] for row in rows} == {True, False}
    assert all(row.error is None and row.value == 2 for row in rows)
