"""PostgreSQL loses its primary, or moves it: the numbers are those of ../../shared fault cases."""

from __future__ import annotations

import signal
import subprocess
import time

from cluster import PROJECT, Api
from faultlab import Load, Tasks, eventually, failover, healthy, other, playbook, primary, reach, run, sql, status

DATA = "/var/lib/postgresql/17/main"


def timeline(host: str) -> str:
    """The timeline that this primary writes."""
    return sql(host, "select substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)")


def test_a_killed_postmaster_comes_back_without_a_change_of_roles() -> None:
    host = primary()
    before = timeline(host)
    load = Load("postgresql")
    reach(host).check_output(f"kill -KILL $(head -n 1 {DATA}/postmaster.pid)")
    load.result()
    assert (primary(), timeline(host)) == (host, before)


def test_switchover_there_and_back_under_load(client: Api) -> None:
    first = primary()
    tasks = Tasks(client, count=12, seconds=4)
    tasks.running()
    load = Load("postgresql")
    said = failover("postgresql")
    assert primary() == other(first)
    assert "promoted" in said
    failover("postgresql", f"candidate={first}")
    assert primary() == first
    assert load.result()["gap"] <= 3
    tasks.succeed()
    for host in ("data1", "data2"):
        slots = sql(host, "select string_agg(slot_name, ',') from pg_replication_slots")
        assert slots == (f"standby_{other(host)}" if host == first else "")


def test_refused_before_anything_changes() -> None:
    host = primary()
    sql(other(host), "select pg_wal_replay_pause()")
    try:
        assert f"replay is paused on {other(host)}" in failover("postgresql", fails=True)
    finally:
        sql(other(host), "select pg_wal_replay_resume()")
    assert "it is the primary already" in failover("postgresql", f"candidate={host}", fails=True)
    assert "not a member of postgresql (data1, data2)" in failover("postgresql", "candidate=lb1", fails=True)
    assert "is a live primary" in failover("postgresql", "force=true", fails=True)
    assert "service has to be postgresql or redis" in failover("mysql", fails=True)
    assert primary() == host


def test_a_run_that_is_killed_halfway_is_finished_by_the_next() -> None:
    host = primary()
    load = Load("postgresql")
    playing = subprocess.Popen(
        playbook("failover", "-eservice=postgresql"), cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    eventually(lambda: reach(host).file(f"{DATA}/standby.signal").exists, 60)
    playing.send_signal(signal.SIGKILL)
    playing.wait()
    refused = run("failover", "-eservice=postgresql", f"-ecandidate={other(host)}", "-eonly_if_needed=true", fails=True)
    assert "another failover, started by" in refused.stdout
    # What the killed run left on the nodes may end by itself; the lock goes stale after 30 s.
    time.sleep(31)
    said = failover("postgresql", f"candidate={other(host)}", "only_if_needed=true")
    assert "is the primary already" in said or "broke off" in said
    run("rejoin", "-eservice=postgresql", f"-ehost={host}")
    assert primary() == other(host)
    load.result()


def test_a_promotion_by_hand_is_noticed_and_mended() -> None:
    host = primary()
    sql(other(host), "select pg_promote()")
    assert any("2 primaries" in problem for problem in status()["problems"])
    assert "two primaries" in failover("postgresql", fails=True)
    # What the old one writes from now on is its own: the histories have parted.
    sql(host, "create table fault_parted ()")
    assert f"say so with confirm={host}" in run("rejoin", "-eservice=postgresql", f"-ehost={host}", fails=True).stdout
    run("rejoin", "-eservice=postgresql", f"-ehost={host}", f"-econfirm={host}")
    healthy()
    assert primary() == other(host)
    assert sql(host, "select to_regclass('fault_parted')") == ""
