"""Checkpoints: what is read, what is refused, and that nothing in a file is ever run."""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.errors import CheckpointError
from gpupipe.models import MODES, Mode, UNet328, load_state_dict, load_unet
from gpupipe.models.audio_encoder import load_audio_encoder
from gpupipe.models.checkpoint import _check_sums
from gpupipe.models.pickles import nests_too_deep

State = dict[str, Tensor]
HEAD = "outc.conv.weight"


@pytest.fixture(scope="module")
def seeded_state() -> State:
    return dict(seeded_network(width=1 / 8).state_dict())


@pytest.fixture
def state(seeded_state: State) -> State:
    """A fresh copy: tests remove keys and change values."""
    return {name: value.clone() for name, value in seeded_state.items()}


def refusal(path: Path, mode: Mode = "ave") -> str:
    """The error message for ``path``, checked to be one line that names the file."""
    with pytest.raises(CheckpointError) as caught:
        load_unet(path, mode)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


# ── what is read ──────────────────────────────────────────────────────────────────────────────────────────────────────


def as_pth(state: State, folder: Path) -> Path:
    torch.save(state, folder / "unet.pth")
    return folder / "unet.pth"


def as_safetensors(state: State, folder: Path) -> Path:
    safetensors.torch.save_file(state, folder / "unet.safetensors")
    return folder / "unet.safetensors"


def as_old_pth(state: State, folder: Path) -> Path:
    """Before PyTorch 1.6 a checkpoint was a plain pickle, not a zip."""
    torch.save(OrderedDict(state), folder / "old.pth", _use_new_zipfile_serialization=False)
    return folder / "old.pth"


def as_wrapped(state: State, folder: Path) -> Path:
    torch.save({"epoch": 7, "state_dict": state}, folder / "wrapped.pth")
    return folder / "wrapped.pth"


def as_model(state: State, folder: Path) -> Path:
    torch.save({"epoch": 7, "model": state}, folder / "model.pth")
    return folder / "model.pth"


def as_model_state_dict(state: State, folder: Path) -> Path:
    torch.save({"epoch": 7, "model_state_dict": state, "optimizer_state_dict": {"lr": 1e-3}}, folder / "last.pth")
    return folder / "last.pth"


def as_net(state: State, folder: Path) -> Path:
    torch.save({"net": state, "model": "a name", "epoch": 7}, folder / "net.pth")
    return folder / "net.pth"


def as_compiled(state: State, folder: Path) -> Path:
    torch.save({f"_orig_mod.{name}": value for name, value in state.items()}, folder / "compiled.pth")
    return folder / "compiled.pth"


def as_compiled_in_parallel(state: State, folder: Path) -> Path:
    return as_compiled({f"module.{name}": value for name, value in state.items()}, folder)


def as_parallel_around_compiled(state: State, folder: Path) -> Path:
    return as_data_parallel({f"_orig_mod.{name}": value for name, value in state.items()}, folder)


def as_data_parallel(state: State, folder: Path) -> Path:
    torch.save({f"module.{name}": value for name, value in state.items()}, folder / "parallel.pth")
    return folder / "parallel.pth"


def as_half(state: State, folder: Path) -> Path:
    """A checkpoint kept in half precision is read back into float32."""
    for name, value in state.items():
        state[name] = value.half().float()
    halves = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    torch.save(halves, folder / "half.pth")
    return folder / "half.pth"


def without_counters(state: State, folder: Path) -> Path:
    for name in [name for name in state if name.endswith("num_batches_tracked")]:
        del state[name]
    return as_pth(state, folder)


@pytest.mark.parametrize(
    "save",
    [
        as_pth, as_safetensors, as_old_pth, as_wrapped, as_model, as_model_state_dict, as_net, as_data_parallel,
        as_compiled, as_compiled_in_parallel, as_parallel_around_compiled, as_half, without_counters,
    ],
)  # fmt: skip
def test_reads_back_what_was_saved(save: Callable[[State, Path], Path], state: State, tmp_path: Path) -> None:
    network = load_unet(save(state, tmp_path))
    assert not network.training
    assert network.width == 1 / 8
    loaded = network.state_dict()
    for name, value in state.items():
        assert loaded[name].dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32)
        assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize("mode", MODES)
def test_reads_the_full_width_of_each_mode(mode: Mode, golden_checkpoint: Callable[..., Path]) -> None:
    network = load_unet(golden_checkpoint(mode), mode)
    assert (network.mode, network.width) == (mode, 1)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_path_may_be_a_string(state: State, tmp_path: Path) -> None:
    assert load_state_dict(str(as_pth(state, tmp_path))).keys() == state.keys()


def test_a_prefix_that_not_all_names_have_is_a_part_of_them(tmp_path: Path) -> None:
    torch.save({"module.a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "some.pth")
    assert load_state_dict(tmp_path / "some.pth").keys() == {"module.a", "b"}


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_missing_key(state: State, tmp_path: Path) -> None:
    del state["up3.conv.double_conv.0.conv.0.weight"]
    assert "lacks up3.conv.double_conv.0.conv.0.weight;" in refusal(as_pth(state, tmp_path))


def test_many_missing_keys_are_counted(state: State, tmp_path: Path) -> None:
    for name in [name for name in state if name.startswith("up5.")]:
        if not name.endswith("num_batches_tracked"):
            del state[name]
    message = refusal(as_pth(state, tmp_path))
    assert "lacks up5." in message
    assert "and 29 more;" in message


def test_extra_key(state: State, tmp_path: Path) -> None:
    state["up6.conv.weight"] = torch.zeros(1)
    assert "has unexpected up6.conv.weight;" in refusal(as_pth(state, tmp_path))


def test_misshapen_key(state: State, tmp_path: Path) -> None:
    state[HEAD] = torch.zeros(4, 2, 1, 1)
    message = refusal(as_pth(state, tmp_path))
    assert f"{HEAD} has shape (4, 2, 1, 1); expected (3, 2, 1, 1)" in message


def test_width_s_key_of_the_wrong_rank_is_refused(state: State, tmp_path: Path) -> None:
    """The network's width is read from this entry, before any shape is compared."""
    state["inc.inconv.0.conv.6.weight"] = torch.zeros(4)
    assert "inc.inconv.0.conv.6.weight" in refusal(as_pth(state, tmp_path))


def test_impossible_width(state: State, tmp_path: Path) -> None:
    state["inc.inconv.0.conv.6.weight"] = torch.zeros(5, 12, 1, 1)
    message = refusal(as_pth(state, tmp_path))
    assert "5 channels after inc" in message
    assert "multiple of 1/8" in message


def test_the_largest_width_is_not_refused_for_its_width(state: State, tmp_path: Path) -> None:
    state["inc.inconv.0.conv.6.weight"] = torch.zeros(128, 12, 1, 1)
    message = refusal(as_pth(state, tmp_path))
    assert "has shape" in message and "expected at most" not in message


@pytest.mark.parametrize(
    ("saved", "asked", "named"),
    [("wenet", "ave", "wenet"), ("wenet", "hubert", "wenet"), ("ave", "wenet", "ave or hubert")],
)
def test_checkpoint_of_another_mode(saved: Mode, asked: Mode, named: str, tiny_checkpoint: Callable[..., Path]) -> None:
    message = refusal(tiny_checkpoint(saved), asked)
    assert f"is a checkpoint of mode {named}; expected mode {asked}" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_value_that_is_not_finite(value: float, state: State, tmp_path: Path) -> None:
    state[HEAD][1, 1, 0, 0] = value
    assert f"{HEAD} holds NaN or infinite values" in refusal(as_pth(state, tmp_path))


def test_checkpoint_of_another_network(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(3, 4).state_dict(), tmp_path / "linear.pth")
    assert "expected a checkpoint of the 328 U-Net" in refusal(tmp_path / "linear.pth")


@pytest.mark.parametrize(
    ("content", "met"),
    [
        ({}, "holds dict"),
        (torch.zeros(3), "holds Tensor"),
        ([torch.zeros(3)], "holds list"),
        ({"epoch": 3}, "entry 'epoch' is int; expected a tensor"),
        ({0: torch.zeros(3)}, "entry 0 is Tensor; expected a tensor under a name"),
        ({"state_dict": {"lr": 0.1}}, "entry 'lr' is float; expected a tensor"),
    ],
)
def test_content_that_is_no_state_dict(content: Any, met: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    assert met in refusal(tmp_path / "other.pth")


@pytest.mark.parametrize("save", [as_pth, as_old_pth, as_safetensors])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
def test_truncated_file(kept: float, save: Callable[[State, Path], Path], state: State, tmp_path: Path) -> None:
    path = save(state, tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    refusal(path)


@pytest.mark.parametrize("name", ["text.pth", "text.safetensors"])
@pytest.mark.parametrize(
    "content", [b"not a checkpoint\n", b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", b"PK\x03\x04" + bytes(64)]
)
def test_file_that_is_something_else(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    refusal(tmp_path / name)


def test_damage_that_torch_does_not_see(state: State, tmp_path: Path) -> None:
    """Weights whose bytes have changed; a file without checksums is read as it is."""
    path = tmp_path / "unet.pth"
    for summed in (True, False):
        torch.serialization.set_crc32_options(summed)
        try:
            torch.save(state, path)
        finally:
            torch.serialization.set_crc32_options(True)
        assert load_state_dict(path).keys() == state.keys()
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle] ^= 1
        path.write_bytes(content)
        if summed:
            with pytest.raises(CheckpointError, match=r"unet\.pth: cannot be read as a checkpoint .*CRC"):
                load_state_dict(path)
        else:
            load_state_dict(path)


def test_members_that_may_be_larger_than_their_file_are_not_summed(tmp_path: Path) -> None:
    """A few compressed kilobytes may stand for gigabytes."""
    for how in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "it.pth", "w", how) as archive:
            archive.writestr("data", bytes(range(256)) * 5000)  # more than is read at once
        damaged = bytearray((tmp_path / "it.pth").read_bytes())
        damaged[100] ^= 1
        (tmp_path / "it.pth").write_bytes(damaged)
        with pytest.raises(zipfile.BadZipFile) if how == zipfile.ZIP_STORED else contextlib.nullcontext():
            _check_sums(tmp_path / "it.pth")


def test_missing_file_and_directory(tmp_path: Path) -> None:
    assert "no such checkpoint file" in refusal(tmp_path / "absent.pth")
    refusal(tmp_path)


# ── tensors that are no weights ───────────────────────────────────────────────────────────────────────────────────────


NAME = "audio_model.conv3.weight"
NO_TENSORS = "holds something other than tensors"
"""What PyTorch from 2.15 on says of nested tensors."""


@pytest.mark.filterwarnings(
    "ignore:Sparse", "ignore:Validating", "ignore:The PyTorch API of nested", "ignore:torch.quantize"
)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda value: value.to_sparse(), "is a sparse tensor; expected a dense one"),
        (lambda value: torch.eye(3).to_sparse_csr(), "is a sparse tensor; expected a dense one"),
        (lambda value: value.to("meta"), "is a meta tensor; expected a dense one"),
        (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "is a quantised tensor"),
        (
            lambda value: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
            f"is a nested tensor|{NO_TENSORS}",
        ),
        (lambda value: value.to(torch.complex64), f"{NAME} is of complex64; expected float32"),
        (lambda value: value.to(torch.int8), f"{NAME} is of int8; expected float32"),
        (lambda value: value != 0, f"{NAME} is of bool; expected float32"),
        (lambda value: torch.full(value.shape, 1e300, dtype=torch.float64), f"{NAME} holds NaN or infinite values"),
        (lambda value: torch.zeros(1).expand(1 << 40), f"{NAME} has shape (1099511627776,)"),
    ],
)
def test_tensor_that_is_no_weight(
    change: Callable[[Tensor], Tensor], told: str, state: State, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state[NAME] = change(state[NAME])
    path = as_pth(state, tmp_path)
    capfd.readouterr()
    found = refusal(path)
    assert any(one in found for one in told.split("|")), found
    assert capfd.readouterr().err == "", "nothing is said beside the error"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn])
def test_other_floating_point_numbers_are_read(dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    state[NAME] = state[NAME].to(dtype)
    assert torch.equal(load_unet(as_pth(state, tmp_path)).state_dict()[NAME], state[NAME].float())


def test_variance_below_0(state: State, tmp_path: Path) -> None:
    """The square root of a negative variance would be NaN, and every picture black."""
    state["audio_model.bn3.running_var"][1] = -0.5
    assert "audio_model.bn3.running_var holds a variance below 0" in refusal(as_pth(state, tmp_path))


def test_a_variance_of_0_is_read(state: State, tmp_path: Path) -> None:
    state["audio_model.bn3.running_var"][1] = 0
    assert load_unet(as_pth(state, tmp_path)).state_dict()["audio_model.bn3.running_var"][1] == 0


def test_network_that_no_memory_holds(state: State, tmp_path: Path) -> None:
    """One stored number may claim any shape, and the network would be built before shapes are compared."""
    state["inc.inconv.0.conv.6.weight"] = torch.zeros(()).expand(1 << 40, 12, 1, 1)
    assert "has 1099511627776 channels; expected at most 128" in refusal(as_pth(state, tmp_path))


@pytest.mark.parametrize("old", [False, True])
def test_pickle_that_nests_without_end(old: bool, tmp_path: Path) -> None:
    """Hashing such a key overflows the C stack: a failure of this test kills the process."""
    path = tmp_path / "deep.pth"
    program = b"\x80\x02}N" + b"\x85" * 200_000 + b"Ns."
    if old:
        heads = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001})
        path.write_bytes(b"".join(pickle.dumps(head, protocol=2) for head in heads) + program)
    else:
        with zipfile.ZipFile(path, "w") as members:
            for name, content in (("data.pkl", program), ("version", b"3\n"), ("byteorder", b"little")):
                members.writestr(f"archive/{name}", content)
    assert NO_TENSORS in refusal(path)


def test_many_entries_are_not_taken_for_deep_nesting(state: State, tmp_path: Path) -> None:
    """Many entries, in either format, are not nesting; 101 lists in each other are."""
    many = {f"{name}.{i}": value for name, value in state.items() for i in range(9)}
    for old in (False, True):
        torch.save({"state_dict": OrderedDict(many)}, tmp_path / "many.pth", _use_new_zipfile_serialization=not old)
        assert not nests_too_deep(tmp_path / "many.pth")
    deep: Any = 0
    for _ in range(101):
        deep = [deep]
    torch.save({"deep": deep}, tmp_path / "deep.pth")
    assert nests_too_deep(tmp_path / "deep.pth")


# ── nothing in a file is run ──────────────────────────────────────────────────────────────────────────────────────────


class Armed:
    """Unpickling it creates a file: a visible stand-in for whatever an attacker would run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def armed_zip(armed: Armed, path: Path) -> None:
    torch.save({HEAD: torch.zeros(1), "payload": armed}, path)


def armed_old_format(armed: Armed, path: Path) -> None:
    torch.save({HEAD: torch.zeros(1), "payload": armed}, path, _use_new_zipfile_serialization=False)


def armed_plain_pickle(armed: Armed, path: Path) -> None:
    path.write_bytes(pickle.dumps({HEAD: armed}, protocol=2))


@pytest.mark.parametrize("name", ["armed.pth", "armed.pt", "armed", "armed.safetensors"])
@pytest.mark.parametrize("save", [armed_zip, armed_old_format, armed_plain_pickle])
def test_code_in_a_checkpoint_is_refused_and_not_run(
    save: Callable[[Armed, Path], None], name: str, tmp_path: Path
) -> None:
    path, mark = tmp_path / name, tmp_path / "code-was-run"
    save(Armed(mark), path)
    refusal(path)
    assert not mark.exists()


@pytest.mark.parametrize("save", [armed_zip, armed_old_format, armed_plain_pickle])
def test_code_in_an_audio_encoder_is_refused_and_not_run(save: Callable[[Armed, Path], None], tmp_path: Path) -> None:
    path, mark = tmp_path / "armed.pth", tmp_path / "code-was-run"
    save(Armed(mark), path)
    with pytest.raises(CheckpointError, match=r"armed\.pth: holds something other than tensors"):
        load_audio_encoder(path)
    assert not mark.exists()


@pytest.mark.parametrize("save", [armed_zip, armed_old_format])
def test_armed_checkpoint_would_run_if_it_were_trusted(save: Callable[[Armed, Path], None], tmp_path: Path) -> None:
    """Otherwise the tests above would pass whatever the loader did."""
    path, mark = tmp_path / "armed.pth", tmp_path / "code-was-run"
    save(Armed(mark), path)
    torch.load(path, weights_only=False)
    assert mark.exists()


def test_whole_network_instead_of_its_state(tmp_path: Path) -> None:
    """``torch.save(network)`` keeps references to classes, which only an untrusting reader can refuse."""
    torch.save(UNet328(width=1 / 8), tmp_path / "network.pth")
    assert "other than tensors" in refusal(tmp_path / "network.pth")
