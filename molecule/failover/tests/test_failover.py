"""The playbooks on data nodes alone; under load, with everything around them, they run in tests/faults.

failover1 and failover2 are a synchronous pair; failover3 streams from failover2 and is a warm standby.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scenario import SUBNET
from testinfra.host import Host

PROJECT = Path(__file__).resolve().parents[3]
INVENTORIES = [PROJECT / "molecule/shared/inventory/hosts.yml", PROJECT / "molecule/failover/inventory.yml"]
MEMBERS = {"postgresql": ["failover1", "failover2", "failover3"], "redis": ["failover1", "failover2"]}
SERVICES = list(MEMBERS)
PORTS = {"postgresql": 5432, "redis": 6379}
ADDRESSES = {"failover1": f"{SUBNET}.80", "failover2": f"{SUBNET}.81", "failover3": f"{SUBNET}.82"}
# Commits, and so waits for a synchronous standby, without a table.
WRITE = "select pg_logical_emit_message(true, 'test', 'write')"
DATA = "/var/lib/postgresql/17/main"
Machine = Callable[[str], Host]


def play(name: str, *variables: str, fails: bool = False) -> str:
    """Run a playbook; return what it printed."""
    command = ["ansible-playbook", *(f"-i{path}" for path in INVENTORIES), f"playbooks/{name}.yml"]
    done = subprocess.run(
        [*command, *(f"-e{item}" for item in variables)], cwd=PROJECT, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, check=False, env={**os.environ, "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg")},
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


def state(host: Host, service: str) -> dict[str, Any]:
    """What the member says of itself."""
    ask = f'echo \'{{"run": "test", "by": "test"}}\' | python3 /usr/local/lib/airflow-ha/failover {service} state'
    return dict(json.loads(host.check_output(ask)))


def primary(machine: Machine, service: str) -> str:
    """The one primary."""
    (found,) = [n for n in MEMBERS[service] if state(machine(n), service)["role"] == "primary"]
    return found


def other(name: str) -> str:
    """The other member of the pair."""
    return {"failover1": "failover2", "failover2": "failover1"}[name]


def eventually(question: Callable[[], object], seconds: float = 20) -> None:
    """Fail unless the question becomes true in time."""
    deadline = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.3)


def sql(host: Host, statement: str) -> str:
    """The answer of the local server to its superuser; one that never comes is a failure."""
    return str(host.check_output("timeout 10 runuser -u postgres -- psql -XAtqc %s", statement)).strip()


def reaches(host: Host, name: str, service: str) -> bool:
    """Whether the port of that machine is open to this one."""
    return bool(host.run(f"timeout 2 bash -c '</dev/tcp/{ADDRESSES[name]}/{PORTS[service]}'").rc == 0)


def streams(machine: Machine, *names: str) -> bool:
    """Whether these members of PostgreSQL stream."""
    receivers = [state(machine(name), "postgresql").get("receiver") or {} for name in names]
    return all(receiver.get("status") == "streaming" for receiver in receivers)


def slots(host: Host) -> str:
    """Names of the slots of this member."""
    return sql(host, "select string_agg(slot_name, ' ' order by slot_name) from pg_replication_slots")


@pytest.mark.parametrize("service", SERVICES)
def test_switchover(service: str, machine: Machine) -> None:
    before = primary(machine, service)
    assert "planned switchover" in play("failover", f"service={service}", "dry_run=true")
    assert primary(machine, service) == before
    play("failover", f"service={service}")
    assert primary(machine, service) == other(before)
    assert state(machine(before), service)["receiver"]["status"] == "streaming"
    assert "All is well." in play("status")


def test_a_warm_standby_of_a_standby_takes_over_and_gives_back(machine: Machine) -> None:
    before = primary(machine, "postgresql")
    eventually(lambda: streams(machine, "failover3"))
    warm = state(machine("failover3"), "postgresql")
    assert (warm["hot"], warm["receiver"]["sender"]) == (False, ADDRESSES["failover2"])
    sql(machine(before), "drop table if exists carried; create table carried as select 1 as number")
    play("failover", "service=postgresql", "candidate=failover3")
    assert primary(machine, "postgresql") == "failover3"
    # Waits for an acknowledgement: the names of the synchronous standbys fit the new primary.
    sql(machine("failover3"), "insert into carried values (2)")
    assert slots(machine("failover3")) == "standby_failover1 standby_failover2"
    assert slots(machine("failover2")) == ""
    play("failover", "service=postgresql", "candidate=failover1")
    assert primary(machine, "postgresql") == "failover1"
    assert sql(machine("failover1"), "select sum(number) from carried") == "3"
    assert (slots(machine("failover1")), slots(machine("failover2"))) == ("standby_failover2", "standby_failover3")
    eventually(lambda: streams(machine, "failover2", "failover3"))
    assert "All is well." in play("status")


def test_writes_go_on_without_a_standby_once_told_so(machine: Machine) -> None:
    host, standby = machine("failover1"), machine("failover2")
    standby.check_output("systemctl stop postgresql@17-main")
    assert host.run("timeout 2 runuser -u postgres -- psql -XAtqc %s", WRITE).rc == 124
    play("synchronous", "enabled=false")
    sql(host, WRITE)
    assert "no standby streams" in play("synchronous", "enabled=true", fails=True)
    standby.check_output("systemctl start postgresql@17-main")
    eventually(lambda: streams(machine, "failover2", "failover3"))
    assert "failover1: synchronous replication is suspended" in play("status", fails=True)
    play("synchronous", "enabled=true")
    assert "All is well." in play("status")


@pytest.mark.parametrize("service", SERVICES)
def test_a_fenced_primary_stays_down_until_it_rejoins(service: str, machine: Machine) -> None:
    if service == "postgresql":
        # Then nobody is left to acknowledge what failover1 writes: failover3 streams from failover2.
        play("failover", "service=postgresql", "candidate=failover2")
    before = primary(machine, service)
    assert "is a live primary" in play("failover", f"service={service}", "force=true", fails=True)
    play("failover", f"service={service}", "force=true", f"confirm={before}")
    assert primary(machine, service) == other(before)
    assert state(machine(before), service)["masked"]
    if service == "postgresql":
        sql(machine(other(before)), WRITE)
        machine(before).check_output("pg_ctlcluster --skip-systemctl-redirect 17 main start")
    else:
        machine(before).check_output("systemctl unmask redis-server; systemctl start redis-server")
    # As after a boot.
    machine(before).check_output("nft flush ruleset; systemctl restart airflow-ha-fence")
    assert reaches(machine(before), before, service)
    assert not reaches(machine(other(before)), before, service)
    assert f"{before}: " in play("status", fails=True)
    play("rejoin", f"service={service}", f"host={before}")
    assert not state(machine(before), service)["masked"]
    assert reaches(machine(other(before)), before, service)
    if service == "postgresql":
        play("synchronous", "enabled=true")
        eventually(lambda: streams(machine, "failover2", "failover3"))
    assert "All is well." in play("status")


@pytest.mark.parametrize("service", SERVICES)
def test_a_former_primary_that_starts_finds_the_new_one(service: str, machine: Machine) -> None:
    before = primary(machine, service)
    unit = {"postgresql": "postgresql@17-main", "redis": "redis-server"}[service]
    machine(before).check_output(f"systemctl stop {unit}")
    play("failover", f"service={service}", "force=true")
    # As after a boot of a machine that could not be fenced.
    marker = f"rm -f {DATA}/standby.signal; " if service == "postgresql" else ""
    opened = f"rm -f /etc/airflow-ha/fence/*; nft delete table inet airflow_ha_fence_{service}"
    machine(before).check_output(f"{marker}{opened}; systemctl unmask {unit}; systemctl start {unit}")
    assert state(machine(before), service)["role"] == "standby"
    assert primary(machine, service) == other(before)
    play("rejoin", f"service={service}", f"host={before}")


def test_what_a_broken_off_switchover_left_is_finished(machine: Machine) -> None:
    before = primary(machine, "postgresql")
    machine(before).check_output(
        f"runuser -u postgres -- touch {DATA}/standby.signal; systemctl stop postgresql@17-main"
    )
    assert "broke off" in play("failover", "service=postgresql")
    primary(machine, "postgresql")
    eventually(lambda: streams(machine, "failover3"))
    assert "All is well." in play("status")


def test_a_standby_that_cannot_be_rewound_is_cloned_and_says_how_far_it_is(machine: Machine) -> None:
    machine("failover3").check_output(f"systemctl stop postgresql@17-main; rm {DATA}/global/pg_control")
    assert "failover3: base backup: " in play("rejoin", "service=postgresql", "host=failover3")
    assert streams(machine, "failover3")
    assert "All is well." in play("status")


def test_a_full_disk_stops_writes_and_nothing_else(machine: Machine) -> None:
    host = machine(primary(machine, "postgresql"))
    unit, wal = "postgresql@17-main", f"{DATA}/pg_wal"
    host.check_output(
        f"systemctl stop {unit}; mv {wal} {wal}.disk; install -d -o postgres -g postgres -m 0700 {wal}"
        f"; mount -t tmpfs -o size=640m,mode=0700,uid=postgres,gid=postgres tmpfs {wal}"
        f"; cp -a {wal}.disk/. {wal}/; systemctl start {unit}"
    )
    try:
        sql(host, "create table if not exists filled (number int, filler text)")
        # All but 24 MiB of the file system, which is a segment and a half.
        host.check_output(f"fallocate -l $(($(df --output=avail -B1 {wal} | tail -n 1) - 25165824)) {wal}/ballast")
        filler = "select {}, string_agg(md5(random()::text), '-') from generate_series(1, 60000)"
        insert = 'timeout 10 runuser -u postgres -- psql -XAtqc "insert into filled ' + filler + '"'
        acknowledged = 0
        while host.run(insert.format(acknowledged)).rc == 0:
            acknowledged += 1
            assert acknowledged < 60, "the disk did not fill"
        host.check_output(f"rm {wal}/ballast")
        # By itself: nobody starts anything.
        found = "runuser -u postgres -- psql -XAtqc 'select count(distinct number) from filled'"
        eventually(lambda: host.run(found).stdout.strip().isdigit(), 30)
        assert int(sql(host, "select count(distinct number) from filled")) >= acknowledged
        assert sql(host, "select count(*) from filled where length(filler) <> 1979999") == "0"
        sql(host, "drop table filled")
    finally:
        host.check_output(
            f"rm -f {wal}/ballast; systemctl stop {unit}; cp -a {wal}/. {wal}.disk/; umount {wal}; rmdir {wal}"
            f"; mv {wal}.disk {wal}; systemctl start {unit}"
        )
    eventually(lambda: streams(machine, "failover3"))
    assert "All is well." in play("status")


def test_every_step_is_in_the_journal(machine: Machine) -> None:
    lines = machine("failover1").check_output("cat /var/lib/airflow-ha/failover.jsonl").splitlines()
    assert {json.loads(line)["service"] for line in lines} == set(SERVICES)
    assert machine("failover1").file("/var/lib/airflow-ha/failover.jsonl").mode == 0o640


def test_settings_are_for_root_alone(machine: Machine) -> None:
    for service in SERVICES:
        file = machine("failover1").file(f"/etc/airflow-ha/failover/{service}.json")
        assert (file.user, file.mode) == ("root", 0o600)
