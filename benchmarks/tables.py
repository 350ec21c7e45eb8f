"""The README's tables of figures, from the recorded rows.

    python benchmarks/tables.py            # write them into README.md
    python benchmarks/tables.py --check    # exit 1 if README.md says anything else

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. Of repeated runs the newest counts.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"

Rows = list[dict[str, Any]]


def read_rows(folder: Path = RESULTS) -> Rows:
    """Every recorded row, oldest first."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    return sorted((json.loads(line) for line in lines), key=lambda row: row["time"])


def end_to_end(rows: Rows) -> str:
    """Frames a second to a finished file: the reference loop and gpupipe, by device and length of the clip."""
    newest: dict[tuple[str, float], dict[tuple[str, str], dict[str, Any]]] = {}
    for row in rows:
        if row["what"] == "end_to_end" and row["axis"] == "frames" and row["error"] is None:
            newest.setdefault((row["device"], row["value"]), {})[(row["provider"], row["metric"])] = row
    lines = [
        "| machine | clip | reference loop | gpupipe | ratio (p20–p80) | turns | commit |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (device, frames), found in sorted(newest.items()):
        reference, ours = found["reference_loop", "throughput"], found["gpupipe", "throughput"]
        ratio = found["gpupipe", "ratio"]
        lines.append(
            f"| {device} | {frames:g} frames | {reference['p50']:.2f} frames/s | {ours['p50']:.2f} frames/s |"
            f" **{ratio['p50']:.1f}×** ({ratio['p20']:.1f}–{ratio['p80']:.1f}) | {ratio['n']} | `{ratio['commit']}` |"
        )
    return "\n".join(lines)


def unet(rows: Rows) -> str:
    """Milliseconds of the network alone, by device."""
    newest = {(row["device"], row["provider"]): row for row in rows if row["what"] == "unet" and row["error"] is None}
    lines = ["| machine | network at batch 1, float32 | ms a frame (p20–p80) | commit |", "| --- | --- | --- | --- |"]
    for (device, provider), row in sorted(newest.items(), key=lambda item: (item[0][0], -item[1]["p50"])):
        lines.append(
            f"| {device} | {provider} | **{row['p50']:.0f}** ({row['p20']:.0f}–{row['p80']:.0f}) | `{row['commit']}` |"
        )
    return "\n".join(lines)


def headline(rows: Rows) -> str:
    """The newest ratio for the longest clip, in a sentence with its conditions."""
    ratios = [row for row in rows if row["what"] == "end_to_end" and row["metric"] == "ratio" and row["error"] is None]
    row = max(ratios, key=lambda row: (row["value"], row["time"]))
    config = row["config"]
    return (
        f"**{row['p50']:.1f}× the reference loop's frames a second** to a finished .mp4 on {row['device']}, no GPU:"
        f" {row['value']:g} frames of 1280×720, full-width network, mode {config['mode']}, float32"
        " ([how it was measured](#results))."
    )


TABLES = {"end_to_end": end_to_end, "headline": headline, "unet": unet}


def fill(text: str, rows: Rows) -> str:
    """``text`` with every table made anew."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n\n{TABLES[match[1]](rows)}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    options = parser.parse_args()
    text = README.read_text("utf-8")
    made = fill(text, read_rows())
    if options.check:
        return int(made != text)
    README.write_text(made, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
