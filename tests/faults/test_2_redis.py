"""Redis loses its primary, or moves it, while tasks are queued and running. Cases of docs/faults.md: 19 and 20."""

from __future__ import annotations

from cluster import Api
from faultlab import Load, Tasks, eventually, failover, other, primary, reach, role, run


def test_switchover_while_tasks_are_queued_and_running(client: Api) -> None:
    host = primary("redis")
    tasks = Tasks(client, count=16, seconds=4)
    tasks.running()
    load = Load("redis")
    failover("redis")
    assert primary("redis") == other(host)
    assert load.result()["gap"] <= 3
    tasks.succeed()
    assert tasks.outcome()["repeated"] == set()


def test_a_killed_primary_comes_back_without_a_change_of_roles(client: Api) -> None:
    host = primary("redis")
    tasks = Tasks(client, count=12, seconds=2)
    tasks.running()
    reach(host).check_output("systemctl kill --signal=SIGKILL redis-server")
    eventually(lambda: role(host, "redis") == "primary", 30)
    reach(other(host)).check_output("systemctl restart redis-server")
    assert primary("redis") == host
    tasks.succeed()


def test_a_hung_primary_is_replaced_and_comes_back(client: Api) -> None:
    host = primary("redis")
    reach(host).check_output("systemctl kill --signal=SIGSTOP redis-server")
    assert "no primary of Redis runs" in failover("redis", fails=True)
    tasks = Tasks(client, count=6, seconds=2)
    said = failover("redis", "force=true")
    assert "fenced" in said
    assert primary("redis") == other(host)
    run("rejoin", "-eservice=redis", f"-ehost={host}")
    tasks.succeed()
