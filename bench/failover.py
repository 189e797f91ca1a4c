#!/usr/bin/env python3
"""Measure what clients notice of failovers on the lab, print a table and write bench/results/failover.json.

`make bench-failover [ROUNDS=5] [ONLY=data]`. Every figure is taken by a client behind the local proxy of an Airflow
server that writes all the time, or from Airflow's own record of its tasks. `met` of a row is computed from its figures.
With ONLY, nothing is written: the file holds one whole run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data_failover
from faultlab import deliver_dag, healthy, login, run

PROJECT = Path(__file__).resolve().parents[1]
# Each measures one round: metric to its figure.
PARTS: dict[str, Callable[[Any], dict[str, float]]] = {"data": data_failover.measure}
# Metric: unit, goal of the median, goal of the worst (None: no such goal).
GOALS: dict[str, tuple[str, float, float | None]] = {**data_failover.GOALS}


def row(metric: str, figures: list[float]) -> dict[str, Any]:
    """A line of the table, with its verdict."""
    unit, goal, worst_goal = GOALS[metric]
    median, worst = statistics.median(figures), max(figures)
    met = median <= goal and (worst_goal is None or worst <= worst_goal)
    text = f"<= {goal:g}" + (f", worst <= {worst_goal:g}" if worst_goal is not None else "")
    return {
        "metric": metric, "unit": unit, "goal": text, "median": round(median, 3), "worst": round(worst, 3),
        "n": len(figures), "figures": [round(figure, 3) for figure in figures], "met": met,
    }  # fmt: skip


def about() -> dict[str, str]:
    """Of what, and on what, this is a measurement."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PROJECT).stdout.strip()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    return {"bench": "failover", "commit": commit, "machine": f"{os.cpu_count()} cores, {memory} GiB"}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=sorted(PARTS), help="measure one part, and write no file")
    options = parser.parse_args()
    start = about()
    deliver_dag()
    client = login()
    healthy()
    figures: dict[str, list[float]] = {}
    for number in range(1, options.rounds + 1):
        for part in [options.only] if options.only else PARTS:
            for metric, figure in PARTS[part](client).items():
                figures.setdefault(metric, []).append(figure)
                print(f"round {number}: {metric} {figure:.2f} {GOALS[metric][0]}", flush=True)
    run("site", "--tags=dags")
    rows = [row(metric, values) for metric, values in figures.items()]
    if not options.only:
        file = PROJECT / "bench/results/failover.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**start, "rows": rows}, indent=1) + "\n")
    print(f"\n{'metric':<42} {'median':>8} {'worst':>8} {'unit':<8} {'n':>2}  goal")
    for entry in rows:
        print(
            f"{entry['metric']:<42} {entry['median']:>8.2f} {entry['worst']:>8.2f} {entry['unit']:<8} {entry['n']:>2}"
            f"  {entry['goal']:<20} {'met' if entry['met'] else 'NOT MET'}"
        )


if __name__ == "__main__":
    main()
