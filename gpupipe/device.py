"""The device that a name means, checked in one place for every command and class."""

from __future__ import annotations

import torch

from gpupipe.errors import DeviceError, DeviceLostError, first_line
from gpupipe.fallbacks import note_fallback


def find_device(device: str | torch.device | None = None, *, here: bool = True) -> torch.device:
    """Return the device of a name; None or ``auto`` means a CUDA GPU if there is one that works, else the CPU.

    ``cuda`` becomes the number of the GPU that is current now: in other threads, or later, another may be current.

    Args:
        here: whether this machine must have the device; False only checks the name, for another machine.

    Raises:
        DeviceError: an unknown name, or a GPU that is missing or does not work.
    """
    asked_for = device not in (None, "auto")
    if device is None or not asked_for:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"device is {device!r}; expected cpu, cuda or cuda:N") from error
    if found.type not in {"cpu", "cuda"}:
        raise DeviceError(f"device is {str(device)!r}; expected cpu, cuda or cuda:N")
    if found.type == "cpu" or not here:
        return found
    if not torch.cuda.is_available():
        raise DeviceError(f"device is {str(device)!r}, but no CUDA GPU is available here; expected cpu")
    if (found.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device is {str(device)!r}; expected cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    found = torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
    if reason := _obstacle(found):
        if asked_for:
            raise DeviceError(f"device is {str(device)!r}, which does not work ({reason}); expected cpu")
        note_fallback(f"{found} does not work ({reason}): the CPU runs instead")
        return torch.device("cpu")
    return found


def require_alive(device: torch.device, otherwise: str) -> None:
    """Check after an error that the device still works: once a kernel has faulted, CUDA runs nothing more.

    Raises:
        DeviceLostError: it does not; the message ends with ``otherwise``.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise DeviceLostError(f"{device} is lost to this process ({first_line(error)}); {otherwise}") from error


def _obstacle(device: torch.device) -> str | None:
    """Return why PyTorch cannot run on a GPU that it sees (it may have no kernels for the architecture), or None."""
    try:
        torch.ones(1, device=device)
    except RuntimeError as error:
        return first_line(error)
    return None
