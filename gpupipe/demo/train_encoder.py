"""Stage 1: an audio encoder of the AVE architecture that hears what the character's mouth should do.

It is trained together with the audio branch of the U-Net, whose 10×10 map must tell the three mouth parameters
wherever the mouth is drawn. So the U-Net of stage 2 starts with a branch that already understands the sound, and its
few steps go into drawing.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpupipe.demo.corpus import utterances
from gpupipe.demo.fitting import descend, save
from gpupipe.demo.mouth import MOUTH_FPS, PARAMETERS, mouth_track
from gpupipe.files import replacing
from gpupipe.mel import mel_spectrogram, window_count, window_starts
from gpupipe.models.audio_encoder import FEATURES, MEL_COLUMNS, AudioEncoder
from gpupipe.models.unet328 import CHANNELS, AudioBranch

logger = logging.getLogger(__name__)

ROWS = 48  # rows of features to a training clip
CLIPS = 2  # to a step of the encoder's training
BRANCH_BATCH = 64  # windows to a step of the branch's
BEFORE = AFTER = 8  # rows the U-Net sees before a frame, and from it on
MOUTH_CELLS = (slice(2, 7), slice(2, 8))
"""Where the mouth is in the 10×10 map: rows, columns."""


@dataclass
class Sounds:
    """Mel spectrograms and true mouths of many utterances, end to end.

    ``mel`` float16 (T, 80); ``mouth`` float32 (N, 3), one row a row of features; ``mel_at``, ``row_at`` (U + 1,)
    where each utterance begins in them.
    """

    mel: np.ndarray
    mouth: np.ndarray
    mel_at: np.ndarray
    row_at: np.ndarray

    def __len__(self) -> int:
        """How many utterances."""
        return len(self.row_at) - 1

    @property
    def hours(self) -> float:
        """Length of the sound."""
        return len(self.mouth) / MOUTH_FPS / 3600

    def mel_of(self, utterance: int) -> Tensor:
        """Float32 (T, 80)."""
        return torch.from_numpy(self.mel[self.mel_at[utterance] : self.mel_at[utterance + 1]].astype(np.float32))


def make_sounds(path: Path, count: int, *, seed: int) -> Sounds:
    """``count`` utterances of the corpus, made once and kept in ``path`` (.npz)."""
    if not path.is_file():
        mels, mouths = [], []
        began = time.monotonic()
        for k, wave in enumerate(utterances(count, seed=seed)):
            mel = mel_spectrogram(wave)
            mels.append(mel.T.numpy().astype(np.float16))
            mouths.append(mouth_track(wave, frames=window_count(mel.shape[1]) + 2))
            if (k + 1) % 50 == 0:
                logger.info("sound: %d of %d utterances, %.0f s", k + 1, count, time.monotonic() - began)
        with replacing(path) as temporary:
            np.savez(
                temporary,
                mel=np.concatenate(mels),
                mouth=np.concatenate(mouths),
                mel_at=np.cumsum([0, *map(len, mels)]),
                row_at=np.cumsum([0, *map(len, mouths)]),
            )
    with np.load(path) as file:
        return Sounds(**{name: file[name] for name in ("mel", "mouth", "mel_at", "row_at")})


def row_windows(mel: Tensor, rows: Tensor) -> Tensor:
    """Mel (T, 80) → the encoder's windows (len(rows), 1, 80, 16) behind these rows of features.

    Row r is window r − 1; the first row and the last come twice.
    """
    count = window_count(len(mel))
    starts = window_starts(0, count).clamp_max(len(mel) - MEL_COLUMNS)[(rows - 1).clamp(0, count - 1)]
    return mel[starts[:, None] + torch.arange(MEL_COLUMNS)].transpose(1, 2)[:, None]


class Listener(nn.Module):
    """Encoder, audio branch and the two read-outs that train them."""

    def __init__(self, width: float) -> None:
        super().__init__()
        channels = tuple(int(c * width) for c in CHANNELS)
        self.encoder = AudioEncoder()
        self.branch = AudioBranch("ave", channels)
        self.row_head = nn.Linear(FEATURES, len(PARAMETERS))
        self.map_head = nn.Conv2d(channels[-1], len(PARAMETERS), 1)

    def forward(self, mel: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """Mel windows (C·48, 1, 80, 16), inside (C, 48) → mouths read from the rows and from the map.

        (C, 48, 3) and (C·33, 3, h, w) for frames 8 … 40 of each clip; rows not ``inside`` the sound are zeros.
        """
        features = self.encoder(mel)
        if self.training:
            features = features + 0.05 * features.detach().std() * torch.randn_like(features)
        features = features.unflatten(0, inside.shape) * inside[..., None]
        windows = features.unfold(1, BEFORE + AFTER, 1)  # (C, 33, 512, 16)
        windows = windows.transpose(2, 3).reshape(-1, 32, 16, 16)
        return self.row_head(features), self.map_head(self.branch(windows))[:, :, MOUTH_CELLS[0], MOUTH_CELLS[1]]


def clips(sounds: Sounds, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """``count`` random clips: mel windows (count·48, 1, 80, 16), inside (count, 48), true mouths (count, 48, 3)."""
    lengths = np.diff(sounds.row_at)
    chosen = rng.choice(len(lengths), count, p=lengths / lengths.sum())
    mels, insides, mouths = [], [], []
    for utterance in chosen:
        n = int(lengths[utterance])
        rows = torch.arange(ROWS) + int(rng.integers(-BEFORE, max(1, n - ROWS + AFTER)))
        insides.append((rows >= 0) & (rows < n))
        mels.append(row_windows(sounds.mel_of(utterance), rows))
        base = sounds.row_at[utterance]
        mouths.append(torch.from_numpy(sounds.mouth[base + rows.clamp(0, n - 1).numpy()]))
    return torch.cat(mels), torch.stack(insides), torch.stack(mouths)


def losses(listener: Listener, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss; mouths read from the map's cells, averaged (C·33, 3); true mouths (C·33, 3)."""
    mel, inside, mouth = batch
    rows, maps = listener(mel, inside)
    truth = mouth[:, BEFORE : ROWS - AFTER + 1].reshape(-1, len(PARAMETERS))
    weight = inside[..., None].float()
    row_loss = (F.smooth_l1_loss(rows, mouth, beta=0.1, reduction="none") * weight).sum() / weight.sum() / 3
    map_loss = F.smooth_l1_loss(maps, truth[:, :, None, None].expand_as(maps), beta=0.1)
    return map_loss + 0.5 * row_loss, maps.mean((2, 3)), truth


@torch.no_grad()
def evaluate(listener: Listener, sounds: Sounds, *, device: torch.device) -> dict[str, float]:
    """Loss and the correlation of each parameter with its truth, on clips of ``sounds``."""
    listener.eval()
    rng = np.random.default_rng(0)
    total, read, true = 0.0, [], []
    batches = 12
    for _ in range(batches):
        loss, mouths, truth = losses(listener, tuple(t.to(device) for t in clips(sounds, rng, 4)))  # type: ignore[arg-type]
        total += float(loss) / batches
        read.append(mouths.cpu())
        true.append(truth.cpu())
    listener.train()
    a, b = torch.cat(read).T, torch.cat(true).T
    result = {"loss": total}
    for k, name in enumerate(PARAMETERS):
        result[name] = float(torch.corrcoef(torch.stack([a[k], b[k]]))[0, 1])
    return result


def train_encoder(
    out: Path, sounds: Sounds, held_out: Sounds, *, steps: int, width: float, device: torch.device
) -> dict[str, Any]:
    """Train on ``sounds``, or go on training, and leave ``encoder.pt`` in ``out``; ``held_out`` is to measure with.

    Returns:
        Its contents: ``listener`` (state dict), ``record`` (data, steps, losses, held-out result).
    """
    path = out / "encoder.pt"
    torch.manual_seed(0)
    listener = Listener(width).to(device).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(listener.parameters(), weight_decay=0.01)
    first, history = 0, []
    if path.is_file():
        state = torch.load(path, map_location=device, weights_only=True)
        first, history = state["step"], state["record"]["history"]
        listener.load_state_dict(state["listener"])
        if first >= steps:
            return state
        optimiser.load_state_dict(state["optimiser"])

    def loss_of(step: int) -> Tensor:
        mel, inside, mouth = clips(sounds, np.random.default_rng((3, step)), CLIPS)
        return losses(listener, (mel.to(device), inside.to(device), mouth.to(device)))[0]

    for step, loss in descend(optimiser, loss_of, name="encoder", first=first, steps=steps, rate=2e-3, clip=1.0):
        if step % 50 and step != steps:
            continue
        entry = {"step": step, "train_loss": loss, **evaluate(listener, held_out, device=device)}
        history.append(entry)
        logger.info("encoder held out: %s", json.dumps({k: round(v, 4) for k, v in entry.items()}))
        record = {
            "hours_of_sound": round(sounds.hours, 2),
            "utterances": len(sounds),
            "steps": step,
            "windows_per_step": CLIPS * ROWS,
            "history": history,
        }
        state = {
            "step": step,
            "listener": listener.state_dict(),
            "optimiser": optimiser.state_dict(),
            "record": record,
        }
        save(state, path)
    return state


# ── the branch by itself ─────────────────────────────────────────────────────────────────────────────────────────────

Rows = list[tuple[Tensor, Tensor]]
"""Utterances as the U-Net hears them: features (8 + N + 8, 512), zeros before and after, and true mouths (N, 3)."""


@torch.inference_mode()
def rows_of(encoder: AudioEncoder, sounds: Sounds, utterances: np.ndarray) -> Rows:
    """The features of these utterances, on the CPU."""
    device = next(encoder.parameters()).device
    out = []
    for utterance in utterances:
        mouths = torch.from_numpy(sounds.mouth[sounds.row_at[utterance] : sounds.row_at[utterance + 1]])
        windows = row_windows(sounds.mel_of(utterance), torch.arange(len(mouths)))
        rows = torch.cat([encoder(part.to(device)).cpu() for part in windows.split(256)])
        out.append((F.pad(rows, (0, 0, BEFORE, AFTER)).clone(), mouths.clone()))
    return out


def draw_windows(rng: np.random.Generator, rows: Rows, count: int) -> tuple[Tensor, Tensor]:
    """``count`` random windows (count, 32, 16, 16) and their true mouths (count, 3)."""
    windows, mouths = [], []
    for k in rng.integers(0, len(rows), count):
        features, truth = rows[k]
        at = int(rng.integers(0, len(truth)))
        windows.append(features[at : at + BEFORE + AFTER].reshape(32, 16, 16))
        mouths.append(truth[at])
    return torch.stack(windows), torch.stack(mouths)


def train_branch(out: Path, listener: Listener, known: Rows, unknown: Rows, *, steps: int) -> dict[str, Any]:
    """Train branch and map head alone on kept features, in place: a step costs a fraction of the encoder's.

    Returns:
        ``{"step", "listener" (state dict), "history"}``, saved as ``out/branch.pt``.
    """
    path = out / "branch.pt"
    if path.is_file():
        state = torch.load(path, weights_only=True, map_location="cpu")
        listener.load_state_dict(state["listener"])
        return state
    device = next(listener.parameters()).device
    spread = torch.cat([features for features, _ in known]).std(0).reshape(1, 2, 16, 16).repeat(1, 16, 1, 1).to(device)
    parameters = [*listener.branch.parameters(), *listener.map_head.parameters()]
    optimiser = torch.optim.AdamW(parameters, weight_decay=0.02)
    listener.eval()

    def read(windows: Tensor) -> Tensor:
        return listener.map_head(listener.branch(windows))[:, :, MOUTH_CELLS[0], MOUTH_CELLS[1]]

    def loss_of(step: int) -> Tensor:
        listener.branch.train()
        windows, mouths = draw_windows(np.random.default_rng((11, step)), known, BRANCH_BATCH)
        heard = windows.to(device)
        maps = read(heard + 0.15 * spread * torch.randn_like(heard))
        return F.smooth_l1_loss(maps, mouths.to(device)[:, :, None, None].expand_as(maps), beta=0.05)

    @torch.no_grad()
    def measure() -> dict[str, float]:
        listener.branch.eval()
        windows, mouths = draw_windows(np.random.default_rng(12), unknown, 512)
        found = read(windows.to(device)).mean((2, 3)).cpu()
        figures: dict[str, float] = {}
        for k, name in enumerate(PARAMETERS):
            figures[name] = round(float(torch.corrcoef(torch.stack([found[:, k], mouths[:, k]]))[0, 1]), 4)
            figures[f"{name}_error"] = round(float((found[:, k] - mouths[:, k]).abs().mean()), 4)
        return figures

    history = []
    for step, loss in descend(optimiser, loss_of, name="branch", steps=steps, rate=2e-3, clip=1.0):
        if step % 50 == 0 or step == steps:
            history.append({"step": step, "train_loss": round(loss, 5)} | measure())
            logger.info("branch held out: %s", history[-1])
    listener.eval()
    state = {"step": steps, "listener": listener.state_dict(), "history": history}
    save(state, path)
    return state
