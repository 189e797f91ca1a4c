"""Planned switchovers of PostgreSQL and Redis, and a primary whose machine loses its power, with tasks at work."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator

from cluster import Api
from faultlab import Load, Tasks, eventually, failover, healthy, kill, other, power_on, primary
from report import Goal

GOALS: dict[str, Goal] = {
    "postgresql_switchover_write_gap": ("s", 1.5, 3.0),
    "redis_switchover_write_gap": ("s", 0.5, None),
    "planned_commits_lost": ("commits", 0, 0),
    "planned_tasks_lost": ("tasks", 0, 0),
    "planned_tasks_run_twice": ("tasks", 0, 0),
    "postgresql_forced_to_first_write": ("s", 15.0, None),
    "postgresql_forced_write_to_queued_task_success": ("s", 30.0, None),
    "forced_running_tasks_killed": ("tasks", 0, 0),
}


def planned(service: str, client: Api) -> dict[str, float]:
    """One switchover while tasks are queued and running."""
    tasks = Tasks(client, count=16, seconds=3)
    tasks.running()
    load = Load(service)
    failover(service)
    written = load.result(loss_allowed=True)
    tasks.end()
    found = tasks.outcome()
    healthy()
    return {
        f"{service}_switchover_write_gap": written["gap"],
        "planned_commits_lost": len(written["lost"]),
        "planned_tasks_lost": len(found["lost"]),
        # A task whose own transaction is open when PostgreSQL moves fails with nothing done, and tries again.
        "planned_tasks_run_twice": len(found["doubled"] | (found["repeated"] if service == "redis" else set())),
    }


def forced(client: Api) -> dict[str, float]:
    """The primary's machine loses its power: from the playbook's start to the first write, and on to a task.

    The task was queued before the crash, and nothing is touched by hand. The machine comes back afterwards.
    """
    host = primary()
    failover("redis", f"candidate={other(host)}", "only_if_needed=true")
    healthy()
    tasks = Tasks(client, count=16, seconds=6)
    tasks.running()
    load = Load("postgresql", on="airflow1" if host == "data2" else "airflow2")
    running, queued = tasks.numbers("running"), tasks.numbers("queued")
    kill(host)
    time.sleep(2)
    began = time.time()
    failover("postgresql", "force=true")
    first_write = load.result(loss_allowed=True)["first_after_gap"]
    tasks.end(240)

    def succeeded() -> list[float]:
        instances = tasks.instances()
        ends = [instances[number]["end_date"] for number in queued if instances[number]["state"] == "success"]
        return [datetime.datetime.fromisoformat(end).timestamp() for end in ends]

    ended, killed = succeeded(), running & tasks.outcome()["repeated"]
    assert ended, "no task that was queued before the crash has succeeded"
    power_on()
    eventually(lambda: primary() == other(host))
    healthy(180)
    return {
        "postgresql_forced_to_first_write": first_write - began,
        "postgresql_forced_write_to_queued_task_success": max(min(ended) - first_write, 0.0),
        "forced_running_tasks_killed": len(killed),
    }


def measure(client: Api, rounds: int) -> Iterator[dict[str, float]]:
    """Figures of one round after the other."""
    for _ in range(rounds):
        yield planned("postgresql", client)
        yield planned("redis", client)
        yield forced(client)
