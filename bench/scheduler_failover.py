"""What Airflow's tasks notice when the scheduler in charge is lost or moved, and what the watchdog costs meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator

import yaml
from cluster import Api
from faultlab import INVENTORY, eventually, healthy, kill, power_on, primary, reach, run, sql
from report import Goal
from schedulers import SERVERS, UNIT, Stream, Watch, active, holder, signal

Figures = dict[str, float]
GOALS: dict[str, Goal] = {
    "scheduler_killed_to_next_task": ("s", 8.0, None),
    "scheduler_machine_gone_to_next_task": ("s", 18.0, None),
    "scheduler_switchover_to_next_task": ("s", 7.0, None),
    "scheduler_overlap": ("ms", 0, 0),
    "scheduler_tasks_lost_or_run_twice": ("tasks", 0, 0),
    "active_active_server_gone_longest_gap": ("s", 3.0, None),
    "watchdog_idle_cpu": ("% of core", 1.0, None),
    "watchdog_memory": ("MiB", 60.0, None),
    "watchdog_transactions_per_second_and_server": ("1/s", 2.0, None),
}
COST_S = 30


def killed(stream: Stream) -> float:
    """SIGKILL to the scheduler in charge."""
    host = holder()
    return stream.next_after(lambda: signal(host, UNIT, "KILL"))


def gone(stream: Stream) -> float:
    """Its machine loses its power, and comes back after the measurement."""
    host = holder()
    try:
        return stream.next_after(lambda: kill(host))
    finally:
        power_on()


def moved(stream: Stream) -> float:
    """A planned switchover: the longest time after the command in which nothing is scheduled."""
    before, began = holder(), time.time()
    reach(before).check_output("airflow-watchdog switchover scheduler")
    eventually(lambda: active() not in ([before], []))
    stream.tasks.end(240)
    return stream.longest_gap(began)


def active_active(client: Api) -> float:
    """One of two schedulers at work loses its machine: the longest time without a scheduled task."""
    stream, began = Stream(client), time.time()
    kill(SERVERS[0])
    try:
        stream.tasks.end(240)
    finally:
        power_on()
    eventually(lambda: active() == list(SERVERS), 120)
    return stream.longest_gap(began)


def mode(name: str) -> None:
    """Deploy the lab's servers with this airflow_scheduler_mode."""
    run("site", "--tags=airflow,watchdog", f"-eairflow_scheduler_mode={name}")


def cpu_ns(name: str) -> int:
    """Processor time that this node's watchdog has used since it started."""
    return int(reach(name).check_output("systemctl show -p CPUUsageNSec --value airflow-watchdog"))


def memory_kib(name: str) -> int:
    """Memory of this node's watchdog; what it shares with others counts in part."""
    pid = reach(name).check_output("systemctl show -p MainPID --value airflow-watchdog")
    return int(reach(name).check_output(f"grep ^Pss: /proc/{pid}/smaps_rollup").split()[1])


def transactions() -> int:
    """How many the watchdogs have had so far."""
    return int(sql(primary(), "select xact_commit + xact_rollback from pg_stat_database where datname = 'watchdog'"))


def cost() -> Figures:
    """On an idle cluster: the dearest watchdog of all nodes, and what its servers ask of PostgreSQL."""
    nodes = sorted(yaml.safe_load(INVENTORY.read_text())["all"]["hosts"])
    began, asked, used = time.monotonic(), transactions(), {name: cpu_ns(name) for name in nodes}
    time.sleep(COST_S)
    used = {name: cpu_ns(name) - used[name] for name in nodes}
    asked, seconds = transactions() - asked, time.monotonic() - began
    return {
        "watchdog_idle_cpu": max(used.values()) / 1e7 / seconds,
        "watchdog_memory": max(memory_kib(name) for name in nodes) / 1024,
        "watchdog_transactions_per_second_and_server": asked / seconds / len(SERVERS),
    }


def measure(client: Api, rounds: int) -> Iterator[Figures]:
    """Figures of one round after the other."""
    ways = {
        "scheduler_killed_to_next_task": killed,
        "scheduler_machine_gone_to_next_task": gone,
        "scheduler_switchover_to_next_task": moved,
    }
    for _ in range(rounds):
        yield cost()
        for metric, way in ways.items():
            holder()
            watch, stream = Watch(), Stream(client)
            figure = way(stream)
            stream.tasks.end(240)
            found = stream.tasks.outcome()
            holder()
            healthy(120)
            yield {
                metric: figure,
                "scheduler_overlap": watch.overlap_ms(),
                "scheduler_tasks_lost_or_run_twice": len(found["lost"] | found["doubled"]),
            }
    mode("active_active")
    for _ in range(rounds):
        yield {"active_active_server_gone_longest_gap": active_active(client)}
        healthy(120)
    mode("active_standby")
