"""The sample pipeline on the whole cluster, with input that nobody has seen before."""

from __future__ import annotations

import datetime
import random
import subprocess
import sys
import time

from cluster import LAB, PROJECT, SUBNET, VIP

DAG = "xetra_daily_average"
# 14 files make 14 mapped tasks, enough for both workers to take some.
RUN_TIMEOUT_S = 240


def make_input(day: str) -> str:
    """Write a day that depends on chance into the landing zone; return the right averages as CSV."""
    expected = LAB / f"expected-{day}.csv"
    subprocess.run(
        [sys.executable, str(PROJECT / "files/sample/xetra_generator.py"), f"--date={day}", f"--seed={random.getrandbits(32)}",
         f"--output={LAB / 'landing/xetra'}", f"--expected={expected}", "--other-market"],
        check=True, capture_output=True,
    )  # fmt: skip
    return expected.read_text()


def run_dag(api, day: str) -> str:
    """Trigger a run for the day, wait for its end and return its id."""
    deadline = time.monotonic() + 60
    while DAG not in [dag["dag_id"] for dag in api.call("GET", "/dags")["dags"]]:
        assert time.monotonic() < deadline, "the DAG does not appear"
        time.sleep(2)
    api.call("PATCH", f"/dags/{DAG}", json={"is_paused": False})
    moment = datetime.datetime.now(datetime.UTC).strftime("%H:%M:%S.%f")
    run = api.call("POST", f"/dags/{DAG}/dagRuns", json={"logical_date": f"{day}T{moment}Z"})["dag_run_id"]
    deadline = time.monotonic() + RUN_TIMEOUT_S
    state = "queued"
    while state not in ("success", "failed") and time.monotonic() < deadline:
        time.sleep(2)
        state = api.call("GET", f"/dags/{DAG}/dagRuns/{run}")["state"]
    tasks = api.call("GET", f"/dags/{DAG}/dagRuns/{run}/taskInstances")["task_instances"]
    assert state == "success", [(task["task_id"], task["map_index"], task["state"], task["hostname"]) for task in tasks]
    return run


def table(host, day: str) -> str:
    """The day's rows as CSV, from the database of one data node."""
    query = (
        f"copy (select trading_date, ticker, round(avg_price, 10) as avg_price from avg_xetra where trading_date = '{day}'"
        ' order by ticker collate "C") to stdout with csv header'
    )
    with host.sudo("postgres"):
        return host.check_output("psql -X pipelines -c %s", query) + "\n"


def test_pipeline_through_either_server(server, api, machine, secrets, http):
    day = "2026-02-02" if server.startswith(f"{SUBNET}.21") else "2026-02-03"
    expected = make_input(day)
    client = api(server)
    run = run_dag(client, day)

    tasks = client.call("GET", f"/dags/{DAG}/dagRuns/{run}/taskInstances")["task_instances"]
    assert {task["hostname"] for task in tasks} == {"worker1", "worker2"}

    for data_node in ("data1", "data2"):
        assert table(machine(data_node), day) == expected, f"wrong averages on {data_node}"

    http.auth = ("admin", secrets["secret_haproxy_stats_password"])
    spark = http.get(f"https://{VIP}/spark/json/", timeout=10).json()
    applications = [app for app in spark["completedapps"] if app["name"].startswith(f"{DAG} {day}")]
    assert [app["state"] for app in applications] == ["FINISHED"]


def test_task_logs_can_be_read_from_the_other_machine(api):
    client = api()
    run = client.call("GET", f"/dags/{DAG}/dagRuns", params={"order_by": "-run_after", "limit": 1})["dag_runs"][0]
    log = client.call("GET", f"/dags/{DAG}/dagRuns/{run['dag_run_id']}/taskInstances/load/logs/1")
    assert "tickers" in str(log["content"])
