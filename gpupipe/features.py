"""Speech features, one row a video frame, from a file or an array, and the windows that the network sees.

A file is read in pieces as the frames are rendered: memory does not grow with its length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from gpupipe.errors import InputError
from gpupipe.files import input_file, replacing
from gpupipe.models import AUDIO_SHAPES, MODES, Mode
from gpupipe.models.audio_encoder import FEATURES
from gpupipe.quiet import no_warnings
from gpupipe.schedule import WINDOW_ROWS, Resampling, frame_rate, window_rows
from gpupipe.transfer import as_array, to_device

Float32 = NDArray[np.float32]
FeatureSource = str | Path | ArrayLike | Tensor
"""A ``.npy`` file of speech features, or the features themselves."""

FRAME_RATES: dict[Mode, int] = {"ave": 25, "hubert": 25, "wenet": 20}
"""Rows of features a second, by mode."""

_CHECK_BYTES = 1 << 24


def video_rate(mode: Mode, fps: float | None) -> float:
    """Return a video's frames a second: ``fps``, or if that is None the rate of the mode's features."""
    return FRAME_RATES[mode] if fps is None else fps


class SpeechFeatures:
    """The windows of speech features of a clip.

    Args:
        source: a ``.npy`` file of float32, or an array or tensor: ``(N, …)`` with 512 (ave), 2·1024 (hubert) or 16·512
            (wenet) values a row, or already windowed ``(N, *AUDIO_SHAPES[mode])``.
        mode: the kind of features.
        check: look for NaN and infinite values, which reads the whole file: once is enough for a clip in parts.

    Raises:
        InputError: a file that is missing or not a ``.npy``; another shape or dtype; no rows; NaN or infinite values.
    """

    def __init__(self, source: FeatureSource, mode: Mode = "ave", *, check: bool = True) -> None:
        if mode not in MODES:
            raise InputError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
        self.mode: Mode = mode
        self.audio_shape = AUDIO_SHAPES[mode]
        self._array: Float32 | None = None
        self._path: Path | None = None
        if isinstance(source, (str, Path)):
            self._path = Path(source)
            self.name = str(source)
            self.shape, self._offset = self._open(self._path)
        else:
            array = as_array(source)
            self.name = "audio features"
            if array.dtype.kind != "f":
                raise InputError(f"{self.name}: dtype is {array.dtype}; expected float32")
            with np.errstate(over="ignore"):  # what becomes infinite is told below
                self._array = np.ascontiguousarray(array, dtype=np.float32)
            self.shape = self._array.shape
        self.windowed = self.shape[1:] == self.audio_shape
        if not _fits(self.shape, mode):
            windows = ", ".join(map(str, self.audio_shape))
            others = " or ".join(other for other in MODES if _fits(self.shape, other))
            raise InputError(
                f"{self.name}: shape is {self.shape}; expected (N, {_row_size(mode)}) or (N, {windows}) for mode"
                f" {mode}{f'; mode {others} takes it' if others else ''}"
            )
        if self.shape[0] == 0:
            raise InputError(f"{self.name}: has no rows; expected one a video frame")
        if check:
            self._check_finite()

    def __len__(self) -> int:
        return self.shape[0]

    def timing(self, fps: float | Fraction | None = None) -> Resampling:
        """Return which row each frame of a video at ``fps`` frames a second shows; None makes one frame of each row.

        Raises:
            InputError: ``fps`` is not more than 0 and at most 1000.
        """
        rate = Fraction(FRAME_RATES[self.mode])
        return Resampling(len(self), rate, rate if fps is None else frame_rate(fps))

    def windows(self, start: int, stop: int, *, device: torch.device | str = "cpu") -> Tensor:
        """Return the windows of frames ``[start, stop)``: float32 (stop − start, *AUDIO_SHAPES[mode]), on ``device``.

        Frame i sees rows ``[i − 8, i + 8)``; rows outside the clip are zeros. Rows are copied to the device and
        windowed there, because windows are 16 times their size.

        Raises:
            InputError: as :meth:`rows`.
        """
        device = torch.device(device)
        if self.windowed:
            return to_device(torch.from_numpy(self.rows(start, stop).reshape(-1, *self.audio_shape)), device)
        low, high = window_rows(start, stop)
        inside = self.rows(max(low, 0), min(high, len(self)))
        rows = np.zeros((high - low, inside.shape[1]), dtype=np.float32)
        rows[max(-low, 0) : max(-low, 0) + len(inside)] = inside
        windows = to_device(torch.from_numpy(rows), device).unfold(0, WINDOW_ROWS, 1).mT
        return windows.reshape(stop - start, *self.audio_shape)

    def rows(self, start: int, stop: int) -> Float32:
        """Rows ``[start, stop)`` as they are stored: float32 (stop − start, values a row).

        Raises:
            InputError: the file has become shorter than its header promises.
        """
        width = math.prod(self.shape[1:])
        if self._array is not None:
            return self._array[start:stop].reshape(stop - start, width).copy()
        assert self._path is not None
        rows = np.fromfile(self._path, "<f4", (stop - start) * width, offset=self._offset + 4 * start * width)
        if rows.size != (stop - start) * width:
            raise InputError(f"{self._path}: ends before row {stop}; its header promises {len(self)} rows")
        return rows.reshape(stop - start, width).astype(np.float32, copy=False)

    def _open(self, path: Path) -> tuple[tuple[int, ...], int]:
        """Read the header: the shape, and where the values begin. A Fortran or big-endian file is read whole."""
        input_file(path, "file of audio features")
        try:
            with path.open("rb") as file, no_warnings():  # Python's warnings about the header
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(file)
                offset = file.tell()
                size = file.seek(0, 2)
            if any(isinstance(side, bool) or not 0 <= side < 2**63 for side in shape):
                raise ValueError("its header promises a shape that no array has")
        except Exception as error:  # the header is a Python expression: a damaged one makes NumPy raise nearly anything
            reason = str(error).splitlines()[0] if str(error) else "its header cannot be read"
            raise InputError(f"{path}: not a .npy file of audio features ({reason})") from error
        if dtype.kind != "f" or dtype.itemsize != 4:
            raise InputError(f"{path}: dtype is {dtype}; expected float32")
        if size - offset < 4 * math.prod(shape):
            raise InputError(f"{path}: is cut short; its header promises shape {shape}")
        if fortran or dtype.byteorder == ">":
            self._array = np.ascontiguousarray(np.load(path, allow_pickle=False), dtype=np.float32)
        return shape, offset

    def _check_finite(self) -> None:
        step = max(1, _CHECK_BYTES // (4 * math.prod(self.shape[1:])))
        for start in range(0, len(self), step):
            finite = np.isfinite(self.rows(start, min(start + step, len(self)))).all(axis=1)
            if not finite.all():
                raise InputError(f"{self.name}: row {start + int(np.argmin(finite))} holds NaN or infinite values")


def _row_size(mode: Mode) -> int:
    """Values in a row of features."""
    return math.prod(AUDIO_SHAPES[mode]) // WINDOW_ROWS


def _fits(shape: tuple[int, ...], mode: Mode) -> bool:
    """Whether this is a shape of a mode's features: rows, or windows."""
    return shape[1:] == AUDIO_SHAPES[mode] or (len(shape) > 1 and math.prod(shape[1:]) == _row_size(mode))


def audio_windows(features: ArrayLike | Tensor, mode: Mode = "ave") -> Tensor:
    """Return all windows of a clip's features, one a video frame: float32 (N, *AUDIO_SHAPES[mode]).

    Args:
        features: (N, …), one row a video frame, as :class:`SpeechFeatures` takes it.
        mode: the kind of features: ``"ave"``, ``"hubert"`` or ``"wenet"``.

    Raises:
        InputError: as :class:`SpeechFeatures`.
    """
    speech = SpeechFeatures(features, mode)
    return speech.windows(0, len(speech))


def save_features(features: np.ndarray | Tensor, path: str | Path, *, bin: bool = False) -> list[Path]:
    """Write features as ``.npy``; with ``bin`` also as the pair for programs in other languages.

    The pair is ``NAME.bin`` and ``NAME.bin.json`` beside ``NAME.npy``: see :func:`save_features_bin`.
    Each file appears under its name only when it is whole.

    Args:
        features: ``(N, …)``, written as float32.
        path: the ``.npy`` file (the suffix is added if it is missing); its folder must exist.
        bin: write the pair too.

    Returns:
        The paths written, the ``.npy`` first.

    Raises:
        OutputError: a file cannot be written.
    """
    array = np.ascontiguousarray(as_array(features), dtype="<f4")
    path = Path(path)
    if path.name and path.suffix != ".npy":
        path = path.with_name(path.name + ".npy")
    with replacing(path) as temporary, temporary.open("wb") as file:  # np.save and tofile do not say why they fail
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)
    if not bin:
        return [path]
    raw = save_features_bin(array, path.with_suffix(".bin"))
    return [path, raw, raw.with_name(raw.name + ".json")]


def write_features(pieces: Iterable[Tensor], path: str | Path) -> None:
    """Write features to a ``.npy`` as they come, never holding the whole.

    Args:
        pieces: (n, 512) each.
        path: a temporary file, which may exist.
    """
    count = 0

    def header() -> int:
        facts = {"descr": "<f4", "fortran_order": False, "shape": (count, FEATURES)}
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, facts)  # has room for any count
        return file.tell()

    with Path(path).open("wb") as file:
        begin = header()
        for piece in pieces:
            count += len(piece)
            file.write(np.ascontiguousarray(piece.cpu().numpy(), dtype="<f4").tobytes())
        end = header()
    assert end == begin


def save_features_bin(features: ArrayLike | Tensor, path: str | Path) -> Path:
    """Write features for programs in other languages: ``path`` and ``path`` + ``.json``.

    The first holds the values, little-endian float32 in C order; the second ``num_frames``, ``feature_size`` (values a
    row) and ``shape``. Returns ``path``.

    Raises:
        OutputError: a file cannot be written.
    """
    path = Path(path)
    values = np.ascontiguousarray(as_array(features), dtype="<f4")
    facts = {"num_frames": values.shape[0], "feature_size": math.prod(values.shape[1:]), "shape": list(values.shape)}
    with replacing(path) as temporary:
        temporary.write_bytes(values.data)
    with replacing(path.with_name(path.name + ".json")) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n")
    return path
