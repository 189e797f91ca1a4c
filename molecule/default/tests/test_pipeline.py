"""The sample pipeline on the whole cluster, with input that nobody has seen before."""

from __future__ import annotations

from cluster import DAG, SUBNET, VIP, make_input, table


def test_pipeline_through_either_server(server, api, machine, secrets, http):
    day = "2026-02-02" if server.startswith(f"{SUBNET}.21") else "2026-02-03"
    expected = make_input(day)

    tasks = api(server).run_pipeline(day)
    assert {task["hostname"] for task in tasks} == {"worker1", "worker2"}

    for data_node in ("data1", "data2"):
        assert table(machine(data_node), day) == expected, f"wrong averages on {data_node}"

    http.auth = ("admin", secrets["secret_haproxy_stats_password"])
    spark = http.get(f"https://{VIP}/spark/json/", timeout=10).json()
    applications = [app for app in spark["completedapps"] if app["name"].startswith(f"{DAG} {day}")]
    assert [app["state"] for app in applications] == ["FINISHED"]


def test_task_logs_are_read_from_the_workers(api):
    client = api()
    run = client.call("GET", f"/dags/{DAG}/dagRuns", params={"order_by": "-run_after", "state": "success"})["dag_runs"][
        0
    ]
    log = client.call("GET", f"/dags/{DAG}/dagRuns/{run['dag_run_id']}/taskInstances/load/logs/1")
    assert "tickers" in str(log["content"])
