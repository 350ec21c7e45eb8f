"""Spoiling checkpoints, for `fuzz_cases.py`: their entries, their files' structure, and the pickles inside."""

from __future__ import annotations

import io
import json
import math
import pickle
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

Rng = random.Random
State = dict[str, Any]


class Armed:
    """Creates a file when it is unpickled: a visible stand-in for whatever an attacker would run."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (self.mark, "w")


def spoil_checkpoint(state: State, folder: Path, rng: Rng, mark: Path) -> tuple[Path, str]:
    """Write a state dict with an entry, its file's structure or its pickle spoiled; returns the file, and how."""
    form = rng.choice(["zip", "zip", "zip", "old", "safetensors", "inside", "inside", "header", "armed", "pickle"])
    if form == "armed":
        return _armed(state, folder, rng, mark)
    if form == "pickle":
        name, content = rng.choice(list(_pickles(mark).items()))
        path = folder / rng.choice(["net.pth", "net.pt", "net", "net.safetensors"])
        path.write_bytes(content)
        return path, f"pickle: {name}"
    if form == "inside":
        return _inside(state, folder, rng)
    if form == "header":
        return _safetensors_header(state, folder, rng)
    name = rng.choice(list(state))
    how = rng.choice(list(ENTRIES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spoiled = ENTRIES[how](dict(state), name, rng)
    how = f"{form}: {how} {name}"
    if form == "safetensors" and isinstance(spoiled, dict):
        path = folder / "net.safetensors"
        try:
            safetensors.torch.save_file(spoiled, path)
            return path, how
        except Exception:  # what it cannot hold goes into the other
            path.unlink(missing_ok=True)
    path = folder / "net.pth"
    torch.save(spoiled, path, _use_new_zipfile_serialization=form != "old")
    return path, how


def _changed(change: Callable[[Tensor], Any]) -> Callable[[State, str, Rng], Any]:
    """Change one entry."""

    def spoil(state: State, name: str, rng: Rng) -> State:
        state[name] = change(state[name].clone())
        return state

    return spoil


def _with_value(value: float) -> Callable[[State, str, Rng], Any]:
    def spoil(state: State, name: str, rng: Rng) -> State:
        name = rng.choice([one for one, entry in state.items() if entry.is_floating_point()])
        state[name] = state[name].clone()
        state[name].view(-1)[rng.randrange(state[name].numel())] = value
        return state

    return spoil


def _as_type(state: State, name: str, rng: Rng) -> Any:
    """Convert one entry, or all, to any type that PyTorch has."""
    types = [one for one in vars(torch).values() if isinstance(one, torch.dtype)]
    dtype = rng.choice(sorted(set(types), key=str))
    for one in [name] if rng.random() < 0.5 else list(state):
        try:
            state[one] = state[one].to(dtype)
        except (RuntimeError, NotImplementedError, TypeError):
            state[one] = torch.zeros(state[one].shape)
    return state


def _head(state: State, name: str, rng: Rng) -> Any:
    """Give the entry that tells the network's width another shape, up to one that no memory holds."""
    channels = rng.choice([0, 1, 3, 4, 8, 12, 64, 1 << 10, 1 << 14, 1 << 20, 1 << 40])
    one = torch.zeros(1, 1, 1, 1)
    for key in ("inc.inconv.0.conv.6.weight", "0.conv_block.0.weight"):
        if key in state:
            state[key] = one.expand(channels, *state[key].shape[1:])
    return state


def _all_wide(state: State, name: str, rng: Rng) -> Any:
    """Every entry with its shape in a wider network, but one stored value: kilobytes that claim to be gigabytes."""
    times = rng.choice([2, 8, 64, 4096])
    zero = torch.zeros(())
    return {
        key: zero.expand([size * times if size % 4 == 0 or size == 2 else size for size in value.shape])
        for key, value in state.items()
    }


ENTRIES: dict[str, Callable[[State, str, Rng], Any]] = {
    "no": lambda state, name, rng: {key: value for key, value in state.items() if key != name},
    "more beside": lambda state, name, rng: (
        state | {name + rng.choice([".x", " ", "\n", "ü", "[/]", "", "\0"]): torch.zeros(1)}
    ),
    "renamed": lambda state, name, rng: {key + "." if key == name else key: value for key, value in state.items()},
    "turned": _changed(lambda value: value.mT if value.dim() > 1 else value),
    "strided": _changed(lambda value: torch.stack([value, value])[0]),
    "transposed in memory": _changed(lambda value: value.t().contiguous().t() if value.dim() == 2 else value),
    "flat": _changed(lambda value: value.flatten()),
    "one more axis": _changed(lambda value: value[None]),
    "empty": _changed(lambda value: value.flatten()[:0]),
    "doubled": _changed(lambda value: torch.cat([value.flatten()] * 2)),
    "one value": _changed(lambda value: torch.zeros(()).expand(value.shape)),
    "huge": _changed(lambda value: torch.zeros(1).expand(1 << 40)),
    "sparse": _changed(lambda value: value.to_sparse()),
    "sparse rows": _changed(lambda value: (value if value.dim() == 2 else torch.eye(3)).to_sparse_csr()),
    "meta": _changed(lambda value: value.to("meta")),
    "complex": _changed(lambda value: value.to(torch.complex64)),
    "quantised": _changed(lambda value: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8)),
    "nested": _changed(lambda value: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])),
    "a parameter": _changed(lambda value: torch.nn.Parameter(value.float())),
    "with gradient": _changed(lambda value: value.float().requires_grad_()),
    "a list": _changed(lambda value: value.tolist()),
    "None": _changed(lambda value: None),
    "a dict": _changed(lambda value: {"weight": value}),
    "a string": _changed(lambda value: "weights\n" * 3),
    "an array": _changed(lambda value: value.numpy()),
    "NaN": _with_value(math.nan),
    "infinite": _with_value(-math.inf),
    "large": _with_value(1e30),
    "largest": _with_value(3e38),
    "negative": _with_value(-5.0),
    "negative variance": lambda state, name, rng: {k: -v if k.endswith("running_var") else v for k, v in state.items()},
    "beyond float32": lambda state, name, rng: (
        state | {name: torch.full(state[name].shape, 1e300, dtype=torch.float64)}
    ),
    "of type": _as_type,
    "another width": _head,
    "all wide": _all_wide,
    "keyed by number": lambda state, name, rng: dict(enumerate(state.values())),
    "keyed by tuple": lambda state, name, rng: {(key,): value for key, value in state.items()},
    "wrapped": lambda state, name, rng: {rng.choice(["state_dict", "model", "net"]): state},
    "wrapped twice": lambda state, name, rng: {"state_dict": {"model": {"state_dict": state}}},
    "wrapped and itself": lambda state, name, rng: {"state_dict": {}, **state},
    "prefixed": lambda state, name, rng: {
        rng.choice(["module.", "model."]) + key: value for key, value in state.items()
    },
    "prefixed alike": lambda state, name, rng: {"module." + key: value for key, value in state.items()},
    "only tensors": lambda state, name, rng: list(state.values()),
    "a tensor": lambda state, name, rng: state[name],
    "nothing": lambda state, name, rng: rng.choice([{}, [], None, 0, "", set()]),
    "all the same": lambda state, name, rng: dict.fromkeys(state, torch.zeros(1000)),
}


def _armed(state: State, folder: Path, rng: Rng, mark: Path) -> tuple[Path, str]:
    """A checkpoint that runs code when it is trusted."""
    path = folder / rng.choice(["net.pth", "net.pt", "net", "net.safetensors", "net.npy"])
    armed = Armed(mark)
    content = rng.choice(
        [state | {"payload": armed}, {"state_dict": state, "epoch": armed}, {next(iter(state)): armed}, armed]
    )
    form = rng.choice(["zip", "old", "pickle"])
    if form == "pickle":
        path.write_bytes(pickle.dumps({key: None for key in state} | {"x": armed}, protocol=rng.randrange(6)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path, f"armed {form}"


def _pickles(mark: Path) -> dict[str, bytes]:
    """Programs for pickle's virtual machine: deep, wide, endless or meaningless."""
    code = f"import pathlib; pathlib.Path({str(mark)!r}).touch()"
    magic = (
        pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(1001, protocol=2) + pickle.dumps({}, protocol=2)
    )
    programs = {
        "deep tuple": b"\x80\x02N" + b"\x85" * 200_000 + b".",
        "deep tuple as a key": b"\x80\x02}N" + b"\x85" * 200_000 + b"Ns.",
        "deep list": b"\x80\x02" + b"](" * 50_000 + b"e" * 50_000 + b".",
        "long number": b"\x80\x02\x8b\xff\xff\xff\x7f" + bytes(100) + b".",
        "long string": b"\x80\x02X\xff\xff\xff\xff" + bytes(100) + b".",
        "long memo": b"\x80\x02Nr\xff\xff\xff\xff.",
        "exec": b"c__builtin__\nexec\n(V" + code.encode() + b"\ntR.",
        "os.system": b"cposix\nsystem\n(Vtouch " + str(mark).encode() + b"\ntR.",
        "getattr": b"c__builtin__\ngetattr\n(ctorch\nload\nVx\ntR.",
        "instance": b"(i__builtin__\nexec\n.",
        "persistent": b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu\x8a\x08"
        b"\0\0\0\0\0\0\0\x7ftQ.",
        "tensor of nothing": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\0(K\x01t(K\x01t\x89NtR.",
        "no end": b"\x80\x02}",
        "protocol 200": b"\x80\xc8}.",
        "byte array": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
        "stack of nothing": b"\x80\x02000.",
    }
    return programs | {f"old format, {name}": magic + program for name, program in programs.items()}


def _inside(state: State, folder: Path, rng: Rng) -> tuple[Path, str]:
    """A zip of tensors that is valid except for the content of one member."""
    out = io.BytesIO()
    torch.save(state, out)
    with zipfile.ZipFile(out) as whole:
        members = {info.filename: whole.read(info) for info in whole.infolist()}
    [data] = [name for name in members if name.endswith("data.pkl")]
    target = rng.choice([data, data, data, rng.choice(list(members))])
    content = bytearray(members[target])
    way = rng.choice(["flip", "flip", "number", "cut", "gone", "empty", "longer", "deflated", "bomb"])
    if way in ("flip", "number"):
        for _ in range(rng.choice([1, 1, 3])):
            at = rng.randrange(len(content))
            content[at : at + 1] = (
                rng.randbytes(1)
                if way == "flip"
                else rng.choice([b"\xff\xff\xff\x7f", b"\0", b"\x8a\x08" + b"\x7f" * 8])
            )
    elif way == "cut":
        del content[rng.randrange(len(content)) :]
    elif way == "empty":
        content.clear()
    elif way == "longer":
        content += rng.randbytes(1000)
    members[target] = bytes(content)
    if way == "gone":
        del members[target]
    path = folder / "net.pth"
    method = zipfile.ZIP_DEFLATED if way in ("deflated", "bomb") else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as spoiled:
        for name, body in members.items():
            spoiled.writestr(name, bytes(40_000_000) if way == "bomb" and name == target else body)
    return path, f"inside: {way} {target.rsplit('/', 1)[-1]}"


def _safetensors_header(state: State, folder: Path, rng: Rng) -> tuple[Path, str]:
    """A .safetensors file with another header."""
    content = safetensors.torch.save({name: value.contiguous() for name, value in state.items()})
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = rng.choice([key for key in header if key != "__metadata__"])
    way = rng.choice(["shape", "dtype", "offsets", "length", "metadata", "extra", "text", "overlap"])
    number = rng.choice([0, -1, 1, 2**31, 2**40, 2**63, 2**64, 1.5, True, None, "1", [], 10**400])
    entry = header[name]
    if way == "shape":
        entry["shape"] = rng.choice([[number], [number, *entry["shape"]], number, [number] * 60, [2**32, 2**32]])
    elif way == "dtype":
        entry["dtype"] = rng.choice(
            ["F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "U8", "C64", "F4", "X", "", None, 3]
        )
    elif way == "offsets":
        entry["data_offsets"] = rng.choice([[number, number], [0, number], [number], [5, 0], number, [-4, 4], [0, 0]])
    elif way == "metadata":
        header["__metadata__"] = rng.choice([{"a": 1}, [], "x", {"a": "b" * 10**6}, None])
    elif way == "extra":
        header[rng.choice(["\n", "", "é", "x" * 10**5])] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    elif way == "overlap":
        header[name] = dict(rng.choice([value for key, value in header.items() if key != "__metadata__"]))
    text = json.dumps(header).encode()
    if way == "text":
        text = rng.choice(
            [
                b"",
                b"{",
                b"{}",
                b"[" * 100_000,
                b'{"a":' * 50_000,
                text[:-1],
                b"\xff" * 50,
                b"null",
                text + text,
                b"1e999",
            ]
        )
    size = rng.choice([0, 1, len(text) - 1, len(text) + 1, 2**31, 2**63, 2**64 - 1]) if way == "length" else len(text)
    path = folder / "net.safetensors"
    path.write_bytes(struct.pack("<Q", size) + text + data)
    return path, f"safetensors {way} {name}"
