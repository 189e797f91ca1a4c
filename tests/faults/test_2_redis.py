"""Redis loses its primary, or moves it, while tasks are queued and running."""

from __future__ import annotations

from cluster import Api
from faultlab import Load, Tasks, failover, other, primary, reach, run


def test_switchover_while_tasks_are_queued_and_running(client: Api) -> None:
    host = primary("redis")
    tasks = Tasks(client, count=16, seconds=6)
    tasks.running()
    load = Load("redis")
    failover("redis")
    assert primary("redis") == other(host)
    assert load.result()["gap"] <= 3
    tasks.succeed()


def test_the_role_survives_a_restart() -> None:
    host = primary("redis")
    for name in (host, other(host)):
        reach(name).check_output("systemctl restart redis-server")
    assert primary("redis") == host


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
