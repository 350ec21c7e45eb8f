"""Reading checkpoints: tensors only, and every key where it belongs."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from gpupipe.errors import CheckpointError, one_line
from gpupipe.files import input_file
from gpupipe.models.pickles import nests_too_deep
from gpupipe.models.unet328 import AUDIO_SHAPES, CHANNELS, MODES, Mode, UNet328
from gpupipe.quiet import no_warnings

Module = TypeVar("Module", bound=nn.Module)

MAX_WIDTH = 4
"""The widest U-Net that is read: a few bytes may promise a network that no memory holds."""

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
"""Names under which training programs save a state dict, beside an optimizer's and other facts."""


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from ``.pth`` (a zip of tensors, never an arbitrary pickle) or ``.safetensors``, on the CPU.

    A ``.pth`` that wraps its state dict under one of :data:`WRAPPERS` is unwrapped, and a prefix that every key has is
    dropped: ``module.``, as ``DataParallel`` saves, or ``_orig_mod.``, as a compiled network does.

    Raises:
        CheckpointError: the file is missing, unreadable, or holds anything but named tensors.
    """
    path = input_file(path, "checkpoint file", CheckpointError)
    try:
        state = _read(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds something other than tensors, or is not a checkpoint; expected a state dict of tensors"
        ) from error
    except Exception as error:  # a damaged file makes the readers raise nearly anything
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({one_line(error)[:200]})") from error
    for wrapper in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{path}: holds {type(state).__name__}; expected a state dict, name → tensor")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            entry = repr(name)[:80] if isinstance(name, (str, int)) else f"under a {type(name).__name__}"
            raise CheckpointError(f"{path}: entry {entry} is {type(value).__name__}; expected a tensor under a name")
        if kind := _unusual(value):
            raise CheckpointError(f"{path}: entry {name[:80]!r} is a {kind} tensor; expected a dense one")
    for prefix in ("module.", "_orig_mod.", "module."):  # either around the other
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def _read(path: Path) -> Any:
    """What a checkpoint file holds."""
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if nests_too_deep(path):
        raise pickle.UnpicklingError
    if zipfile.is_zipfile(path):
        _check_sums(path)
    with no_warnings():  # about tensors that are refused later
        return torch.load(path, map_location="cpu", weights_only=True)


def _check_sums(path: Path) -> None:
    """Raise BadZipFile if a tensor's bytes are not those that were saved, which torch does not check.

    Only members stored without compression are checked: others may be far larger than the file.
    """
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type == zipfile.ZIP_STORED and member.CRC:  # 0: torch left it out
                with archive.open(member) as content:
                    while content.read(1 << 20):
                        pass


def unfilled(make: Callable[[], Module]) -> Module:
    """A module in float32 on the CPU whose weights are to be loaded: that drawing them first advances no seed.

    Not made on the meta device, whose tensors import SymPy, which takes longer than drawing.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return make().float()


def load_into(module: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Copy ``state`` into ``module``; ``path`` is only for error messages.

    ``num_batches_tracked`` counters take no part in inference: they may be missing.

    Raises:
        CheckpointError: a key is missing, extra, misshapen or not of floats; a value is NaN or infinite in float32; or
            a variance is below 0.
    """
    own = module.state_dict()
    needed = {name for name in own if not name.endswith("num_batches_tracked")}
    for problem, names in (("lacks", needed - state.keys()), ("has unexpected", state.keys() - own.keys())):
        if names:
            first = sorted(names)[0][:80]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"{path}: {problem} {first}{more}; expected the {len(own)} entries of {_name(module)}"
            )
    values: dict[str, Tensor] = {}
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(value.shape)}; expected {tuple(own[name].shape)} for {_name(module)}"
            )
        values[name] = own_value = _converted(value, own[name].dtype, f"{path}: {name}")
        if not torch.isfinite(own_value).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinite values")
        if name.endswith("running_var") and (own_value < 0).any():
            raise CheckpointError(f"{path}: {name} holds a variance below 0")
    module.load_state_dict(values, strict=False)


def load_unet(path: str | Path, mode: Mode = "ave") -> UNet328:
    """Read a U-Net checkpoint of any width into float32, in ``eval`` mode, on the CPU.

    Raises:
        CheckpointError: as :func:`load_state_dict` and :func:`load_into`; also for a checkpoint of another mode.
    """
    state = load_state_dict(path)
    head = state.get("inc.inconv.0.conv.6.weight")
    if head is None or head.dim() != 4:
        raise CheckpointError(f"{path}: lacks inc.inconv.0.conv.6.weight; expected a checkpoint of the 328 U-Net")
    width = head.shape[0] / CHANNELS[0]
    if width > MAX_WIDTH:
        raise CheckpointError(
            f"{path}: inc.inconv.0.conv.6.weight has {head.shape[0]} channels; expected at most"
            f" {MAX_WIDTH * CHANNELS[0]}"
        )
    possible = _modes_of(state)
    if possible and mode not in possible:
        raise CheckpointError(f"{path}: is a checkpoint of mode {' or '.join(possible)}; expected mode {mode}")
    try:
        network = unfilled(lambda: UNet328(mode, width=width))
    except ValueError as error:
        raise CheckpointError(f"{path}: {head.shape[0]} channels after inc; {error}") from error
    load_into(network, state, path)
    return network.eval().requires_grad_(False)


def _modes_of(state: Mapping[str, Tensor]) -> tuple[Mode, ...]:
    """The modes whose audio branch has the first shape of ``state``'s; empty if it has none.

    AVE and HuBERT checkpoints agree in every shape (they differ in one stride, which no checkpoint records), so that
    neither can be told from the other.
    """
    first = state.get("audio_model.conv1.conv.0.weight")
    if first is None or first.dim() != 4:
        return ()
    return tuple(mode for mode in MODES if AUDIO_SHAPES[mode][0] == first.shape[1])


def _unusual(value: Tensor) -> str | None:
    """What kind of tensor this is, if not a dense one that has values; None if it is."""
    if value.is_nested:
        return "nested"
    if value.layout != torch.strided:
        return "sparse"
    if value.is_quantized:
        return "quantised"
    return "meta" if value.is_meta else None


def _converted(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``value`` in ``dtype``: weights must be floating-point, in any format; counters may have been saved as that."""
    try:
        if value.is_complex() or (dtype.is_floating_point and not value.is_floating_point()):
            raise TypeError
        return value.to(dtype)
    except (TypeError, RuntimeError) as error:  # RuntimeError: a format that only some kernels know
        met = str(value.dtype).removeprefix("torch.")
        raise CheckpointError(f"{name} is of {met}; expected {str(dtype).removeprefix('torch.')}") from error


def _name(module: nn.Module) -> str:
    if isinstance(module, UNet328):
        return f"the 328 U-Net (mode {module.mode!r}, width {module.width:g})"
    return f"the {type(module).__name__}"
