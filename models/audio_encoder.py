"""The AVE audio encoder of SyncTalk_2D: 0.2 s of mel spectrogram → 512 features.

    mel (B, 1, 80, 16)
      0 –  2   32 channels   80×16
      3 –  5   64            27×16    stride (3, 1)
      6 –  8  128             9×6     stride 3
      9 – 10  256             3×3     stride (3, 2)
          11  512             1×1     no padding: the 3×3 that is left
          12  512             1×1     kernel 1
    features (B, 512), ≥ 0

Each block is convolution, batch norm, (+ its input where the shapes agree), ReLU. Parameter names and shapes are those
of the published checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from gpupipe.models.checkpoint import load_into, load_state_dict, unfilled

SAMPLE_RATE = 16_000
"""Samples a second of the sound that the encoder was trained on."""

MEL_BANDS = 80
MEL_COLUMNS = 16
"""Bands and columns of the mel window behind one row of features."""

FEATURES = 512
"""Features in one row."""


class ConvBlock(nn.Module):
    """Convolution, batch norm, optionally + input, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int = 3,
        stride: int | tuple[int, int] = 1,
        padding: int = 1,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel, stride, padding), nn.BatchNorm2d(out_channels)
        )
        self.residual = residual
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H/stride, W/stride)."""
        y = self.conv_block(x)
        return self.act(y + x if self.residual else y)


class AudioEncoder(nn.Sequential):
    """The thirteen blocks, named ``0`` … ``12`` as in the checkpoint."""

    def __init__(self) -> None:
        super().__init__(
            ConvBlock(1, 32),
            ConvBlock(32, 32, residual=True),
            ConvBlock(32, 32, residual=True),
            ConvBlock(32, 64, stride=(3, 1)),
            ConvBlock(64, 64, residual=True),
            ConvBlock(64, 64, residual=True),
            ConvBlock(64, 128, stride=3),
            ConvBlock(128, 128, residual=True),
            ConvBlock(128, 128, residual=True),
            ConvBlock(128, 256, stride=(3, 2)),
            ConvBlock(256, 256, residual=True),
            ConvBlock(256, FEATURES, padding=0),
            ConvBlock(FEATURES, FEATURES, kernel=1, padding=0),
        )

    def forward(self, mel: Tensor) -> Tensor:
        """Mel windows (B, 1, 80, 16) in [−4, 4] → features (B, 512), ≥ 0; a ValueError for another shape."""
        if mel.dim() != 4 or mel.shape[1:] != (1, MEL_BANDS, MEL_COLUMNS):
            raise ValueError(f"mel has shape {tuple(mel.shape)}; expected (B, 1, {MEL_BANDS}, {MEL_COLUMNS})")
        return super().forward(mel).flatten(1)


def load_audio_encoder(path: str | Path) -> AudioEncoder:
    """Read an AVE encoder checkpoint (``.pth`` or ``.safetensors``) into float32, in ``eval`` mode, on the CPU.

    Keys under one common ``audio_encoder.`` prefix, as the encoder's training code saves them, are accepted.

    Raises:
        CheckpointError: the file is missing or unreadable, or a key is missing, extra or misshapen.
    """
    state = load_state_dict(path)
    prefix = "audio_encoder."
    if all(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    encoder = unfilled(AudioEncoder)
    load_into(encoder, state, path)
    return encoder.eval().requires_grad_(False)
