"""Plots of the recorded rows, as SVG files whose bytes depend on the rows and on matplotlib's version alone.

:func:`draw` makes them all; ``python benchmarks/tables.py`` writes them to ``benchmarks/results``.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gpupipe.benchmarks.common import Record

MINE, OTHERS, LIMIT, CLAIM = "#1b6ca8", "#8a8f98", "#c0392b", "#c9ced6"

_STYLE: dict[str, Any] = {
    "svg.hashsalt": "gpupipe",
    "svg.fonttype": "none",  # text stays text: readable, searchable, and no outlines of a font in the file
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
}


class Claim(NamedTuple):
    """A figure that somebody published; nobody here has measured it."""

    who: str
    frames_per_second: float
    hardware: str
    what: str
    source: str


CLAIMS = (
    Claim("seed, Go", 8.9, "Apple M1 Pro", "1280×720", "its authors"),
    Claim("seed, Python and ONNX", 12.6, "Apple M1 Pro", "1280×720", "its authors"),
    Claim("seed, Go, pooled", 21.7, "Apple M1 Pro", "1280×720", "its authors"),
    Claim("seed, Swift on macOS", 47, "Apple M1 Pro", "1280×720", "its authors"),
    Claim("seed, Swift on iOS", 48, "iPhone", "1280×720", "its authors"),
    Claim("LiveTalking, wav2lip256", 60, "RTX 3060", "inference only", "LiveTalking's README"),
    Claim("LiveTalking, MuseTalk", 72, "RTX 4090", "inference only", "LiveTalking's README"),
    Claim("Ultralight-Digital-Human", 100, "RTX 2080", "model loop, about", "its authors"),
    Claim("LiveTalking, wav2lip256", 120, "RTX 3080 Ti", "inference only", "LiveTalking's README"),
)

NAMES = {
    "reference_loop": "reference loop",
    "reference_loop_onnxruntime": "the same on ONNX Runtime",
    "gpupipe_exact": "gpupipe, exact",
    "gpupipe": "gpupipe",
    "gpupipe_bfloat16": "gpupipe, bfloat16",
}


# ── which rows ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Group(NamedTuple):
    """What belongs side by side: one device, one template, one width of the network."""

    device: str
    template: str
    width: float

    def __str__(self) -> str:
        network = "full-width network" if self.width == 1 else f"network of width {self.width:g}"
        return f"{self.device}; template {self.template}, {network}"

    @property
    def short(self) -> str:
        """For a plot, where room is scarce; the network is told where it is not the full one."""
        return f"{self.device}, {self.template}{'' if self.width == 1 else f', width {self.width:g}'}"


def group_of(record: Record) -> Group:
    """The group of a row."""
    config = record["config"]
    return Group(record["device"], str(config.get("template", "?")), float(config.get("width", 1)))


def clips(records: list[Record]) -> dict[Group, dict[float, dict[tuple[str, str], Record]]]:
    """Newest rows of end-to-end runs: group → frames of the clip → (provider, metric) → row."""
    found: dict[Group, dict[float, dict[tuple[str, str], Record]]] = {}
    for record in records:
        if record["what"] == "end_to_end" and record["axis"] == "frames" and record["error"] is None:
            by_length = found.setdefault(group_of(record), {})
            by_length.setdefault(record["value"], {})[record["provider"], record["metric"]] = record
    return dict(sorted(found.items()))


def longest(by_length: dict[float, dict[tuple[str, str], Record]]) -> dict[tuple[str, str], Record]:
    """The rows of the longest clip."""
    return by_length[max(by_length)]


def stages(records: list[Record]) -> dict[Group, dict[str, dict[str, Record]]]:
    """Newest rows of stages: group → stage → metric → row."""
    found: dict[Group, dict[str, dict[str, Record]]] = {}
    for record in records:
        if record["what"] == "stage" and record["error"] is None:
            found.setdefault(group_of(record), {}).setdefault(record["value"], {})[record["metric"]] = record
    return dict(sorted(found.items()))


def loop_stages(records: list[Record], group: Group) -> dict[str, float]:
    """The reference loop's milliseconds a frame by stage, newest."""
    return {
        record["value"]: record["p50"]
        for record in records
        if record["what"] == "end_to_end"
        and record["axis"] == "stage"
        and record["provider"] == "reference_loop"
        and group_of(record) == group
    }


def newest_groups(found: dict[Group, Any]) -> list[Group]:
    """The groups that a plot with little room shows: of each device the widest network."""
    by_device: dict[str, Group] = {}
    for group in found:
        kept = by_device.get(group.device)
        if kept is None or group.width > kept.width:
            by_device[group.device] = group
    return list(by_device.values())


# ── the plots ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def end_to_end(records: list[Record], figure: Any) -> None:
    """Frames a second to a finished file, measured, above what peers claim."""
    bars: list[tuple[str, float, str, str]] = []
    for group, by_length in clips(records).items():
        for provider, name in NAMES.items():
            row = longest(by_length).get((provider, "throughput"))
            if row is not None:
                colour = MINE if provider.startswith("gpupipe") else OTHERS
                bars.append((f"{name} — {group.short}", row["p50"], colour, ""))
    measured = len(bars)
    for claim in sorted(CLAIMS, key=lambda claim: claim.frames_per_second):
        label = f"{claim.who} — {claim.hardware}, {claim.what}; {claim.source}"
        bars.append((label, claim.frames_per_second, CLAIM, "////"))
    figure.set_size_inches(10, 1.1 + 0.27 * len(bars))
    axes = figure.add_axes((0.53, 0.6 / figure.get_figheight(), 0.44, 1 - 1.1 / figure.get_figheight()))
    for place, (_, value, colour, hatch) in enumerate(bars):
        axes.barh(place, value, color=colour, hatch=hatch, edgecolor="#6b7280" if hatch else colour, linewidth=0.5)
        axes.text(value * 1.04, place, f"{value:.3g}", va="center")
    axes.axhline(measured - 0.5, color="#6b7280", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(right=3 * max(value for _, value, *_ in bars))
    axes.set_xlabel("frames a second (logarithmic)")
    text = "Above the line: measured, to a finished file with sound. Hatched: published claims, not measured here;"
    figure.text(0.01, 1 - 0.28 / figure.get_figheight(), f"{text} hardware and work differ.")


def waterfall(records: list[Record], figure: Any) -> None:
    """A frame's stages one after another: the reference loop's and gpupipe's, each of ours with its floor."""
    found = stages(records)
    groups = newest_groups(found)
    figure.set_size_inches(10, 0.7 + 3.2 * len(groups))
    for number, group in enumerate(groups):
        loop = loop_stages(records, group)
        ours = [(name, metrics["time"]) for name, metrics in found[group].items()]
        axes = figure.add_subplot(len(groups), 1, number + 1)
        figure.subplots_adjust(left=0.3, right=0.97, hspace=0.5, top=0.88, bottom=0.16)
        labels: list[str] = []
        at = 0.0
        for name, milliseconds in loop.items():
            axes.barh(len(labels), milliseconds, left=at, color=OTHERS)
            labels.append(f"reference loop: {name}")
            at += milliseconds
        at = 0.0
        for name, row in ours:
            once = row["config"]["once"]
            axes.barh(len(labels), row["p50"], left=at, color=MINE, alpha=1 if once == "frame" else 0.45)
            axes.barh(len(labels), row["config"]["floor_ms"], left=at, color=LIMIT, height=0.3)
            labels.append(f"gpupipe: {name}{'' if once == 'frame' else ' *'}")
            at += row["p50"]
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds, stage after stage; in gpupipe's renders they overlap")
        axes.set_title(f"{group}\nred: the floor; pale, with *: once a template frame, not once a frame")


def roofline(records: list[Record], figure: Any) -> None:
    """What the network reaches under the roof of the machine, and how near each stage comes to its floor."""
    found = stages(records)
    groups = newest_groups(found)
    figure.set_size_inches(10, 0.6 + 3.2 * len(groups))
    figure.subplots_adjust(left=0.08, right=0.97, wspace=0.55, hspace=0.5, top=0.88, bottom=0.16)
    for number, group in enumerate(groups):
        left = figure.add_subplot(len(groups), 2, 2 * number + 1)
        bandwidth, rate = (_ceiling(records, group.device, metric) for metric in ("copy_bandwidth", "matrix_rate"))
        xs = [10 ** (power / 10) for power in range(-10, 51)]
        left.plot(xs, [min(rate, x * bandwidth) for x in xs], color=LIMIT)
        for name, metrics in found[group].items():
            config = metrics["time"]["config"]
            if config["operations"]:
                reached = config["operations"] / metrics["time"]["p50"] / 1e6
                left.plot(config["operations"] / config["bytes"], reached, "o", color=MINE)
                above = 7 if "speech" in name else -13
                left.annotate(
                    name.removeprefix("network, "),
                    (config["operations"] / config["bytes"], reached),
                    xytext=(0, above),
                    textcoords="offset points",
                    ha="center",
                )
        left.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="G operations/s")
        left.set_ylim(rate / 100, 2 * rate)
        left.set_title(f"{group.device}: network")
        right = figure.add_subplot(len(groups), 2, 2 * number + 2)
        names = list(found[group])
        shares = [found[group][name]["floor_share"]["p50"] for name in names]
        right.barh(range(len(names)), shares, color=MINE)
        for place, share in enumerate(shares):
            right.text(share + 1, place, f"{share:.3g} %", va="center")
        right.set_yticks(range(len(names)), names)
        right.invert_yaxis()
        right.set_xlim(0, 115)
        right.axvline(100, color=LIMIT)
        right.set_title("share of the floor's speed")


def cost(records: list[Record], figure: Any) -> None:
    """What an hour of video costs, by what an hour of the machine costs: nobody's prices, only the measured times."""
    found = clips(records)
    figure.set_size_inches(10, 5)
    axes = figure.add_axes((0.08, 0.36, 0.88, 0.57))
    prices = [10 ** (power / 10) for power in range(-20, 11)]
    styles = itertools.product(("-", "--", ":", "-."), (1.0, 2.5))
    for group, by_length in found.items():
        for provider, name in NAMES.items():
            row = longest(by_length).get((provider, "throughput"))
            if row is None:
                continue
            hours = row["config"].get("fps", 25) / row["p50"]
            colour = MINE if provider.startswith("gpupipe") else OTHERS
            label = f"{hours:.3g} h: {name} — {group.short}"
            style, width = next(styles, ("-", 1.0))
            axes.plot(prices, [price * hours for price in prices], style, linewidth=width, color=colour, label=label)
    axes.set(xscale="log", yscale="log", xlabel="an hour of the machine, $", ylabel="an hour of video, $")
    axes.set_title("Machine hours for an hour of video, by what the machine costs")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2, frameon=False, fontsize=8)


PLOTS: dict[str, Callable[[list[Record], Any], None]] = {
    "end_to_end": end_to_end,
    "stages": waterfall,
    "roofline": roofline,
    "cost": cost,
}


def draw(records: list[Record]) -> dict[str, str]:
    """Name → SVG of every plot that has rows to show.

    Raises:
        ImportError: matplotlib is missing (``gpupipe[plots]``).
    """
    import matplotlib  # noqa: PLC0415 - an extra
    from matplotlib.figure import Figure  # noqa: PLC0415

    style: Any = dict(matplotlib.rcParamsDefault)
    style.update(_STYLE)
    made = {}
    for name, plot in PLOTS.items():
        if name in ("stages", "roofline") and not stages(records):
            continue
        with matplotlib.rc_context(style):
            figure = Figure()
            plot(records, figure)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        made[name] = "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines())
    return made


def drawn_by(svg: str) -> str:
    """The version of matplotlib that drew an SVG."""
    match = re.search(r"Matplotlib v([\w.]+)", svg)
    return match[1] if match else "unknown"


def texts(svg: str) -> list[str]:
    """All that is written in an SVG: what another version of matplotlib must draw just so."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def write(folder: Path, made: dict[str, str]) -> None:
    """Write the plots as ``<name>.svg``."""
    for name, svg in made.items():
        (folder / f"{name}.svg").write_text(svg, "utf-8")


def _ceiling(records: list[Record], device: str, metric: str) -> float:
    """The newest of a device, in 10⁹ a second."""
    return float([row["p50"] for row in records if (row["device"], row["metric"]) == (device, metric)][-1])
