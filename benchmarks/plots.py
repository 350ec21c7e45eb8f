"""Plots of the recorded rows, as SVG files whose bytes depend only on the rows and on matplotlib's version.

:func:`draw` makes them all; ``python benchmarks/tables.py`` writes them to ``benchmarks/results``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from gpupipe.benchmarks import recorded
from gpupipe.benchmarks.claims import CLAIMS
from gpupipe.benchmarks.common import Record

MINE, OTHERS, LIMIT = "#1b6ca8", "#8a8f98", "#c0392b"
CLAIM: dict[str, Any] = {"color": "#c9ced6", "hatch": "////", "edgecolor": "#6b7280"}

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


Bars = list[tuple[str, float, dict[str, Any]]]
"""Label, value and colours of each bar of a panel."""


def end_to_end(records: list[Record], figure: Any) -> None:
    """Frames a second to a finished file: a panel for each template on each machine, and one for what others claim."""
    panels: dict[str, Bars] = {}
    for group, by_length in recorded.clips(records).items():
        panels[f"{group}, {max(by_length):g} frames"] = [
            (name, row["p50"], _colour(provider)) for provider, name, row in _speeds(by_length)
        ]
    panels["Published claims, not measured here; hardware and work differ"] = [
        (f"{claim.who}: {claim.hardware}, {claim.what}", claim.frames_per_second, CLAIM) for claim in CLAIMS
    ]
    axes = _panels(figure, panels)
    for one in axes:
        one.set_xscale("log")
    values = [value for bars in panels.values() for _, value, _ in bars]
    axes[0].set_xlim(min(values) / 2, 2 * max(values))
    axes[-1].set_xlabel("frames a second to a finished file with sound (logarithmic)")


def cost(records: list[Record], figure: Any) -> None:
    """Machine hours for an hour of video: its cost without the price of a machine hour, which differs for everybody."""
    panels: dict[str, Bars] = {}
    found = recorded.clips(records)
    for group in recorded.widest(found):
        panels[f"{group}, {max(found[group]):g} frames"] = [
            (name, row["config"].get("fps", 25) / row["p50"], _colour(provider))
            for provider, name, row in _speeds(found[group])
        ]
    axes = _panels(figure, panels)
    axes[0].set_xlim(right=1.1 * max(value for bars in panels.values() for _, value, _ in bars))
    axes[-1].set_xlabel("hours of the machine for an hour of video; times the price of one: what the video costs")


def _speeds(by_length: dict[float, dict[tuple[str, str], Record]]) -> list[tuple[str, str, Record]]:
    """Provider, name and frames a second of everybody who rendered the longest clip."""
    found = recorded.longest(by_length)
    named = ((provider, name, found.get((provider, "throughput"))) for provider, name in recorded.NAMES.items())
    return [(provider, name, row) for provider, name, row in named if row is not None]


def _colour(provider: str) -> dict[str, Any]:
    return {"color": MINE if provider.startswith("gpupipe") else OTHERS}


def _panels(figure: Any, panels: dict[str, Bars]) -> list[Any]:
    """Horizontal bars with their values, panel under panel, on one scale; sizes are inches, whatever the number."""
    title, bar, below = 0.4, 0.24, 0.5
    height = below + sum(title + bar * len(bars) for bars in panels.values())
    figure.set_size_inches(10, height)
    made: list[Any] = []
    top = height
    for name, bars in panels.items():
        top -= title + bar * len(bars)
        place = (0.38, top / height, 0.59, bar * len(bars) / height)
        axes = figure.add_axes(place, sharex=made[0] if made else None)
        for row, (_, value, look) in enumerate(bars):
            axes.barh(row, value, height=0.7, linewidth=0.5, **look)
            axes.annotate(f"{value:.3g}", (value, row), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(bars)), [label for label, *_ in bars])
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.tick_params(labelbottom=False)
        figure.text(0.02, (top + bar * len(bars) + 0.08) / height, name, fontsize=10)
        made.append(axes)
    made[-1].tick_params(labelbottom=True)
    return made


def waterfall(records: list[Record], figure: Any) -> None:
    """A frame's stages one after another: the reference loop's, and gpupipe's with their floors."""
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
    """What the network reaches of the machine's ceilings, and how near each stage comes to its floor."""
    found = recorded.stages(records)
    groups = recorded.widest(found)
    figure.set_size_inches(10, 0.6 + 3.2 * len(groups))
    figure.subplots_adjust(left=0.08, right=0.97, wspace=0.55, hspace=0.5, top=0.88, bottom=0.16)
    for number, group in enumerate(groups):
        left = figure.add_subplot(len(groups), 2, 2 * number + 1)
        bandwidth = _ceiling(records, group.device, "copy_bandwidth")
        rate = _ceiling(records, group.device, "arithmetic_rate", "matrix_rate")
        xs = [10 ** (power / 20) for power in range(61)]
        left.plot(xs, [min(rate, x * bandwidth) for x in xs], color=LIMIT)
        for name, metrics in found[group].items():
            config = metrics["time"]["config"]
            if config["operations"]:
                reached = config["operations"] / metrics["time"]["p50"] / 1e6
                left.plot(config["operations"] / config["bytes"], reached, "o", color=MINE)
                offset, side = ((7, 0), "left") if "speech" in name else ((2, -11), "right")
                left.annotate(
                    name.removeprefix("network, "),
                    (config["operations"] / config["bytes"], reached),
                    xytext=offset,
                    textcoords="offset points",
                    ha=side,
                    va="center",
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


PLOTS: dict[str, Callable[[list[Record], Any], None]] = {
    "end_to_end": end_to_end,
    "stages": waterfall,
    "roofline": roofline,
    "cost": cost,
}


def figures(records: list[Record]) -> dict[str, Any]:
    """Name → :class:`matplotlib.figure.Figure` of every plot that has rows to show.

    Raises:
        ImportError: matplotlib is missing (``gpupipe[plots]``).
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra

    made = {}
    for name, plot in PLOTS.items():
        if name in ("stages", "roofline") and not recorded.stages(records):
            continue
        with _style():
            made[name] = Figure()
            plot(records, made[name])
    return made


def draw(records: list[Record]) -> dict[str, str]:
    """Name → SVG of each of the :func:`figures`."""
    made = {}
    for name, figure in figures(records).items():
        buffer = io.StringIO()
        with _style():
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        made[name] = "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines())
    return made


def _style() -> AbstractContextManager[None]:
    """matplotlib's own settings and these, whatever the machine's say."""
    import matplotlib  # noqa: PLC0415 - an extra

    style: Any = dict(matplotlib.rcParamsDefault)
    return matplotlib.rc_context(style | _STYLE)


def drawn_by(svg: str) -> str:
    """The version of matplotlib that drew an SVG."""
    match = re.search(r"Matplotlib v([\w.]+)", svg)
    return match[1] if match else "unknown"


def texts(svg: str) -> list[str]:
    """All words and numbers in an SVG, which another version of matplotlib must draw alike."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def write(folder: Path, made: dict[str, str]) -> None:
    """Write the plots as ``<name>.svg``."""
    for name, svg in made.items():
        (folder / f"{name}.svg").write_text(svg, "utf-8")


def _ceiling(records: list[Record], device: str, *metrics: str) -> float:
    """A device's newest copy bandwidth or arithmetic rate, which older rows call a matrix rate, in 10⁹ a second."""
    return float([row["p50"] for row in records if row["device"] == device and row["metric"] in metrics][-1])
