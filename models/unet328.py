"""The 328-pixel U-Net of the SyncTalk_2D / Ultralight-Digital-Human family, as it is trained.

    image (B, 6, 320, 320) ── inc ── down1 ── down2 ── down3 ── down4 ── down5 ┐
                               │x1     │x2      │x3      │x4      │x5       x6 │ 10×10
    audio (B, *AUDIO_SHAPES[mode]) ── audio_model ──────────────── 10×10 ── cat ── fuse_conv
                               │       │        │        │        │             │
    mouth (B, 3, 320, 320) ── outc ── up5 ──── up4 ──── up3 ──── up2 ──── up1 ──┘

The image path down to x1 … x6 sees only the template frame (:meth:`UNet328.encode`), so that it need not be run
again for a frame that comes round; the sound enters at the bottleneck (:meth:`UNet328.decode`).

Parameter names and shapes are those of the family's published checkpoints.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Mode = Literal["ave", "hubert", "wenet"]
MODES: tuple[Mode, ...] = get_args(Mode)

AUDIO_SHAPES: dict[Mode, tuple[int, int, int]] = {"ave": (32, 16, 16), "hubert": (32, 32, 32), "wenet": (256, 16, 32)}
"""Shape of one frame's window of speech features, by mode."""

INPUT_SIZE = 320
"""Height and width of the network's image, in pixels."""

CHANNELS = (32, 64, 128, 256, 512)
"""Channels after inc, and at each of the four widenings, at width 1."""

Features = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""x1 … x6: what :meth:`UNet328.encode` makes of a template frame, from 320×320 down to 10×10."""


class InvertedResidual(nn.Module):
    """1×1 expand, 3×3 depthwise, 1×1 project, each with batch norm, ReLU after the first two; optionally + input.

    Args:
        stride: of the depthwise convolution, 1 or 2.
        residual: add the input to the output; shapes must agree.
    """

    conv: nn.Sequential

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, residual: bool = False) -> None:
        super().__init__()
        hidden = 2 * in_channels
        self.residual = residual
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H/stride, W/stride)."""
        return x + self.conv(x) if self.residual else self.conv(x)


class DoubleConv(nn.Module):
    """Two inverted residuals: the first changes channels and stride, the second keeps both and adds its input."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            InvertedResidual(in_channels, out_channels, stride=stride),
            InvertedResidual(out_channels, out_channels, residual=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H/stride, W/stride)."""
        return self.double_conv(x)


class InConv(nn.Module):
    """The first block: 6 channels in, full resolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.inconv = nn.Sequential(InvertedResidual(in_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 6, 320, 320) → (B, C, 320, 320)."""
        return self.inconv(x)


class Down(nn.Module):
    """Halves height and width by the stride of its first depthwise convolution (the name is historical: no pooling)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(DoubleConv(in_channels, out_channels, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H/2, W/2)."""
        return self.maxpool_conv(x)


class Up(nn.Module):
    """Bilinear ×2 (align_corners=True), concatenated before the skip, then a double convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv = DoubleConv(in_channels, out_channels)

    def forward(self, low: Tensor, skip: Tensor) -> Tensor:
        """low (B, C1, H/2, W/2), skip (B, C2, H, W), C1 + C2 = in → (B, out, H, W)."""
        return self.conv(torch.cat([self.up(low), skip], dim=1))


class AudioBranch(nn.Module):
    """A window of speech features → a 10×10 map at the bottleneck.

    The three modes share one layout and differ in the first widths and in the stride of conv3, which brings each
    window to 16×16; conv5 (stride 2, padding 3) then gives 10×10.
    """

    def __init__(self, mode: Mode, channels: tuple[int, ...]) -> None:
        super().__init__()
        _, c1, c2, c3, c4 = channels
        first = AUDIO_SHAPES[mode][0]
        if mode == "wenet":
            self.conv1 = InvertedResidual(first, c3, residual=first == c3)
            self.conv2 = InvertedResidual(c3, c3, residual=True)
            before, stride = c3, (1, 2)
        else:
            self.conv1 = InvertedResidual(first, c1)
            self.conv2 = InvertedResidual(c1, c2)
            before, stride = c2, ((1, 1) if mode == "ave" else (2, 2))
        self.conv3 = nn.Conv2d(before, c3, 3, stride, padding=1)
        self.bn3 = nn.BatchNorm2d(c3)
        self.conv4 = InvertedResidual(c3, c3, residual=True)
        self.conv5 = nn.Conv2d(c3, c4, 3, stride=2, padding=3)
        self.bn5 = nn.BatchNorm2d(c4)
        self.relu = nn.ReLU(inplace=True)
        self.conv6 = InvertedResidual(c4, c4, residual=True)
        self.conv7 = InvertedResidual(c4, c4, residual=True)

    def forward(self, audio: Tensor) -> Tensor:
        """(B, *AUDIO_SHAPES[mode]) → (B, C, 10, 10)."""
        x = self.conv2(self.conv1(audio))
        x = self.conv4(self.relu(self.bn3(self.conv3(x))))
        x = self.relu(self.bn5(self.conv5(x)))
        return self.conv7(self.conv6(x))


class OutConv(nn.Module):
    """The 1×1 head."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 320, 320) → (B, 3, 320, 320), before the sigmoid."""
        return self.conv(x)


class UNet328(nn.Module):
    """The mouth painter.

    Args:
        mode: the kind of speech features: ``"ave"``, ``"hubert"`` or ``"wenet"``.
        width: scales every channel count; 1 is the published network, ½ the family's mobile variant. A multiple of ⅛.

    Raises:
        ValueError: another mode or width.
    """

    def __init__(self, mode: Mode = "ave", *, width: float = 1.0) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
        if width <= 0 or (width * 8) % 1:
            raise ValueError(f"width is {width}; expected a positive multiple of 1/8")
        self.mode: Mode = mode
        self.audio_shape = AUDIO_SHAPES[mode]
        self.width = width
        c0, c1, c2, c3, c4 = channels = tuple(int(c * width) for c in CHANNELS)
        self.audio_model = AudioBranch(mode, channels)
        self.fuse_conv = nn.Sequential(DoubleConv(2 * c4, c4), DoubleConv(c4, c3))
        self.inc = InConv(6, c0)
        self.down1 = Down(c0, c0)
        self.down2 = Down(c0, c1)
        self.down3 = Down(c1, c2)
        self.down4 = Down(c2, c3)
        self.down5 = Down(c3, c4)
        self.up1 = Up(2 * c3, c2)
        self.up2 = Up(2 * c2, c1)
        self.up3 = Up(2 * c1, c0)
        self.up4 = Up(2 * c0, c0)
        self.up5 = Up(2 * c0, c0 // 2)
        self.outc = OutConv(c0 // 2, 3)

    def encode(self, image: Tensor) -> Features:
        """What depends on the template alone: image (B, 6, 320, 320) in [0, 1] → x1 … x6."""
        x1 = self.inc(image)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x4 = self.down3(x3)
        x5 = self.down4(x4)
        return x1, x2, x3, x4, x5, self.down5(x5)

    def decode(self, features: Features, audio: Tensor) -> Tensor:
        """x1 … x6 and audio (B, *AUDIO_SHAPES[mode]) → mouth (B, 3, 320, 320) in (0, 1), BGR."""
        x1, x2, x3, x4, x5, x6 = features
        x = self.fuse_conv(torch.cat([x6, self.audio_model(audio)], dim=1))
        x = self.up1(x, x5)
        x = self.up2(x, x4)
        x = self.up3(x, x3)
        x = self.up4(x, x2)
        x = self.up5(x, x1)
        return torch.sigmoid(self.outc(x))

    def forward(self, image: Tensor, audio: Tensor) -> Tensor:
        """image (B, 6, 320, 320) in [0, 1], BGR; audio (B, *AUDIO_SHAPES[mode]) → mouth (B, 3, 320, 320) in (0, 1)."""
        return self.decode(self.encode(image), audio)


def random_inputs(network: UNet328, batch: int) -> tuple[Tensor, Tensor]:
    """The same random image (B, 6, 320, 320) in [0, 1] and audio (B, *audio_shape) whenever asked, on the CPU."""
    draw = partial(torch.rand, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    return draw(batch, 6, INPUT_SIZE, INPUT_SIZE), draw(batch, *network.audio_shape)
