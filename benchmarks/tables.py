"""The tables and plots of recorded figures.

    python benchmarks/tables.py            # write them into the READMEs and benchmarks/results/*.svg
    python benchmarks/tables.py --check    # exit 1 if they do not agree with the rows

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` in README.md, benchmarks/README.md or
docs/scale.md. Where a run was repeated, the newest one is shown.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any

from gpupipe.benchmarks import plots, recorded
from gpupipe.benchmarks.claims import CLAIMS
from gpupipe.benchmarks.common import IN_REPOSITORY, RESULTS, ROOT, Record, read_rows
from gpupipe.engines.base import BATCH_SIZES
from gpupipe.engines.choice import LOWER_ON_CPU

PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "docs" / "scale.md")

Rows = list[Record]

_OLDER_FLOOR = "operations, as PyTorch multiplies"
"""What sets a floor in rows whose run did not measure the CPU's own arithmetic."""


def headline(rows: Rows) -> str:
    """A sentence with the newest ratio for the longest clip of a full-width network, and its conditions.

    If several templates were measured at that commit, it is the smallest of their ratios.
    """

    def measured(provider: str, metric: str = "ratio") -> Rows:
        return [
            row
            for row in rows
            if row["what"] == "end_to_end" and row["axis"] == "frames" and row["error"] is None
            if (row["provider"], row["metric"]) == (provider, metric) and row["config"].get("width") == 1
        ]

    newest = max(measured("gpupipe"), key=lambda row: (row["value"], row["time"]))
    run = ("device", "commit", "value")
    row = min((r for r in measured("gpupipe") if all(r[fact] == newest[fact] for fact in run)), key=lambda r: r["p50"])
    config = row["config"]
    width, height = config.get("size", (1280, 720))
    where = row["device"] if row["driver"] else f"{row['device']}, no GPU"
    precision = "float32" if config["exact"] else "half precision"

    def beside(provider: str, metric: str = "ratio") -> Record | None:
        same = (
            other
            for other in reversed(measured(provider, metric))
            if all(other[fact] == row[fact] for fact in (*run, "n"))
            and other["config"]["template"] == config["template"]
        )
        return next(same, None)

    said = f"**{row['p50']:.1f}× the reference loop's frames a second**"
    ours, on_onnxruntime = beside("gpupipe", "throughput"), beside("reference_loop_onnxruntime", "throughput")
    if ours and (keeping := beside("reference_loop_keeping_memory", "throughput")):
        said += f" (**{ours['p50'] / keeping['p50']:.1f}×** where glibc is told to keep its memory)"
    if ours and on_onnxruntime:
        said += f", and {ours['p50'] / on_onnxruntime['p50']:.1f}× those of the same loop on ONNX Runtime"
        said += f"{_without_the_gpu(on_onnxruntime)},"
    said += (
        f" to a finished .mp4 on {where}:"
        f" {row['value']:g} frames of {width}×{height}, template {config['template']}, full-width network,"
        f" mode {config['mode']}, {precision}"
    )
    lower = [(other["p50"], name) for name in LOWER_ON_CPU if (other := beside(f"gpupipe_{name}"))]
    if lower and max(lower)[0] > row["p50"]:
        ratio, name = max(lower)
        said += f"; **{ratio:.1f}×** with `--precision {name}` on this processor"
    return said + " ([how it was measured](#results))."


def _without_the_gpu(row: Record) -> str:
    """What is added about ONNX Runtime where its package for CPUs was installed and left the machine's GPU unused."""
    on_cpu = row["driver"] and row["config"].get("onnxruntime_provider") == "CPUExecutionProvider"
    return " (on the CPU)" if on_cpu else ""


def end_to_end(rows: Rows) -> str:
    """Frames a second to a finished file: the reference loop and gpupipe at full width, by device and length.

    Runs in which the loop on ONNX Runtime took no part, and those of a changed tree (``-dirty``), are left out here:
    they stand in :func:`side_by_side`.
    """
    lines = [
        "machine | template | clip | precision | reference loop | gpupipe | ratio (p20–p80) |"
        " to the loop on ONNX Runtime"
    ]
    for group, by_length in recorded.clips(rows).items():
        for frames, found in sorted(by_length.items()):
            by_onnxruntime = found.get(("reference_loop_onnxruntime", "throughput"))
            for provider in ("gpupipe_exact", "gpupipe", *(f"gpupipe_{name}" for name in LOWER_ON_CPU)):
                ratio, ours = found.get((provider, "ratio")), found.get((provider, "throughput"))
                if group.width != 1 or by_onnxruntime is None or ratio is None or ours is None:
                    continue
                if by_onnxruntime["commit"] != ours["commit"] or ours["commit"].endswith("-dirty"):
                    continue
                exact = "float32" if ours["config"]["exact"] else "float16"
                beside = f"{ours['p50'] / by_onnxruntime['p50']:.1f}×{_without_the_gpu(by_onnxruntime)}"
                lines.append(
                    f"{group.device} | {group.template} | {frames:g} frames |"
                    f" {ours['config'].get('precision', exact)} |"
                    f" {found['reference_loop', 'throughput']['p50']:.2f} frames/s |"
                    f" {ours['p50']:.2f} frames/s | {_ratio(ratio)} | {beside}"
                )
    return _table(lines)


def hours(rows: Rows) -> str:
    """Hours of video that a machine would make in a day without a pause, at the speed of its longest recorded clip."""
    lines = ["machine | template | frames a second | hours a day | a hundred of them"]
    for group, by_length in recorded.clips(rows).items():
        speed = recorded.longest(by_length).get(("gpupipe", "throughput"))
        if group.width == 1 and speed:
            a_day = speed["p50"] * 86_400 / (25 * 3_600)
            lines.append(f"{group.device} | {group.template} | {speed['p50']:.2f} | {a_day:.1f} | {100 * a_day:.0f}")
    if all(row["driver"] is None for row in rows):
        lines.append("any GPU | | not measured | 0.96 *f* | 96 *f*")
    return _table(lines)


def side_by_side(rows: Rows) -> str:
    """All contestants of `gpupipe bench`, with memory, energy (of a GPU that counts it) and time to load."""
    energy = any(row["metric"] == "energy" for row in rows)
    lines = [
        "machine, template | clip | who | frames/s (p20–p80) | ratio (p20–p80) | memory, MB |"
        f"{' J a frame |' if energy else ''} load, s | commit"
    ]
    for group, by_length in recorded.clips(rows).items():
        for frames, found in sorted(by_length.items()):
            for provider, name in recorded.NAMES.items():
                speed = found.get((provider, "throughput"))
                if speed is None:
                    continue
                ratio, memory, load = (found.get((provider, metric)) for metric in ("ratio", "memory", "load"))
                cells = [
                    str(group),
                    f"{frames:g} frames",
                    name + _without_the_gpu(speed),
                    _spread(speed),
                    _ratio(ratio) if ratio else "",
                    f"{memory['p50']:.0f}" if memory else "",
                    *([_median(found.get((provider, "energy")))] if energy else []),
                    f"{load['p50']:.1f}" if load else "",
                    f"`{speed['commit']}`",
                ]
                lines.append(" | ".join(cells))
    return _table(lines)


def stages(rows: Rows) -> str:
    """Each stage beside its floor and the reference loop's stage of the same name."""
    in_registers = {(row["device"], row["commit"]) for row in rows if row["metric"] == "arithmetic_rate"}
    lines = ["machine, template | stage | once a | ms (p20–p80) | floor, ms | set by | % of floor | reference loop, ms"]
    for group, found in recorded.stages(rows).items():
        loop = recorded.loop_stages(rows, group)
        for name, metrics in found.items():
            time, config = metrics["time"], metrics["time"]["config"]
            of = group.device, time["commit"]
            theirs = loop.get("network" if name.endswith("speech half") else name)
            cells = [
                str(group),
                name,
                config["once"],
                _spread(time),
                f"{config['floor_ms']:.3f}",
                _OLDER_FLOOR if config["floor_by"] == "operations" and of not in in_registers else config["floor_by"],
                f"{metrics['floor_share']['p50']:.3g}",
                "" if theirs is None else f"{theirs:.2f}",
            ]
            lines.append(" | ".join(cells))
    return _table(lines)


def sweeps(rows: Rows) -> str:
    """Frames a second by batch size, frame size and length of the clip."""
    names = {"batch": "batch", "size": "size", "seconds": "length, s (stub network)"}
    newest: dict[tuple[Any, ...], dict[str, Record]] = {}
    for row in rows:
        if row["what"] == "end_to_end" and row["axis"] in names and row["error"] is None:
            key = (recorded.group_of(row), names[row["axis"]], row["value"], row["provider"])
            newest.setdefault(key, {})[row["metric"]] = row
    lines = ["machine, template | varied | value | clip | who | frames/s (p20–p80) | ratio | memory, MB | commit"]
    for (group, axis, value, provider), found in newest.items():
        speed, ratio, memory = found["throughput"], found.get("ratio"), found.get("memory")
        frames = speed["config"].get("frames")
        cells = [
            str(group),
            axis,
            str(value),
            f"{frames} frames" if frames else "",
            recorded.NAMES[provider],
            _spread(speed),
            _ratio(ratio) if ratio else "",
            f"{memory['p50']:.0f}" if memory else "",
            f"`{speed['commit']}`",
        ]
        lines.append(" | ".join(cells))
    return _table(lines)


def claims(rows: Rows) -> str:
    """What others have published; not measured here."""
    lines = ["who | frames/s | hardware | what | said by"]
    for claim in CLAIMS:
        source = f"[{claim.source}]({claim.url})" if claim.url else claim.source
        lines.append(f"{claim.who} | {claim.frames_per_second:g} | {claim.hardware} | {claim.what} | {source}")
    return _table(lines)


def unet(rows: Rows) -> str:
    """Milliseconds a frame of the full-width network alone, by device, batch and precision; the newest of each.

    The floor is that of layers that run one by one, whose bytes go to memory and back.
    """
    newest: dict[tuple[Any, ...], dict[str, Record]] = {}
    for row in rows:
        config = row["config"]
        if row["what"] == "unet" and row["error"] is None and config["width"] == 1:
            key = row["device"], config["precision"], row["value"], row["provider"], config["cached"]
            newest.setdefault(key, {})[row["metric"]] = row
    lines = [
        "machine | precision, batch | the network in | template's half | ms a frame (p20–p80) |"
        " % of the layers' floor's speed | commit"
    ]
    for (device, precision, batch, provider, cached), found in sorted(
        newest.items(), key=lambda item: (*item[0][:3], -item[1]["latency"]["p50"])
    ):
        row, half = found["latency"], "kept" if cached else "run"
        spread = f"**{row['p50']:.4g}** ({row['p20']:.4g}–{row['p80']:.4g})"
        cells = (device, f"{precision}, {batch:g}", provider, half, spread, _median(found.get("layerwise_floor")))
        lines.append(f"{' | '.join(cells)} | `{row['commit']}`")
    return _table(lines)


def kernels(rows: Rows) -> str:
    """The kernels around the network, and its blocks: time, and the share of the device's copy bandwidth."""
    newest: dict[tuple[Any, ...], dict[str, Record]] = {}
    for row in rows:
        if row["what"] != "tiles" and "case" in row["config"] and row["error"] is None:
            key = row["device"], row["what"], row["config"]["case"], row["value"], row["provider"]
            newest.setdefault(key, {})[row["metric"]] = row
    lines = ["machine | kernel | case | batch | by | µs a frame (p20–p80) | GB/s | % of copying | commit"]
    for (device, what, case, batch, provider), found in sorted(newest.items()):
        row = found["latency"]
        p50, p20, p80 = map(_figure, (row["p50"], row["p20"], row["p80"]))
        shares = (_median(found["bandwidth"]), _median(found["ratio"]))
        cells = (device, what, case, f"{batch:g}", provider, f"**{p50}** ({p20}–{p80})", *shares)
        lines.append(f"{' | '.join(cells)} | `{row['commit']}`")
    return _table(lines)


def overlap(rows: Rows) -> str:
    """Computing, encoding and both at once; the newest of each engine, clip and codec."""
    newest: dict[tuple[Any, ...], dict[tuple[str, str], Record]] = {}
    for row in rows:
        if row["what"] == "overlap" and row["error"] is None:
            config = row["config"]
            precision = config.get("precision", "float32" if config["exact"] else "float16")
            key = (
                recorded.group_of(row),
                f"{config['engine']}, {precision}",
                row["value"],
                config.get("codec", "libx264"),
            )
            newest.setdefault(key, {})[row["provider"], row["metric"]] = row
    lines = [
        "machine, template | engine | clip | codec | compute, frames/s | encode | render |"
        " time, of the slower's (least) | speed, of the encoder's | CPU time outside the network | commit"
    ]
    for (group, engine, frames, codec), found in sorted(newest.items()):
        ratio = found["render", "ratio"]
        least, alone, share = (found.get(("render", metric)) for metric in ("least", "of_encoder", "share"))
        cells = [
            *(str(group), engine, f"{frames:g} frames", codec),
            *(_median(found[work, "throughput"]) for work in ("compute", "encode", "render")),
            f"**{ratio['p50']:.2f}×**" + (f" ({least['p50']:.2f}×)" if least else ""),
            *(f"{one['p50']:.0f} %" if one else "" for one in (alone, share)),
            f"`{ratio['commit']}`",
        ]
        lines.append(" | ".join(cells))
    return _table(lines)


def precision(rows: Rows) -> str:
    """What a number format costs in picture quality, for networks of two widths, and what it gains in speed."""
    newest: dict[tuple[str, str], dict[tuple[float, str], Record]] = {}
    for row in rows:
        if row["what"] == "precision" and row["error"] is None:
            width = row["config"].get("width", 0.25)  # of older rows: the bundled network's
            newest.setdefault((row["provider"], row["value"]), {})[width, row["metric"]] = row
    lines = [
        "format | by | PSNR, width ¼ | largest difference | PSNR, full width | largest difference |"
        " its speech half, ms (in float32) | commit"
    ]
    bundled = {key: found for key, found in newest.items() if (0.25, "psnr") in found}
    for (provider, name), found in sorted(bundled.items(), key=lambda item: -item[1][0.25, "psnr"]["p50"]):
        by = f"{provider} on {found[0.25, 'psnr']['device']}"
        if provider == "simulated":
            by = "simulated: layers' outputs rounded"
        cells = []
        for width in (0.25, 1.0):
            for metric, unit in (("psnr", " dB"), ("largest_difference", " of 255")):
                one = found.get((width, metric))
                cells.append(f"{one['p50']:.1f}{unit}" if one else "")
        own, plain = (_kept(rows, found[0.25, "psnr"]["device"], provider, one) for one in (name, "float32"))
        cells.append(f"{_figure(own)} ({_figure(plain)})" if own and plain else "")
        commits = ", ".join(f"`{commit}`" for commit in sorted({one["commit"] for one in found.values()}))
        lines.append(f"{name} | {by} | {' | '.join(cells)} | {commits}")
    return _table(lines)


def _kept(rows: Rows, device: str, engine: str, precision: str) -> float | None:
    """Milliseconds of the full-width network's speech half in an engine, at the batch that it renders in."""
    found = None
    for row in rows:
        if (row["what"], row["metric"], row["device"], row["provider"]) == ("unet", "latency", device, engine):
            config, batch = row["config"], BATCH_SIZES["cuda" if row["driver"] else "cpu"]
            if row["error"] is None and (config["width"], config["cached"], row["value"]) == (1, True, batch):
                found = row["p50"] if config["precision"] == precision else found
    return found


def instructions(rows: Rows) -> str:
    """How many instructions the engines' kernels issue for a frame, counted without a device."""
    newest: dict[tuple[str, int], dict[tuple[str, str], Record]] = {}
    for row in rows:
        if row["what"] == "instructions" and row["config"]["width"] == 1:
            found = newest.setdefault((row["provider"], row["config"]["arch"]), {})
            found[row["value"], row["metric"]] = row
    lines = ["engine | compute capability | template's half, million a frame | speech's half | Triton | commit"]
    for (engine, arch), found in sorted(newest.items()):
        halves = [
            f"**{found[half, 'instructions']['p50']:.2f}** ({found[half, 'instructions without moves']['p50']:.2f})"
            for half in ("template", "speech")
        ]
        row = found["speech", "instructions"]
        lines.append(
            f"{engine} | {arch / 10:.1f} | {' | '.join(halves)} | {row['versions']['triton']} | `{row['commit']}`"
        )
    return _table(lines)


def farm(rows: Rows) -> str:
    """What a farm costs beside single renders, and its speed by clip length and by workers."""
    axes = {
        "overhead": "farm's time over single renders'",
        "avatar": "open avatar's time over single renders'",
        "frames": "frames of one clip",
        "workers": "workers of Ray",
    }
    newest: dict[tuple[Any, ...], Record] = {}
    for row in rows:
        if row["what"] == "farm" and row["error"] is None:
            newest[recorded.group_of(row), axes[row["axis"]], row["value"], row["metric"]] = row
    lines = ["machine, template | varied | value | what | (p20–p80) | runs | commit"]
    for (group, axis, value, metric), row in newest.items():
        place = value if isinstance(value, str) else f"{value:g}"
        shape = f" ({row['config']['clips']} × {row['config']['frames']} frames)" if "clips" in row["config"] else ""
        p50, p20, p80 = (f"{row[p]:{'.2f' if row['unit'] == '×' else '.3g'}}" for p in ("p50", "p20", "p80"))
        spread = f"**{p50}** {row['unit']} ({p20}–{p80})"
        lines.append(f"{group} | {axis} | {place}{shape} | {metric} | {spread} | {row['n']} | `{row['commit']}`")
    return _table(lines)


TABLES: dict[str, Callable[[Rows], str]] = {
    "claims": claims,
    "end_to_end": end_to_end,
    "farm": farm,
    "headline": headline,
    "hours": hours,
    "instructions": instructions,
    "kernels": kernels,
    "overlap": overlap,
    "precision": precision,
    "side_by_side": side_by_side,
    "stages": stages,
    "sweeps": sweeps,
    "unet": unet,
}


def fill(text: str, rows: Rows) -> str:
    """``text`` with every table made again from the rows."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n\n{TABLES[match[1]](rows)}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def same_plot(drawn: str, kept: str) -> bool:
    """Whether two SVGs are equal: in all bytes if one version of matplotlib drew both, else in words and numbers."""
    if plots.drawn_by(drawn) == plots.drawn_by(kept):
        return drawn == kept
    return sorted(plots.texts(drawn)) == sorted(plots.texts(kept))


def differences(rows: Rows) -> list[str]:
    """Names of the files that do not agree with the rows."""
    found = [page.name for page in PAGES if fill(page.read_text("utf-8"), rows) != page.read_text("utf-8")]
    for name, svg in plots.draw(rows).items():
        path = RESULTS / f"{name}.svg"
        if not path.is_file() or not same_plot(svg, path.read_text("utf-8")):
            found.append(path.name)
    return found


def _table(lines: list[str]) -> str:
    """Markdown of a table: cells with strokes between them, those of the first line the columns' names."""
    names, *rest = (f"| {line} |" for line in lines)
    return "\n".join([names, "| --- " * (names.count("|") - 1) + "|", *rest])


def _spread(row: Record) -> str:
    return f"{row['p50']:.2f} ({row['p20']:.2f}–{row['p80']:.2f})"


def _figure(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _median(row: Record | None) -> str:
    return _figure(row["p50"]) if row else ""


def _ratio(row: Record) -> str:
    return f"**{row['p50']:.1f}×** ({row['p20']:.1f}–{row['p80']:.1f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    options = parser.parse_args()
    if not IN_REPOSITORY:
        parser.error("the pages are in the repository only")
    rows = read_rows()
    if options.check:
        found = differences(rows)
        for name in found:
            print(f"{name} differs from the recorded rows")
        return int(bool(found))
    for page in PAGES:
        page.write_text(fill(page.read_text("utf-8"), rows), "utf-8")
    plots.write(RESULTS, plots.draw(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
