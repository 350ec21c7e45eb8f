"""What this machine can do, and which way a render would take here."""

from __future__ import annotations

import ctypes
import math
from fractions import Fraction
from typing import Any

import av
import av.codec.hwaccel
import torch

from gpupipe.device import find_device
from gpupipe.engines.base import BATCH_SIZES
from gpupipe.engines.choice import LOWER_ON_CPU, find_dtype
from gpupipe.engines.declared import DECLARED, contenders, runnable
from gpupipe.engines.measure import fastest, measure
from gpupipe.engines.remembered import recall, remember
from gpupipe.errors import first_line
from gpupipe.fallbacks import fallbacks
from gpupipe.kernels.dispatch import backend, llvm_obstacle, obstacle
from gpupipe.lanes import available_cores
from gpupipe.memory import default_budget
from gpupipe.models import UNet328
from gpupipe.seam import FEATHER
from gpupipe.versions import processor_name, versions
from gpupipe.video.codecs import PictureFormat, encoder_obstacle
from gpupipe.video.cuda import nvenc_sessions
from gpupipe.video.decode import jpeg_decoder
from gpupipe.video.ways import Way, choose_way

_ENCODERS = ("h264_nvenc", "hevc_nvenc", "av1_nvenc", "libx264", "libx265", "libsvtav1", "mjpeg", "ffv1")


def examine(device: str | None = None) -> dict[str, Any]:
    """Look at the machine.

    Args:
        device: the device that a render would be asked to use; None for the one it would choose itself.

    Returns:
        ``versions``; ``device`` (name, memory, cores); ``can`` (each ability: yes, or why not); ``render`` (the way
        that a render would take, and why); ``fallbacks``.
    """
    chosen = find_device(device)
    gpu = chosen if chosen.type == "cuda" else find_device()  # the CPU if no GPU works
    exact = chosen.type == "cpu"
    way = choose_way("auto", PictureFormat(1280, 720, Fraction(25), 20, segmented=chosen.type == "cuda"), chosen)
    return {
        "versions": versions(),
        "device": _device_facts(chosen),
        "can": {name: "yes" if reason is None else f"no: {reason}" for name, reason in _obstacles(gpu).items()},
        "render": {
            "device": f"{chosen}: " + ("asked for" if device else "there is no CUDA GPU" if exact else "a CUDA GPU"),
            "engine": _engine(chosen, exact=exact),
            "precision": f"float32; {_lower_precisions()}" if exact else "float16; --exact for float32",
            "jpeg": jpeg_decoder(chosen, exact=exact),
            "kernels": _kernels(chosen),
            "codec": _codec(way),
            "batch": f"{BATCH_SIZES[chosen.type]} frame{'s' * (BATCH_SIZES[chosen.type] > 1)}",
            "seam": f"feathered over {FEATHER:g} pixels",
            "memory budget": f"{default_budget(chosen) / 1e9:.1f} GB for what is kept of template frames",
        },
        "fallbacks": fallbacks(),
    }


def _obstacles(gpu: torch.device) -> dict[str, str | None]:
    """Return why each ability is missing, None for those that are there; a GPU's abilities are tried on ``gpu``."""
    no_gpu = None if gpu.type == "cuda" else "no CUDA GPU is available"
    found: dict[str, str | None] = {
        "Triton kernels": no_gpu or obstacle(gpu),
        "Gluon kernels": no_gpu or DECLARED["gluon"].obstacle(gpu, torch.float16),
        "LLVM kernels, on the CPU": llvm_obstacle(),
        "nvJPEG": no_gpu or _nvjpeg_obstacle(gpu),
        "NVDEC": no_gpu or _nvdec_obstacle(),
    }
    for encoder in _ENCODERS:
        nvenc = encoder.endswith("_nvenc")
        found[encoder] = (no_gpu or _nvenc_obstacle(encoder, gpu)) if nvenc else encoder_obstacle(encoder)
    return found


def _codec(way: Way) -> str:
    """Describe the way that video is encoded."""
    if way.where == "nvenc":
        return f"{way.encoder}: NVENC takes frames from the device, {way.workers} at once"
    opens = "NVENC opens" if way.encoder.endswith("nvenc") else "NVENC does not open"
    return f"{way.encoder}: {opens}; " + (f"{way.workers} encode segments" if way.workers > 1 else "one encoder")


def _engine(device: torch.device, *, exact: bool) -> str:
    """Describe the engine that auto takes for a full-width network, or what it would measure if it has not yet."""
    dtype = find_dtype(device, exact=exact, precision=None)
    with torch.device("meta"):  # only its mode and width are needed
        network = UNet328("ave")
    figures = recall(network, device, dtype)
    if figures is None:
        quick = [one.name for one in contenders(device, dtype)]
        slow = ", ".join(one.name for one in runnable(device, dtype) if one.slow_to_build)
        more = f"; --engines measures {slow} too" if slow else ""
        if len(quick) == 1:
            return quick[0] + more
        return f"auto: the fastest of {', '.join(quick)}, measured at the first render{more}"
    results = ", ".join("fails: " + name if math.isinf(ms) else f"{name} {ms:.1f}" for name, ms in figures.items())
    return f"{fastest(figures)} (ms a frame, mode ave, full width: {results})"


def measure_engines(device: str | torch.device | None = None) -> None:
    """Measure and remember how fast each engine of a device runs a full-width ave network with random weights."""
    chosen = find_device(device)
    dtype = find_dtype(chosen, exact=chosen.type == "cpu", precision=None)
    network = UNet328("ave").eval()
    measured = measure(network, chosen, dtype, runnable(chosen, dtype))
    remember(network, chosen, dtype, measured.lasting)


def _kernels(device: torch.device) -> str:
    """Describe which kernels run around the network."""
    by = backend(device)
    if by == "torch":
        return f"{by}: {llvm_obstacle() if device.type == 'cpu' else obstacle(device)}"
    return f"{by}: fused kernels around the network"


def _lower_precisions() -> str:
    """Describe what `--precision` can take on this CPU."""
    reasons = ((precision, llvm_obstacle(getattr(torch, precision))) for precision in LOWER_ON_CPU)
    return "; ".join(f"{precision}: no, {reason}" if reason else precision for precision, reason in reasons)


def _device_facts(device: torch.device) -> dict[str, str]:
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return {
            "name": facts.name,
            "memory": f"{facts.total_memory / 1e9:.1f} GB",
            "architecture": f"sm_{facts.major}{facts.minor}, {facts.multi_processor_count} multiprocessors",
        }
    return {"name": processor_name(), "cores": str(available_cores())}


def _nvjpeg_obstacle(gpu: torch.device) -> str | None:
    """Return why nvJPEG does not decode a small picture; None if it does."""
    try:
        from torchvision.io import decode_jpeg, encode_jpeg  # noqa: PLC0415 - takes a second

        decode_jpeg(encode_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8)), device=gpu)
    except (ImportError, AttributeError, RuntimeError) as error:
        return first_line(error)
    return None


def _nvdec_obstacle() -> str | None:
    """Return why NVDEC cannot be used at all, or None; whether it takes a file is known when that is opened."""
    if "cuda" not in av.codec.hwaccel.hwdevices_available():
        return "this FFmpeg has no CUDA decoder"
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError:
        return "the driver's libnvcuvid.so.1 is missing; a container needs NVIDIA_DRIVER_CAPABILITIES to name video"
    return None


def _nvenc_obstacle(encoder: str, gpu: torch.device) -> str | None:
    """Return why NVENC does not take frames from the GPU; None if it does."""
    sessions, reason = nvenc_sessions(encoder, PictureFormat(1280, 720, Fraction(25), 20), gpu)
    return None if sessions else reason
