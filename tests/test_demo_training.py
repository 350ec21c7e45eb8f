"""The shortcuts that make the demo's training cheap change nothing: folded norms, a painter joined to a listener."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpupipe.demo import corpus
from gpupipe.demo.fitting import fit
from gpupipe.demo.norms import fold_norms, norm_pairs, unfolded_state
from gpupipe.demo.train import train
from gpupipe.demo.train_encoder import Listener, Sounds, row_windows
from gpupipe.demo.train_unet import CODE, as_code, fresh_painter, join, paint
from gpupipe.errors import GpupipeError, InputError
from gpupipe.mel import mel_spectrogram, mel_windows
from gpupipe.models.unet328 import UNet328

WIDTH = 1 / 8


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lived_in(network: nn.Module) -> nn.Module:
    """Batch norms with statistics and weights far from the defaults, so that wrong folding shows."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            with torch.no_grad():
                module.running_mean.uniform_(-0.5, 0.5, generator=generator(0))
                module.running_var.uniform_(0.5, 2, generator=generator(1))
                module.weight.uniform_(0.5, 1.5, generator=generator(2))
                module.bias.uniform_(-0.5, 0.5, generator=generator(3))
    return network.eval()


def inputs() -> tuple[Tensor, Tensor]:
    return torch.rand(1, 6, 320, 320, generator=generator(5)), torch.rand(1, 32, 16, 16, generator=generator(6))


@torch.no_grad()
def test_folded_norms_change_nothing_and_come_back() -> None:
    torch.manual_seed(0)
    network = lived_in(UNet328("ave", width=WIDTH))
    assert isinstance(network, UNet328)
    image, audio = inputs()
    before = network(image, audio)
    like = UNet328("ave", width=WIDTH)
    pairs = norm_pairs(network)
    assert len(pairs) == sum(isinstance(module, nn.BatchNorm2d) for module in like.modules())
    fold_norms(network, pairs)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    torch.testing.assert_close(network(image, audio), before, atol=1e-4, rtol=0)
    like.load_state_dict(unfolded_state(network.state_dict(), like, pairs))
    after = like.eval()(image, audio)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
    like.get_submodule("up5.conv.double_conv.0.conv.1").bias.add_(0.1)
    assert (like(image, audio) - before).abs().max() > 1e-3


@torch.no_grad()
def test_joined_painter_draws_what_the_listener_hears() -> None:
    torch.manual_seed(0)
    image, audio = inputs()
    painter, pairs = fresh_painter(WIDTH, image, torch.rand(1, CODE))
    listener = Listener(WIDTH)
    lived_in(listener)
    heard = as_code(listener.map_head(listener.branch(audio)))  # a code for each place of the map
    x1, x2, x3, x4, x5, x6 = painter.encode(image)
    x = painter.fuse_conv(torch.cat([x6, F.pad(heard, (0, 0, 0, 0, 0, x6.shape[1] - CODE))], dim=1))
    for up, skip in ((painter.up1, x5), (painter.up2, x4), (painter.up3, x3), (painter.up4, x2), (painter.up5, x1)):
        x = up(x, skip)
    expected = torch.sigmoid(painter.outc(x))
    other = paint(painter, image, torch.zeros(1, CODE))
    pairs = join(painter, pairs, listener)
    ordinary = UNet328("ave", width=WIDTH)
    ordinary.load_state_dict(unfolded_state(painter.state_dict(), ordinary, pairs))
    torch.testing.assert_close(painter(image, audio), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(ordinary.eval()(image, audio), expected, atol=1e-4, rtol=0)
    assert (other - expected).abs().max() > 1e-3, "the code makes no difference, so that the test cannot fail"


def test_a_stopped_training_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    target = torch.tensor([1.0, -2.0])

    def run(path: Path, stops: list[int], steps: int = 40) -> Tensor:
        for stop in [*stops, steps]:
            torch.manual_seed(0)
            line = nn.Linear(3, 2)
            calls = 0

            def loss_of(step: int, line: nn.Linear = line, stop: int = stop) -> Tensor:
                nonlocal calls
                if step == stop:
                    raise KeyboardInterrupt
                calls += 1
                return (line(torch.rand(4, 3, generator=generator(step))) - target).square().mean()

            try:
                state = fit(path, line, loss_of, name="line", steps=steps, rate=0.1, save_every=10)
            except KeyboardInterrupt:
                continue
        assert calls == steps - max([*(stop // 10 * 10 for stop in stops), 0]), "steps were done twice or left out"
        return state["average"]["weight"]

    torch.testing.assert_close(run(tmp_path / "a.pt", [17, 33]), run(tmp_path / "b.pt", []), atol=0, rtol=0)


@pytest.mark.parametrize("other", [{"utterances": 4}, {"width": 1.0}, {"encoder_steps": 9}, {"branch_steps": 9}])
def test_a_training_begun_otherwise_does_not_go_on(other: dict[str, float], tmp_path: Path) -> None:
    """What is kept there would be taken for what is asked for now."""
    made_from = {"utterances": 3, "width": 0.25, "encoder_steps": 2, "branch_steps": 2}
    (tmp_path / "begun.json").write_text(json.dumps(made_from))
    with pytest.raises(InputError, match=f"^{tmp_path}: was begun with .*; expected .*, or another folder"):
        train(tmp_path, **made_from | other, painter_steps=1, joined_steps=1, device=torch.device("cpu"))  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["begun.json"]


def test_training_windows_are_the_pipelines() -> None:
    mel = mel_spectrogram(np.random.default_rng(0).standard_normal(20000).astype(np.float32) * 0.1)
    windows = torch.cat(list(mel_windows([mel])))
    rows = row_windows(mel.T, torch.arange(len(windows) + 2))
    assert torch.equal(rows, torch.cat([windows[:1], windows, windows[-1:]]))


def test_sounds_are_cut_where_they_were_joined() -> None:
    mel = np.arange(50, dtype=np.float16).repeat(80).reshape(50, 80)
    sounds = Sounds(mel, np.zeros((9, 3)), mel_at=np.array([0, 20, 50]), row_at=np.array([0, 4, 9]))
    assert sounds.mel_of(1)[:, 0].tolist() == list(range(20, 50))


def test_babble_and_roughening_follow_from_their_seed() -> None:
    waves = [
        corpus.roughen(corpus.babble(np.random.default_rng(k), seconds=1), np.random.default_rng(k)) for k in (3, 3, 4)
    ]
    assert np.array_equal(waves[0], waves[1])
    assert not np.array_equal(waves[0], waves[2])
    assert all(np.abs(wave).max() <= 1 and np.isfinite(wave).all() and wave.std() > 0.01 for wave in waves)


def test_sentences_follow_from_their_seed() -> None:
    assert corpus.sentences(np.random.default_rng(1), 5) == corpus.sentences(np.random.default_rng(1), 5)
    assert corpus.sentences(np.random.default_rng(1), 5) != corpus.sentences(np.random.default_rng(2), 5)


def test_speech_synthesis_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GpupipeError, match="espeak-ng: not installed"):
        corpus.speak("hello", "en", tmp_path / "x.wav")
