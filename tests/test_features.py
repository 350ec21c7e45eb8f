"""Speech features: the windows of the contract, files read in pieces, and every file that is refused."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import gpupipe.features
from gpupipe import InputError, OutputError, SpeechFeatures, audio_windows
from gpupipe.benchmarks.reference_loop import audio_window
from gpupipe.features import FRAME_RATES, save_features, save_features_bin, write_features
from gpupipe.models import AUDIO_SHAPES, MODES, Mode

Array = np.ndarray

ROW_SHAPES: dict[Mode, list[tuple[int, ...]]] = {
    "ave": [(512,)],
    "hubert": [(2, 1024), (2048,)],
    "wenet": [(16, 512), (8192,)],
}


def random_rows(*shape: int) -> Array:
    return np.random.default_rng(shape[0]).standard_normal(shape).astype(np.float32)


def saved(array: Array, folder: Path) -> Path:
    np.save(folder / "features.npy", array)
    return folder / "features.npy"


# ── windows ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 40])
@pytest.mark.parametrize(("mode", "row"), [(mode, row) for mode in MODES for row in ROW_SHAPES[mode]])
def test_windows_are_the_contract_s(mode: Mode, row: tuple[int, ...], length: int) -> None:
    features = random_rows(length, *row)
    windows = audio_windows(features, mode)
    assert windows.dtype == torch.float32
    expected = np.stack([audio_window(features, i, mode) for i in range(length)])
    assert np.array_equal(windows.numpy(), expected)


def test_rows_by_hand() -> None:
    features = np.repeat(np.arange(1, 31, dtype=np.float32)[:, None], 512, axis=1)
    rows = audio_windows(features).reshape(30, 16, 512)[:, :, 0]
    assert rows[0].tolist() == [0] * 8 + [1, 2, 3, 4, 5, 6, 7, 8]
    assert rows[10].tolist() == list(range(3, 19))
    assert rows[29].tolist() == list(range(22, 31)) + [0] * 7


@pytest.mark.parametrize("mode", MODES)
def test_windowed_features_pass(mode: Mode, tmp_path: Path) -> None:
    features = random_rows(3, *AUDIO_SHAPES[mode])
    for source in (features, saved(features, tmp_path)):
        speech = SpeechFeatures(source, mode)
        assert len(speech) == 3
        assert np.array_equal(speech.windows(1, 3).numpy(), features[1:])


@pytest.mark.parametrize("start", [0, 1, 5, 11, 30])
@pytest.mark.parametrize("count", [1, 4, 10])
def test_a_part_is_a_part_of_the_whole(start: int, count: int) -> None:
    """A window does not know which batch asks for it."""
    speech = SpeechFeatures(random_rows(40, 512))
    assert torch.equal(speech.windows(start, start + count), speech.windows(0, 40)[start : start + count])


def test_bfloat16_is_float32_of_eight_bits(tmp_path: Path) -> None:
    features = torch.from_numpy(random_rows(5, 512)).bfloat16()
    assert torch.equal(audio_windows(features), audio_windows(features.float()))
    save_features_bin(features.requires_grad_(), tmp_path / "out.bin")
    assert np.array_equal(np.fromfile(tmp_path / "out.bin", "<f4").reshape(5, 512), features.detach().float().numpy())


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy, lambda array: torch.from_numpy(array).requires_grad_()])
def test_arrays_and_tensors_are_taken(make: Callable[[Array], object]) -> None:
    features = random_rows(5, 512)
    assert np.array_equal(audio_windows(make(features)).numpy(), audio_windows(features).numpy())


def test_double_precision_and_strided_arrays_are_taken() -> None:
    features = random_rows(20, 1024)[::2, ::2]
    assert torch.equal(audio_windows(features.astype(np.float64)), audio_windows(features.copy()))
    assert torch.equal(audio_windows(features), audio_windows(features.copy()))


def test_windows_are_copies() -> None:
    """Who writes into a window must not change the features."""
    features = random_rows(3, *AUDIO_SHAPES["ave"])
    before = features.copy()
    audio_windows(features).zero_()
    assert np.array_equal(features, before)


def test_frame_rates() -> None:
    assert FRAME_RATES == {"ave": 25, "hubert": 25, "wenet": 20}


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "store",
    [
        np.ascontiguousarray,
        np.asfortranarray,
        lambda array: array.astype(">f4"),
        lambda array: np.asfortranarray(array.astype(">f4")),
    ],
    ids=["c_order", "fortran_order", "big_endian", "big_endian_fortran"],
)
@pytest.mark.parametrize("row", [(512,), (16, 32)])
def test_file_gives_the_array_s_windows(row: tuple[int, ...], store: Callable[[Array], Array], tmp_path: Path) -> None:
    features = random_rows(21, *row)
    speech = SpeechFeatures(saved(store(features), tmp_path))
    assert speech.shape == features.shape
    assert torch.equal(speech.windows(0, 21), audio_windows(features))
    assert torch.equal(speech.windows(13, 15), audio_windows(features)[13:15])


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_format(version: tuple[int, int], tmp_path: Path) -> None:
    features = random_rows(9, 512)
    with (tmp_path / "features.npy").open("wb") as file:
        np.lib.format.write_array(file, features, version=version)
    assert torch.equal(SpeechFeatures(tmp_path / "features.npy").windows(0, 9), audio_windows(features))


def test_file_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(random_rows(3000, 512), tmp_path)
    counts: list[int] = []
    fromfile = np.fromfile

    def counted(file: Path, dtype: str, count: int, *, offset: int) -> Array:
        counts.append(count)
        return fromfile(file, dtype, count, offset=offset)

    monkeypatch.setattr(np, "fromfile", counted)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("the whole file is read"))
    monkeypatch.setattr(gpupipe.features, "_CHECK_BYTES", 100 * 512 * 4)
    speech = SpeechFeatures(str(path))
    assert (max(counts), sum(counts)) == (100 * 512, 3000 * 512), "checking takes a hundred rows at a time, each once"
    counts.clear()
    speech.windows(1000, 1004)
    assert counts == [19 * 512], "four frames see 19 rows"


@pytest.mark.parametrize("row", [0, 99, 100, 2999])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_value_that_is_not_finite_is_found_in_any_piece(
    value: float, row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpupipe.features, "_CHECK_BYTES", 100 * 512 * 4)
    features = np.zeros((3000, 512), dtype=np.float32)
    features[row, 511] = value
    path = saved(features, tmp_path)
    with pytest.raises(InputError, match=f"row {row} holds NaN or infinite values") as caught:
        SpeechFeatures(path)
    assert str(caught.value).startswith(f"{path}: ")
    with pytest.raises(InputError, match=f"^audio features: row {row} holds"):
        SpeechFeatures(features)


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────


def refusal(path: Path, mode: Mode = "ave") -> str:
    """The message with which a file is refused: one line that names it."""
    with pytest.raises(InputError) as caught:
        SpeechFeatures(path, mode)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("mode", "shape", "others"),
    [
        ("ave", (10, 511), None),
        ("ave", (512,), None),
        ("ave", (), None),
        ("ave", (10, 2, 1024), "hubert"),
        ("ave", (10, 32, 16, 15), None),
        ("ave", (10, 16, 512), "wenet"),
        ("ave", (10, 0), None),
        ("hubert", (10, 512), "ave"),
        ("hubert", (10, 32, 16, 16), "ave or wenet"),
        ("wenet", (10, 2048), "hubert"),
    ],
)
def test_wrong_shape(mode: Mode, shape: tuple[int, ...], others: str | None, tmp_path: Path) -> None:
    """Of another mode's features, which one's."""
    row = math.prod(AUDIO_SHAPES[mode]) // 16
    message = refusal(saved(np.zeros(shape, np.float32), tmp_path), mode)
    assert f"shape is {shape}; expected (N, {row}) or (N, {', '.join(map(str, AUDIO_SHAPES[mode]))})" in message
    assert message.endswith(f"for mode {mode}" + (f"; mode {others} takes it" if others else ""))


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "uint8", "complex64", "bool", "datetime64[s]"])
def test_wrong_dtype(dtype: str, tmp_path: Path) -> None:
    path = saved(np.zeros((10, 512), dtype), tmp_path)
    assert f"dtype is {dtype}; expected float32" in refusal(path)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "code-was-run"

    class Armed:
        def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
            return Path.touch, (mark,)

    np.save(tmp_path / "armed.npy", np.array([Armed()], dtype=object), allow_pickle=True)
    assert "dtype is object" in refusal(tmp_path / "armed.npy")
    assert not mark.exists()
    np.load(tmp_path / "armed.npy", allow_pickle=True)
    assert mark.exists(), "else nothing was armed"


@pytest.mark.parametrize("shape", [(0, 512), (0, 32, 16, 16)])
def test_no_rows(shape: tuple[int, ...], tmp_path: Path) -> None:
    assert "has no rows; expected one a video frame" in refusal(saved(np.zeros(shape, np.float32), tmp_path))


@pytest.mark.parametrize("kept", [0, 5, 60, 128, 1000, 10 * 512 * 4 + 127])
def test_truncated_file(kept: int, tmp_path: Path) -> None:
    path = saved(random_rows(10, 512), tmp_path)
    content = path.read_bytes()
    assert len(content) == 10 * 512 * 4 + 128
    path.write_bytes(content[:kept])
    message = refusal(path)
    assert "not a .npy file" in message or "is cut short; its header promises shape (10, 512)" in message


@pytest.mark.parametrize(
    "content", [b"1.0 2.0\n", b"PK\x03\x04" + bytes(100), b"\x93NUMPY\x01\x00\x10\x00not a header\n  "]
)
def test_file_that_is_something_else(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "features.npy"
    path.write_bytes(content)
    assert "not a .npy file of audio features" in refusal(path)


@pytest.mark.parametrize(
    "facts",
    [
        "'descr': '<f4', 'fortran_order': False, 'shape': (-2, 512)",
        "'descr': '<f4', 'fortran_order': False, 'shape': (2, -2, -256)",
        f"'descr': '<f4', 'fortran_order': False, 'shape': (0x{'f' * 9000}, 512)",
        "'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775808, 512)",
        "'descr': (), 'fortran_order': False, 'shape': (2, 512)",
        "'descr': '<f4', 'fortran_order': False, 'shape': " + "-" * 9000 + "1",
        "'descr': '<f4', 'fortran_order': False, 'shape': " + "(" * 500,
        "'descr': '<f4', 'fortran_order': False, 'shape': (True, 512)",
        "1if 1else 1",
    ],
)
def test_header_that_no_array_has(facts: str, tmp_path: Path) -> None:
    """Found by fuzzing: each made NumPy or what follows raise something else than it raises for others."""
    header = f"{{{facts}}}\n".encode()
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(2 * 512 * 4)
    (tmp_path / "features.npy").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # they would be printed beside the one line
        assert "not a .npy file of audio features" in refusal(tmp_path / "features.npy")


def test_files_that_threads_open_at_once_leave_python_s_warnings_as_they_were(tmp_path: Path) -> None:
    np.save(tmp_path / "sound.npy", np.zeros((1, 512), np.float32))
    before = list(warnings.filters)
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda _: SpeechFeatures(tmp_path / "sound.npy"), range(2400)))
    assert list(warnings.filters) == before


def test_missing_file_and_directory(tmp_path: Path) -> None:
    assert "no such file of audio features" in refusal(tmp_path / "absent.npy")
    assert "is a folder; expected an ordinary file" in refusal(tmp_path)


def test_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    path = saved(random_rows(40, 512), tmp_path)
    speech = SpeechFeatures(path)
    with path.open("r+b") as file:
        file.truncate(128 + 20 * 512 * 4)
    assert len(speech.windows(0, 13)) == 13
    with pytest.raises(InputError, match=r"ends before row 21; its header promises 40 rows"):
        speech.windows(0, 14)


def test_unknown_mode() -> None:
    with pytest.raises(InputError, match=r"^mode is 'mel'; expected one of ave, hubert, wenet"):
        SpeechFeatures(np.zeros((3, 512), np.float32), "mel")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [np.int64, bool, "U1"])
def test_array_of_wrong_dtype(dtype: object) -> None:
    with pytest.raises(InputError, match=r"^audio features: dtype is .*; expected float32"):
        audio_windows(np.zeros((3, 512), dtype))


# ── what is written ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", [(7, 512), (5, 2, 1024), (2, 32, 16, 16)])
@pytest.mark.parametrize("store", [np.ascontiguousarray, np.asfortranarray, lambda array: array.astype(">f4")])
def test_bin_is_little_endian_float32_in_c_order(
    store: Callable[[Array], Array], shape: tuple[int, ...], tmp_path: Path
) -> None:
    features = random_rows(*shape)
    path = save_features_bin(store(features), tmp_path / "audio_features.bin")
    assert path.read_bytes() == b"".join(value.tobytes() for value in features.astype("<f4").flatten())
    facts = json.loads((tmp_path / "audio_features.bin.json").read_text())
    assert facts == {"num_frames": shape[0], "feature_size": math.prod(shape[1:]), "shape": list(shape)}
    assert {file.name for file in tmp_path.iterdir()} == {"audio_features.bin", "audio_features.bin.json"}


def test_save_features(tmp_path: Path) -> None:
    features = np.random.default_rng(0).random((7, 512), dtype=np.float32)
    paths = save_features(torch.from_numpy(features), tmp_path / "out.npy", bin=True)
    assert [path.name for path in paths] == ["out.npy", "out.bin", "out.bin.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    np.testing.assert_array_equal(np.load(paths[0]), features)
    np.testing.assert_array_equal(np.fromfile(paths[1], dtype="<f4").reshape(7, 512), features)
    assert json.loads(paths[2].read_text()) == {"num_frames": 7, "feature_size": 512, "shape": [7, 512]}


def test_save_features_takes_half_precision(tmp_path: Path) -> None:
    features = torch.rand(7, 512).bfloat16().requires_grad_()
    [path] = save_features(features, tmp_path / "out.npy")
    np.testing.assert_array_equal(np.load(path), features.detach().float().numpy())


@pytest.mark.parametrize("name", ["out", "take.2"])
def test_save_features_adds_the_suffix_and_leaves_the_pair_out(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.npy"
    assert save_features(np.zeros((2, 512)), tmp_path / name) == [path]
    assert np.load(path).dtype == np.float32
    assert list(tmp_path.iterdir()) == [path]


def test_features_are_written_as_they_come(tmp_path: Path) -> None:
    features = torch.from_numpy(random_rows(7, 512))
    write_features(iter(features.split([1, 4, 2])), tmp_path / "out.npy")
    assert np.array_equal(np.load(tmp_path / "out.npy"), features.numpy())


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of files there")
@pytest.mark.parametrize("write", [save_features, save_features_bin])
def test_why_features_cannot_be_written_is_told(write: Callable[[Array, Path], object], tmp_path: Path) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"f\.npy: cannot be written: File too large"):
            write(random_rows(7, 512), tmp_path / "f.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "no" / "out.npy"
    with pytest.raises(OutputError) as raised:
        save_features(np.zeros((2, 512)), path)
    assert str(path) in str(raised.value)


def test_a_folder_is_no_name_of_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=r"^\.: is a folder; expected the name of a file to write"):
        save_features(np.zeros((2, 512)), ".")
