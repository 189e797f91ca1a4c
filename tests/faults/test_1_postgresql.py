"""PostgreSQL loses its primary, or moves it. Cases of docs/faults.md: 12, 14 to 18, 22 and 28."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from cluster import PROJECT, Api
from faultlab import (
    ADDRESSES,
    Load,
    Tasks,
    environment,
    eventually,
    failover,
    healthy,
    lock_of,
    other,
    playbook,
    primary,
    reach,
    role,
    run,
    sql,
    status,
)  # fmt: skip

DATA = "/var/lib/postgresql/17/main"
UNIT = "postgresql@17-main"
SMALL_DISK = "/run/small-disk"


def timeline(host: str) -> str:
    """The timeline that this primary writes."""
    return sql(host, "select substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)")


def test_a_killed_postmaster_comes_back_without_a_change_of_roles() -> None:
    host = primary()
    before = timeline(host)
    load = Load("postgresql")
    reach(host).check_output(f"kill -KILL $(head -n 1 {DATA}/postmaster.pid)")
    eventually(lambda: role(host) == "primary", 30)
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
    for host in ADDRESSES:
        slots = sql(host, "select string_agg(slot_name, ',') from pg_replication_slots")
        assert slots == (f"standby_{other(host)}" if host == first else "")


def test_refused_before_anything_changes() -> None:
    host = primary()
    refusals = {
        ("postgresql",): f"replay is paused on {other(host)}",
        ("postgresql", f"candidate={host}"): "it is the primary already",
        ("postgresql", "candidate=lb1"): "not a member of postgresql (data1, data2)",
        ("postgresql", "force=true"): "is a live primary",
        ("mysql",): "service has to be postgresql or redis",
    }
    sql(other(host), "select pg_wal_replay_pause()")
    try:
        with ThreadPoolExecutor() as pool:
            said = list(pool.map(lambda request: failover(*request, fails=True), refusals))
    finally:
        sql(other(host), "select pg_wal_replay_resume()")
    for reason, text in zip(refusals.values(), said, strict=True):
        assert reason in text
    assert primary() == host


def test_a_run_that_is_killed_halfway_is_finished_by_the_next() -> None:
    host = primary()
    load = Load("postgresql")
    playing = subprocess.Popen(
        playbook("failover", "-eservice=postgresql"), cwd=PROJECT, env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    eventually(lambda: reach(host).file(f"{DATA}/standby.signal").exists, 60)
    playing.send_signal(signal.SIGKILL)
    playing.wait()
    refused = failover("postgresql", f"candidate={other(host)}", "only_if_needed=true", fails=True)
    assert "another failover, started by" in refused
    # What the killed run left on the nodes may end by itself; its lock goes stale after 30 s.
    eventually(lambda: not any(lock_of(member) for member in ADDRESSES))
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


@pytest.fixture
def small_disk() -> Iterator[str]:
    """The primary, with its WAL on a file system that has room for two more segments."""
    host = primary()
    machine = reach(host)
    wal, kept = f"{DATA}/pg_wal", f"{DATA}/pg_wal.kept"
    size = int(machine.check_output(f"du --summarize --block-size=1M {wal}").split()[0]) + 40
    move = [
        f"systemctl stop {UNIT}",
        f"mkdir {SMALL_DISK}",
        f"mount -t tmpfs -o size={size}m small {SMALL_DISK}",
        f"cp -a {wal}/. {SMALL_DISK}",
        f"mv {wal} {kept}",
        f"ln -s {SMALL_DISK} {wal}",
        f"systemctl start {UNIT}",
    ]
    back = [
        f"systemctl stop {UNIT}",
        f"rm -rf {wal} {kept}",
        f"cp -a {SMALL_DISK} {wal}",
        f"umount {SMALL_DISK}",
        f"rmdir {SMALL_DISK}",
        f"systemctl start {UNIT}",
    ]
    machine.check_output(" && ".join(move))
    yield host
    machine.check_output(" && ".join(back))


def test_a_full_disk_costs_no_acknowledged_write(small_disk: str) -> None:
    before = timeline(small_disk)
    load = Load("postgresql")
    fill = "for _ in $(seq 40); do psql -XAtqc 'select txid_current(), pg_switch_wal()' || exit; done"
    reach(small_disk).run("cd / && runuser -u postgres -- sh -c %s", fill)
    eventually(lambda: role(small_disk) != "primary", 30)
    assert any("no primary" in problem for problem in status()["problems"])
    reach(small_disk).check_output(f"mount -o remount,size=4g {SMALL_DISK}")
    eventually(lambda: role(small_disk) == "primary", 60)
    load.result()
    assert (primary(), timeline(small_disk)) == (small_disk, before)
