"""Plots of the recorded rows, as SVG files whose bytes depend on the rows and on matplotlib's version alone.

:func:`draw` makes them all; ``python benchmarks/tables.py`` writes them to ``benchmarks/results``.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpupipe.benchmarks import recorded
from gpupipe.benchmarks.claims import CLAIMS
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


def end_to_end(records: list[Record], figure: Any) -> None:
    """Frames a second to a finished file, measured, above what peers claim."""
    bars: list[tuple[str, float, str, str]] = []
    for group, by_length in recorded.clips(records).items():
        for provider, name in recorded.NAMES.items():
            row = recorded.longest(by_length).get((provider, "throughput"))
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
    found = recorded.stages(records)
    groups = recorded.widest(found)
    figure.set_size_inches(10, 0.7 + 3.2 * len(groups))
    for number, group in enumerate(groups):
        loop = recorded.loop_stages(records, group)
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
    found = recorded.stages(records)
    groups = recorded.widest(found)
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
    found = recorded.clips(records)
    figure.set_size_inches(10, 5)
    axes = figure.add_axes((0.08, 0.36, 0.88, 0.57))
    prices = [10 ** (power / 10) for power in range(-20, 11)]
    styles = itertools.product(("-", "--", ":", "-."), (1.0, 2.5))
    for group, by_length in found.items():
        for provider, name in recorded.NAMES.items():
            row = recorded.longest(by_length).get((provider, "throughput"))
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
        if name in ("stages", "roofline") and not recorded.stages(records):
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
