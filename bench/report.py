"""The form of every benchmark's result: bench/results/<name>.json, and a table."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
# Unit, goal of the median, goal of the worst (None: no such goal). Less is better.
Goal = tuple[str, float, float | None]


def row(metric: str, goal: Goal, figures: Sequence[float]) -> dict[str, Any]:
    """A metric's line, with its verdict."""
    unit, most, worst_most = goal
    median, worst = statistics.median(figures), max(figures)
    text = f"<= {most:g}" + (f", worst <= {worst_most:g}" if worst_most is not None else "")
    return {
        "metric": metric, "unit": unit, "goal": text, "median": round(median, 3), "worst": round(worst, 3),
        "n": len(figures), "figures": [round(figure, 3) for figure in figures],
        "met": median <= most and (worst_most is None or worst <= worst_most),
    }  # fmt: skip


def rows(goals: Mapping[str, Goal], figures: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """A line for each metric that was measured."""
    return [row(metric, goals[metric], values) for metric, values in figures.items()]


def about(name: str) -> dict[str, str]:
    """Of what, and on what, this is a measurement."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PROJECT).stdout.strip()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    return {"bench": name, "commit": commit, "machine": f"{os.cpu_count()} cores, {memory} GiB"}


def write(head: Mapping[str, str], lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the result's file."""
    file = PROJECT / "bench" / "results" / f"{head['bench']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**head, "rows": list(lines)}, indent=1) + "\n")


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The same for people."""
    text = [f"{'metric':<46} {'median':>8} {'worst':>8} {'unit':<9} {'n':>2}  goal"]
    text += [
        f"{entry['metric']:<46} {entry['median']:>8.2f} {entry['worst']:>8.2f} {entry['unit']:<9} {entry['n']:>2}"
        f"  {entry['goal']:<20} {'met' if entry['met'] else 'NOT MET'}"
        for entry in lines
    ]
    return "\n".join(text)
