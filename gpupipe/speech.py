"""Sound → AVE features, in pieces, on the device.

    any audio file ──:mod:`gpupipe.video.sound`──► 16 kHz mono ──:mod:`gpupipe.mel`──► windows (N − 2, 1, 80, 16)
                                                                                            │ AVE encoder
                                                 (N, 512), first and last row twice ◄───────┘

A row of features is 40 ms of video (25 a second) and sees 0.2 s of sound. Memory does not grow with the length of the
sound, except for what :meth:`SpeechEncoder.features` returns.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpupipe.device import find_device
from gpupipe.errors import CheckpointError
from gpupipe.mel import FEATURE_FPS, mel_pieces, mel_windows
from gpupipe.models.audio_encoder import FEATURES, SAMPLE_RATE, AudioEncoder, load_audio_encoder
from gpupipe.tf32 import own_precision
from gpupipe.video.sound import audio_chunks

logger = logging.getLogger(__name__)


class SpeechEncoder:
    """Sound files → AVE features.

    Args:
        checkpoint_path: the AVE encoder, ``.pth`` or ``.safetensors``.
        device: where mel and encoder run; by default CUDA where there is one.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        DeviceError: an unknown device, or one that is missing.
    """

    def __init__(self, checkpoint_path: str | Path, device: str | torch.device | None = None) -> None:
        self.device = find_device(device)
        self._path = Path(checkpoint_path)
        self.encoder: AudioEncoder = load_audio_encoder(checkpoint_path).to(self.device)

    @torch.inference_mode()
    def feature_rows(self, chunks: Iterable[np.ndarray | Tensor]) -> Iterator[Tensor]:
        """Sound in chunks (float32, 16 kHz, mono) → rows of features in pieces ``(n, 512)`` on the device.

        Holds only seconds of sound at a time, however long it is. The first and the last row come twice.

        Raises:
            CheckpointError: the encoder gives NaN or infinite features.
        """
        last: Tensor | None = None
        for windows in mel_windows(mel_pieces(chunks, device=self.device)):
            with own_precision(self.device):
                rows = self.encoder(windows)
            if not torch.isfinite(rows).all():
                raise CheckpointError(f"{self._path}: gives NaN or infinite features; expected a trained encoder")
            if last is None:
                yield rows[:1]
            last = rows[-1:]
            yield rows
        if last is not None:
            yield last

    @torch.inference_mode()
    def covering_features(self, audio_path: str | Path) -> Iterator[Tensor]:
        """Yield :meth:`features` in pieces ``(n, 512)`` on the device, at least one row for each frame of the sound.

        The number of rows that this family of models defines ends up to 77 ms before the sound, and a video would be
        that much shorter. The last row is repeated to fill the gap.

        Raises:
            InputError, CheckpointError: as :meth:`features`.
        """
        samples, count, last = 0, 0, torch.empty(0, FEATURES)

        def counted() -> Iterator[np.ndarray]:
            nonlocal samples
            for chunk in audio_chunks(audio_path):
                samples += len(chunk)
                yield chunk

        for rows in self.feature_rows(counted()):
            count, last = count + len(rows), rows[-1:]
            yield rows
        missing = samples * FEATURE_FPS // SAMPLE_RATE - count
        if missing > 0:
            yield last.expand(missing, -1)

    def features(self, audio_path: str | Path) -> np.ndarray:
        """Any sound file → float32 ``(N, 512)``, one row a frame of video at 25 frames a second.

        N is ``int((T − 16) / 80 · 25) + 4`` for T mel columns.

        Raises:
            InputError: see :func:`~gpupipe.video.sound.audio_chunks`.
            CheckpointError: see :meth:`feature_rows`.
        """
        rows = torch.cat([piece.cpu() for piece in self.feature_rows(audio_chunks(audio_path))]).numpy()
        logger.debug("%s: %d rows of features on %s", audio_path, len(rows), self.device)
        return rows
