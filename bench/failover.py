#!/usr/bin/env python3
"""Measure what clients notice of failovers on the lab, print a table and write bench/results/failover.json.

`make bench-failover [ROUNDS=5]`. Every figure is taken by a client behind the local proxy of an Airflow server that
writes all the time, while Airflow's tasks are queued and running. `met` of a row is computed from its figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from faultlab import Load, Tasks, deliver_dag, failover, healthy, kill, login, other, power_on, primary, run

PROJECT = Path(__file__).resolve().parents[1]
# Metric: unit, goal of the median, goal of the worst (None: no such goal).
GOALS: dict[str, tuple[str, float, float | None]] = {
    "postgresql_switchover_write_gap": ("s", 1.5, 3.0),
    "redis_switchover_write_gap": ("s", 0.5, None),
    "planned_commits_lost": ("commits", 0, 0),
    "postgresql_forced_to_first_write": ("s", 15.0, None),
    "postgresql_forced_write_to_task_success": ("s", 30.0, None),
}


def row(metric: str, figures: list[float]) -> dict[str, Any]:
    """A line of the table, with its verdict."""
    unit, goal, worst_goal = GOALS[metric]
    median, worst = statistics.median(figures), max(figures)
    met = median <= goal and (worst_goal is None or worst <= worst_goal)
    text = f"<= {goal:g}" + (f", worst <= {worst_goal:g}" if worst_goal is not None else "")
    figures = [round(figure, 3) for figure in figures]
    return {
        "metric": metric, "unit": unit, "goal": text, "median": round(median, 3), "worst": round(worst, 3),
        "n": len(figures), "figures": figures, "met": met,
    }  # fmt: skip


def planned(service: str, client: Any) -> tuple[float, float]:
    """One switchover: the longest time without a write, and how many acknowledged ones are lost."""
    tasks = Tasks(client, count=8, seconds=3)
    tasks.running()
    load = Load(service, 35)
    failover(service)
    found = load.result(loss_allowed=True)
    tasks.succeed()
    return found["gap"], len(found["lost"])


def forced(client: Any) -> tuple[float, float]:
    """The primary's machine loses its power: seconds from the playbook's start to the first write, and on to a task.

    The task was queued before the crash; nothing is touched by hand. The machine comes back afterwards.
    """
    host = primary()
    failover("redis", f"candidate={other(host)}", "only_if_needed=true")
    tasks = Tasks(client, count=12, seconds=2)
    tasks.running()
    load = Load("postgresql", 60, on="airflow1" if host == "data2" else "airflow2")
    kill(host)
    time.sleep(2)
    began, succeeded = time.time(), threading.Event()
    moments: list[float] = []

    def watch() -> None:
        while not succeeded.is_set():
            try:
                states = tasks.states()
            except OSError:
                states = []
            if states.count("success") == 12:
                moments.append(time.time())
                succeeded.set()
            time.sleep(0.5)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    failover("postgresql", "force=true")
    first_write = load.result(loss_allowed=True)["first_after_gap"]
    succeeded.wait(120)
    power_on()
    healthy(180)
    return first_write - began, (moments[0] if moments else float("inf")) - first_write


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    deliver_dag()
    client = login()
    healthy()
    figures: dict[str, list[float]] = {metric: [] for metric in GOALS}
    for number in range(rounds):
        for service in ("postgresql", "redis"):
            gap, lost = planned(service, client)
            figures[f"{service}_switchover_write_gap"].append(gap)
            figures["planned_commits_lost"].append(lost)
            print(f"round {number + 1}: planned {service}: {gap:.2f} s without a write", flush=True)
        write, task = forced(client)
        figures["postgresql_forced_to_first_write"].append(write)
        figures["postgresql_forced_write_to_task_success"].append(max(task, 0.0))
        print(f"round {number + 1}: forced: first write after {write:.1f} s, last task {task:.1f} s later", flush=True)
    run("site", "--tags=dags")
    rows = [row(metric, values) for metric, values in figures.items()]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, cwd=PROJECT
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    result = {
        "bench": "failover",
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {memory} GiB",
        "rows": rows,
    }
    folder = PROJECT / "bench/results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "failover.json").write_text(json.dumps(result, indent=1) + "\n")
    for entry in rows:
        verdict = "met" if entry["met"] else "NOT MET"
        print(
            f"{entry['metric']:<42} median {entry['median']:>8} {entry['unit']:<8} worst {entry['worst']:>8}"
            f"  n={entry['n']}  goal {entry['goal']:<18} {verdict}"
        )


if __name__ == "__main__":
    main()
