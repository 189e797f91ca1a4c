#!/usr/bin/env python3
"""Measure what clients notice of failovers on the lab, print a table and write bench/results/failover.json.

`make bench-failover [ROUNDS=5] [ONLY=data|scheduler]`. Every figure is taken by a client behind the local proxy of an
Airflow server that writes all the time, or from Airflow's own record of its tasks. With ONLY, nothing is written: the
file holds one whole run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import data_failover
import report
import scheduler_failover
from faultlab import deliver_dag, healthy, login, run

# Each yields what it has measured, metric to figure, for so many rounds.
PARTS: dict[str, Callable[[Any, int], Iterator[dict[str, float]]]] = {
    "data": data_failover.measure,
    "scheduler": scheduler_failover.measure,
}
GOALS: dict[str, report.Goal] = {**data_failover.GOALS, **scheduler_failover.GOALS}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=sorted(PARTS), help="measure one part, and write no file")
    options = parser.parse_args()
    head = report.about("failover")
    deliver_dag()
    client = login()
    healthy()
    figures: dict[str, list[float]] = {}
    for part in [options.only] if options.only else PARTS:
        for found in PARTS[part](client, options.rounds):
            for metric, figure in found.items():
                figures.setdefault(metric, []).append(figure)
                print(f"{metric:<46} {figure:>8.2f} {GOALS[metric][0]}", flush=True)
    run("site", "--tags=dags")
    lines = report.rows(GOALS, figures)
    if not options.only:
        report.write(head, lines)
    print(f"\n{report.table(lines)}")


if __name__ == "__main__":
    main()
