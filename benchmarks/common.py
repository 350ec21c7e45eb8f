"""What all benchmarks share: timing, facts about the machine, and rows that say how a figure came about."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from functools import cache, wraps
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec, TypeVar

import numpy as np
import torch

from gpupipe.errors import InputError
from gpupipe.files import make_folder
from gpupipe.versions import device_name
from gpupipe.versions import versions as gpupipe_versions

Given = ParamSpec("Given")
Result = TypeVar("Result")

ROOT = Path(__file__).resolve().parents[1]
IN_REPOSITORY = (ROOT / "pyproject.toml").is_file()
"""False where gpupipe was installed from a wheel: no repository is around this file, and no commit is known."""

RESULTS = ROOT / "benchmarks" / "results" if IN_REPOSITORY else Path("gpupipe-results")
"""Where rows are appended."""


# ── timing ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Spread:
    """The 20th, 50th and 80th percentile of ``n`` measurements."""

    p20: float
    p50: float
    p80: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Percentiles by linear interpolation; of two or three values they are a range and no statistic."""
        p20, p50, p80 = (float(p) for p in np.percentile(values, [20, 50, 80]))
        return cls(p20, p50, p80, len(values))

    def map(self, function: Callable[[float], float]) -> Spread:
        """The spread in another unit, by a monotonic function: seconds a frame → frames a second, for example."""
        p20, p50, p80 = sorted(function(p) for p in (self.p20, self.p50, self.p80))
        return Spread(p20, p50, p80, self.n)


def timed(function: Callable[[], object], device: str | torch.device) -> float:
    """Seconds of one call. A CUDA device is waited for: launch and idle time count, as for whoever needs the result."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(
    function: Callable[[], object], *, rounds: int, warmup: int = 1, device: str | torch.device = "cpu"
) -> Spread:
    """Seconds of one call, by :func:`timed`, over ``rounds`` calls, after ``warmup`` calls that do not count."""
    for _ in range(warmup):
        timed(function, device)
    return Spread.of([timed(function, device) for _ in range(rounds)])


def tuned(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """``function`` with cuDNN at its best: it tries its algorithms, once for each shape."""

    @wraps(function)
    def run(*arguments: Given.args, **named: Given.kwargs) -> Result:
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        try:
            return function(*arguments, **named)
        finally:
            torch.backends.cudnn.benchmark = before

    return run


# ── the machine ───────────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def driver_version(device: str | torch.device = "cpu") -> str | None:
    """Version of the GPU's driver; None for the CPU, or where it cannot be read."""
    if torch.device(device).type != "cuda":
        return None
    lines = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return lines.splitlines()[0].strip() if lines else None


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that a figure depends on."""
    found = {name: version for name, version in gpupipe_versions().items() if version != "missing"}
    if opencv := package_version("opencv-python-headless"):
        found["opencv"] = opencv
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def package_version(name: str) -> str | None:
    """Version of a package; None where it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


@cache
def commit() -> str:
    """The commit that is measured, with ``-dirty`` where a tracked file outside benchmarks/results differs.

    ``$GPUPIPE_COMMIT`` names it where the files came without their history. Outside a repository it is the installed
    version: ``gpupipe 0.1.0``.
    """
    if named := os.environ.get("GPUPIPE_COMMIT"):
        return named
    if not IN_REPOSITORY:
        return f"gpupipe {package_version('gpupipe') or 'of unknown version'}"
    head, top = _output_of("git", "rev-parse", "--short=12", "HEAD"), _output_of("git", "rev-parse", "--show-toplevel")
    if not head or not top or Path(top.strip()).resolve() != ROOT:  # ROOT may lie in somebody else's repository
        return "unknown"
    changed = _output_of("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return f"{head.strip()}-dirty" if changed else head.strip()


def _output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Row:
    """One figure, with all that is needed to judge or to repeat it.

    Attributes:
        what: the thing measured: ``end_to_end``, or a kernel's noun.
        provider: who did it: ``reference_loop``, ``gpupipe``, ``triton``, ``torch`` …
        metric: ``throughput``, ``latency``, ``bandwidth``, ``ratio`` …
        unit: of the percentiles.
        axis: what is varied over the rows of one table (``batch``, ``frames``, ``stage``).
        value: this row's place on the axis.
        p20: 20th percentile of the measurements; None, with the other two, where ``error`` says why there is none.
        p50: the median.
        p80: 80th percentile.
        n: how many measurements.
        config: every other choice: sizes, precision, engine, codec, template.
        device: see :func:`device_name`; driver, versions, commit and time (UTC) likewise.
        error: why there is no figure. A failure is a result too.
    """

    what: str
    provider: str
    metric: str
    unit: str
    axis: str
    value: float | str
    p20: float | None
    p50: float | None
    p80: float | None
    n: int
    config: dict[str, Any]
    device: str
    driver: str | None = None
    versions: dict[str, str] = field(default_factory=versions)
    commit: str = field(default_factory=commit)
    time: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As it stands in a file of results."""
        return asdict(self)


def row(
    spread: Spread | None,
    *,
    what: str,
    provider: str,
    metric: str,
    unit: str,
    axis: str,
    value: float | str,
    config: dict[str, Any],
    device: str | torch.device = "cpu",
    error: str | None = None,
) -> Row:
    """A row with the machine's facts filled in; without a ``spread`` it must say why, in ``error``."""
    if (spread is None) == (error is None):
        raise ValueError(f"spread is {spread} and error {error!r}; expected exactly one of them")
    return Row(
        what=what,
        provider=provider,
        metric=metric,
        unit=unit,
        axis=axis,
        value=value,
        p20=spread.p20 if spread else None,
        p50=spread.p50 if spread else None,
        p80=spread.p80 if spread else None,
        n=spread.n if spread else 0,
        config=config,
        device=device_name(device),
        driver=driver_version(device),
        error=error,
    )


Record = dict[str, Any]
"""A recorded row, as :meth:`Row.as_dict` gives it."""


def read_rows(folder: Path = RESULTS) -> list[Record]:
    """Every recorded row, oldest first.

    Raises:
        InputError: a line that is no row.
    """
    rows: list[Record] = []
    needed = [field.name for field in fields(Row)]
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if not isinstance(found, dict) or not found.keys() >= {*needed}:
                raise InputError(f"{path}: line {number} is no recorded row; expected JSON with {', '.join(needed)}")
            rows.append(found)
    return sorted(rows, key=lambda row: str(row["time"]))


def append_rows(rows: Iterable[Row], folder: Path = RESULTS) -> list[Path]:
    """Append each row as a line of JSON to ``<folder>/<device>.jsonl``; returns the files written to."""
    lines: dict[Path, list[str]] = {}
    for one in rows:
        slug = re.sub(r"[^a-z0-9]+", "-", one.device.lower()).strip("-")
        lines.setdefault(folder / f"{slug}.jsonl", []).append(json.dumps(one.as_dict(), ensure_ascii=False))
    make_folder(folder)
    for path, new in lines.items():
        with path.open("a+b") as file:
            if file.tell() and not _ends_a_line(file):  # what came before was cut short
                file.write(b"\n")
            file.writelines(f"{line}\n".encode() for line in new)
    return list(lines)


def add_record_options(parser: argparse.ArgumentParser) -> None:
    """Whether a benchmark's rows are to be appended, and to which folder."""
    parser.add_argument("--record", action="store_true", help="append the rows to the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
