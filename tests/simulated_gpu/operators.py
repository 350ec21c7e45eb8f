"""torch's operators on the simulated GPU: queued on the current stream, and run on the CPU when their turn comes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import threading
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

failures: list[str] = []
"""Tracebacks of queued work that failed: the code that queued it has gone on."""

_WAITS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_consecutive", "bincount"}
"""Operators that give the host a value, or a shape that depends on values."""

_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""Operators that also take indices from the host, and wait if an index is a mask."""

_NATIVE = {
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "resize_", "set_", "record_stream",
    "_pin_memory", "is_pinned", "is_same_size", "_has_compatible_shallow_copy_type", "as_strided_", "transpose_",
    "squeeze_", "unsqueeze_", "t_",
}  # fmt: skip
"""Operators that touch only a tensor's memory or shape, not its values: torch's own, on the simulated runtime."""

_runtime = ctypes.CDLL(None)  # it is loaded before all else
_runtime.simulated_gpu_queue.argtypes = [ctypes.c_void_p, ctypes.c_long]
_runtime.simulated_gpu_captures.argtypes = [ctypes.c_void_p]
_runtime.simulated_gpu_holds.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_runtime.simulated_gpu_wait.argtypes = [ctypes.c_void_p]
_Numbered = ctypes.CFUNCTYPE(None, ctypes.c_long)

_contexts = contextlib.ExitStack()  # never left
_work: dict[int, Callable[[], None]] = {}
_recorded: set[int] = set()
_numbers = itertools.count(1)


@_Numbered
def _run(number: int) -> None:
    work = _work[number] if number in _recorded else _work.pop(number)
    try:
        with torch.inference_mode(), _disable_current_modes():
            work()
    except BaseException:
        failures.append(traceback.format_exc())


def install(arch: str | None = None) -> None:
    """From now on, run work for CUDA devices on the simulated one, in this thread and those that it starts.

    Args:
        arch: Triton's kernels are compiled for this compute capability, times ten, and executed as PTX; None leaves
            them to Triton's interpreter, which does not know Gluon.
    """
    _runtime.simulated_gpu_runs(_run)
    torch.backends.cudnn.enabled = False  # whose operators have no counterpart on a CPU
    torch.empty(1, device="cuda")  # so that CUDA is initialised before anything is looked at
    _Operators().__enter__()
    thread_run = threading.Thread.run

    def run(self: threading.Thread) -> None:
        with _Operators():
            thread_run(self)

    threading.Thread.run = run  # type: ignore[method-assign]
    for module, name in ((torch.onnx, "export"), (torch.jit, "trace")):  # tracing does not see through a mode
        setattr(module, name, without_modes(getattr(module, name)))
    _give_memory_back_before_replays()
    _interpret_triton() if arch is None else _execute_triton(int(arch))


def _give_memory_back_before_replays() -> None:
    """As another capture would do: a graph that reads what nobody keeps must not find it as it was."""
    replay = torch.cuda.CUDAGraph.replay

    def unkind(self: torch.cuda.CUDAGraph) -> None:
        torch.cuda.empty_cache()
        replay(self)

    torch.cuda.CUDAGraph.replay = unkind  # type: ignore[method-assign]


def without_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


def _interpret_triton() -> None:
    """Queue Triton's kernels too; its interpreter would run them at once."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def queued(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        given = tree_map(_place, (args, kwargs))

        def work() -> None:
            args, kwargs = tree_map(_at, given)
            launch(self, *args, **kwargs)

        _queue_kernel(work, (args, kwargs))

    GridExecutor.__call__ = queued


def _execute_triton(arch: int) -> None:
    """Queue Triton's kernels, compiled for ``arch``."""
    from ptx_machine.launch import machine

    _contexts.enter_context(machine(arch, _queue_kernel))


def _queue_kernel(work: Callable[[], None], given: Any) -> None:
    device = _device(given)
    if device is not None and device.index != torch.cuda.current_device():
        raise ValueError(f"a kernel is launched on cuda:{torch.cuda.current_device()}, its tensors lie on {device}")
    _queue(work, device)


# ── work and the memory it is done on ─────────────────────────────────────────────────────────────────────────────────


class _Place:
    """Where a CUDA tensor lies. Its memory is not kept alive: as on a GPU, it may be reused before work is done."""

    def __init__(self, tensor: Tensor) -> None:
        self.pointer, self.dtype = tensor.data_ptr(), tensor.dtype
        self.shape, self.stride = tuple(tensor.shape), tensor.stride()
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        self._bytes = (last + 1) * tensor.itemsize if tensor.numel() else 0
        self._conjugate = tensor.is_conj()

    def tensor(self) -> Tensor:
        """The memory as a tensor on the CPU."""
        if not self._bytes:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)
        if not _runtime.simulated_gpu_holds(self.pointer, self._bytes):
            raise RuntimeError("an illegal memory access was encountered")
        memory = (ctypes.c_char * self._bytes).from_address(self.pointer)
        found = torch.frombuffer(memory, dtype=torch.uint8).view(self.dtype).as_strided(self.shape, self.stride)
        return found.conj() if self._conjugate else found


def _on_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


def _place(value: Any) -> Any:
    return _Place(value) if _on_cuda(value) else value


def _at(value: Any) -> Any:
    return value.tensor() if isinstance(value, _Place) else value


def _device(values: Any) -> torch.device | None:
    """The device of the CUDA tensors among values; None without any. They must share one."""
    found = {value.device for value in tree_flatten(values)[0] if _on_cuda(value)}
    if len(found) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {sorted(map(str, found))}")
    return found.pop() if found else None


def _queue(work: Callable[[], None], device: torch.device | None) -> None:
    number = next(_numbers)
    _work[number] = work
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        if _runtime.simulated_gpu_captures(stream):
            _recorded.add(number)
        _runtime.simulated_gpu_queue(stream, number)


def _wait(device: torch.device | None) -> None:
    """Wait for the current stream. A capture forbids that, and so may :func:`torch.cuda.set_sync_debug_mode`."""
    if torch.cuda.get_sync_debug_mode() == 2:
        raise RuntimeError("called a synchronizing CUDA operation")
    with torch.cuda.device(device):
        if _runtime.simulated_gpu_wait(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


# ── operators ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Operators(TorchDispatchMode):
    """Intercepts every operator that touches the device."""

    def __torch_dispatch__(
        self, func: Any, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _touches_device(types, args, kwargs) or _is_view(func) or _name(func) in _NATIVE:
            return func(*args, **kwargs)
        if _is_composite(func):
            with self:
                composed = func.decompose(*args, **kwargs)
            if composed is not NotImplemented:
                return composed
        return _perform(func, args, kwargs)


def _name(func: Any) -> str:
    return str(func._schema.name).removeprefix("aten::")


def _touches_device(types: tuple[type, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a CUDA tensor is given or wanted. Not if a subclass of Tensor is involved, as in tracing."""
    if any(issubclass(one, Tensor) and one not in (Tensor, torch.nn.Parameter) for one in types):
        return False
    values = tree_flatten((args, kwargs))[0]
    return any(_on_cuda(one) or (isinstance(one, torch.device) and one.type == "cuda") for one in values)


def _perform(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = _name(func)
    if name == "copy_":
        return _copy(*args, **kwargs)
    if name == "_to_copy":
        return _to(*args, **kwargs)
    masked = False
    if name in _INDEXING:
        indices = [index for index in args[1] if index is not None]
        masked = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        if masked or not all(map(_on_cuda, indices)):
            _wait(args[0].device)
    else:
        values = tree_flatten((args, kwargs))[0]
        if any(isinstance(value, Tensor) and value.dim() and not _on_cuda(value) for value in values):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda and cpu ({func})")
    now = name in _WAITS or (masked and name == "index")
    return (_now if now else _later)(func, args, kwargs)


@functools.cache
def _is_view(func: Any) -> bool:
    if _is_composite(func):
        return False  # some return a view only if their input has the right layout
    aliases = [returned.alias_info for returned in func._schema.returns]
    written = any(one.alias_info is not None and one.alias_info.is_write for one in func._schema.arguments)
    return bool(aliases) and None not in aliases and not written


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether an operator is composed of others; in inference mode torch has not decomposed it."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Generator):  # not the numbers that a GPU would draw, but the same ones each time
        return torch.Generator().manual_seed(value.initial_seed())
    return torch.device("cpu") if isinstance(value, torch.device) else _at(value)


def _later(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Allocate an operator's results, and queue their computation."""
    given = tree_map(_place, (args, {key: value for key, value in kwargs.items() if key != "pin_memory"}))

    def compute() -> Any:
        args, kwargs = tree_map(_on_cpu, given)
        if func._schema.name == "aten::convolution":  # which a CPU is slow at in half precision; a GPU adds in float32
            args = tree_map(lambda one: one.float() if isinstance(one, Tensor) else one, args)
        return func(*args, **kwargs)

    device = _device((args, kwargs)) or torch.device(kwargs["device"])
    written = [one for one in enumerate(func._schema.arguments) if one[1].alias_info and one[1].alias_info.is_write]
    if written:
        _queue(compute, device)
        results = [kwargs[one.name] if one.name in kwargs else args[i] for i, one in written]
        return results[0] if len(func._schema.returns) == 1 else tuple(results[: len(func._schema.returns)]) or None
    shapes, structure = tree_flatten(_on_meta(func, args, kwargs))
    made = [torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=device) for one in shapes]
    places = [_Place(one) for one in made]

    def work() -> None:
        for place, value in zip(places, tree_flatten(compute())[0], strict=True):
            if value.shape == place.shape:  # results that are empty on a CPU are not used
                place.tensor().copy_(value)

    _queue(work, device)
    return tree_unflatten(made, structure)


def _on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator's results, without values."""

    def meta(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return torch.device("meta") if isinstance(value, torch.device) else value

    args, kwargs = tree_map(meta, (args, kwargs))
    return func(*args, **kwargs)


def _now(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Wait for the device and compute."""
    device = _device((args, kwargs))
    _wait(device)
    with _disable_current_modes():
        args, kwargs = tree_map(lambda value: _on_cpu(_place(value)), (args, kwargs))
        results = func(*args, **kwargs)
    return tree_map(lambda one: _to(one, device=device) if isinstance(one, Tensor) else one, results)


def _copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """``to.copy_(source)``. To and from pinned memory it may return before the copy is done."""
    places = _place(to), _place(source)
    pinned = all(_on_cuda(one) or one.is_pinned() for one in (to, source))
    device = source.device if _on_cuda(source) else to.device
    if not _on_cuda(source) and not (pinned and non_blocking):
        if torch.cuda.is_current_stream_capturing():
            _wait(device)  # which fails
        with _disable_current_modes():
            places = places[0], source.clone()  # as the driver does, before it returns
    _queue(lambda: _at(places[0]).copy_(_at(places[1])), device)
    on_device = _on_cuda(to) and _on_cuda(source)
    if not on_device and not (non_blocking and (pinned or _on_cuda(to))):
        _wait(device)
    return to


def _to(
    source: Tensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
    **_: Any,
) -> Tensor:
    """``source.to(…)``. Types are converted on the device."""
    wanted = source.device if device is None else torch.device(device)
    layout: dict[str, Any] = {} if memory_format is None else {"memory_format": memory_format}
    if wanted.type == "cpu":
        converted = _to(source, dtype=dtype, **layout) if dtype not in (None, source.dtype) else source
        return _copy(
            torch.empty_like(converted, device="cpu", pin_memory=non_blocking, **layout), converted, non_blocking
        )
    moved = source
    if not _on_cuda(source):
        moved = _copy(torch.empty_like(source, device=wanted, **layout), source, non_blocking)
        if dtype in (None, source.dtype):
            return moved
    return _copy(torch.empty_like(moved, dtype=dtype, **layout), moved)


@contextlib.contextmanager
def no_failures() -> Any:
    """A context within which all queued work must succeed."""
    failures.clear()
    yield
    torch.cuda.synchronize()
    assert not failures, "\n".join(failures)
