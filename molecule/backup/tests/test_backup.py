"""Two data nodes and a repository: backups, the WAL archive with and without the repository, and real restores."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

PROJECT = Path(__file__).resolve().parents[3]
INVENTORIES = [PROJECT / "molecule/shared/inventory/hosts.yml", PROJECT / "molecule/backup/inventory.yml"]
DATA_NODES = ["backup1", "backup2"]
REPOSITORY = "backup3"
SECRETS = [
    hashlib.sha256(f"molecule {name}".encode()).hexdigest()
    for name in ("backup_cipher_pass", "backup_redis_password", "redis_admin_password")
]
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


def sql(host: Host, statement: str) -> str:
    """The answer of the local server to its superuser."""
    return str(host.check_output("runuser -u postgres -- psql -XAtqd postgres -c %s", statement)).strip()


def primary(machine: Machine) -> Host:
    """The one primary of PostgreSQL."""
    (found,) = [host for name in DATA_NODES if sql(host := machine(name), "select pg_is_in_recovery()") == "f"]
    return found


def repository(machine: Machine) -> dict[str, Any]:
    """What the repository holds."""
    ask = "runuser -u pgbackrest -- python3 /usr/local/lib/airflow-ha/backup_state.py"
    return dict(json.loads(machine(REPOSITORY).check_output(ask)))


def eventually(question: Callable[[], object], seconds: float = 60) -> None:
    """Fail unless the question becomes true in time."""
    deadline = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.5)


def redis(host: Host, *command: str) -> str:
    """The answer of the local Redis to its administrator."""
    lines = f"AUTH admin {SECRETS[2]}\\n{' '.join(command)}\\n"
    answer = host.check_output(f"printf '{lines}' | redis-cli -s /run/redis/redis-server.sock")
    return str(answer).splitlines()[-1]


@pytest.fixture(scope="session", autouse=True)
def first_backup(machine: Machine) -> None:
    """The deployment has begun it by itself."""
    eventually(lambda: repository(machine)["backups"] and not repository(machine)["running"], 120)
    machine(REPOSITORY).check_output("systemctl start redis-copy")


def test_units_run_and_come_back_after_a_boot(host: Host) -> None:
    units = ["pgbackrest"]
    if host.backend.get_pytest_id().endswith(REPOSITORY):
        units += ["pgbackrest-backup@full.timer", "pgbackrest-backup@incr.timer", "redis-copy.timer"]
    for unit in units:
        assert host.service(unit).is_running, unit
        assert host.service(unit).is_enabled, unit
    assert "failed" not in host.check_output("systemctl list-units --failed --no-legend --plain")


def test_processes_have_a_user_of_their_own_and_show_no_secret(host: Host) -> None:
    expected = "pgbackrest" if host.backend.get_pytest_id().endswith(REPOSITORY) else "postgres"
    assert set(host.check_output("ps -C pgbackrest -o user:20=").split()) == {expected}
    shown = host.check_output("ps axww -o args; journalctl --no-pager --quiet --unit='*backrest*' --unit='r*'")
    patterns = "\n".join(SECRETS)
    found = host.run("printf '%%s\n' %s | grep -rlFf - /etc /var/log /var/spool /usr/local", patterns).stdout
    for secret in SECRETS:
        assert secret not in shown
    for path in found.split():
        assert host.file(path).mode & 0o137 == 0, (path, oct(host.file(path).mode))
    assert host.file("/etc/pgbackrest/pgbackrest.conf").mode == 0o640


def test_only_the_repository_host_can_read_the_repository(machine: Machine) -> None:
    for name in DATA_NODES:
        assert SECRETS[0] not in machine(name).file("/etc/pgbackrest/pgbackrest.conf").content_string
    begin = "find /var/lib/pgbackrest -type f -exec head --bytes=8 {} ';' -exec stat --format=' %a' {} ';'"
    stored = machine(REPOSITORY).check_output(begin).splitlines()
    assert len(stored) > 5
    assert set(stored) == {"Salted__ 640"}


def test_strangers_are_refused(machine: Machine) -> None:
    # A data node is known to the repository host, and not to the other data node.
    ask = "runuser -u postgres -- pgbackrest --stanza=airflow --repo1-host=backup2 --log-level-console=error info"
    answer = machine("backup1").run(ask)
    assert "access denied" in answer.stdout + answer.stderr


def test_backup_on_demand(machine: Machine) -> None:
    sql(primary(machine), "create table if not exists kept as select 1 as n")
    assert "incr" in play("backup", "type=incr")
    assert repository(machine)["backups"][-1]["type"] == "incr"
    assert "it has to be full, diff or incr" in play("backup", "type=all", fails=True)


def test_copy_of_redis_can_be_loaded(machine: Machine) -> None:
    owner = next(machine(name) for name in DATA_NODES if redis(machine(name), "ROLE") and is_master(machine(name)))
    redis(owner, "SET", "before-copy", "yes")
    eventually(lambda: all(redis(machine(name), "GET", "before-copy") == "yes" for name in DATA_NODES))
    keeper = machine(REPOSITORY)
    keeper.check_output("systemctl start redis-copy")
    newest = keeper.check_output("ls -t /var/lib/redis-copies/*.rdb").splitlines()[0]
    assert (keeper.file(newest).user, keeper.file(newest).mode) == ("pgbackrest", 0o600)
    data = keeper.check_output("base64 --wrap=0 %s", newest)
    scratch = machine("backup1")
    scratch.check_output(f"mkdir -p /tmp/scratch && echo {data} | base64 -d > /tmp/scratch/dump.rdb")
    scratch.check_output("cd /tmp/scratch && redis-server --port 0 --unixsocket /tmp/scratch/s --daemonize yes")
    eventually(lambda: scratch.run("redis-cli -s /tmp/scratch/s get before-copy").stdout.strip() == "yes")
    scratch.check_output("redis-cli -s /tmp/scratch/s shutdown nosave; rm -r /tmp/scratch")


def is_master(host: Host) -> bool:
    """Whether this member is the primary of Redis."""
    lines = f"AUTH admin {SECRETS[2]}\\nINFO replication\\n"
    return "role:master" in host.check_output(f"printf '{lines}' | redis-cli -s /run/redis/redis-server.sock")


def test_unreachable_repository_is_seen_and_no_wal_is_lost(machine: Machine) -> None:
    host = primary(machine)
    machine(REPOSITORY).check_output("systemctl stop pgbackrest")
    try:
        for _ in range(3):
            sql(host, "create table t as select generate_series(1, 100); drop table t; select pg_switch_wal()")
        eventually(lambda: sql(host, "select last_failed_time > last_archived_time from pg_stat_archiver") == "t")
        assert "WAL does not reach the archive" in play("status", fails=True)
        assert sql(host, "select count(*) > 2 from pg_ls_archive_statusdir() where name like '%.ready'") == "t"
    finally:
        machine(REPOSITORY).check_output("systemctl start pgbackrest")
    last = sql(host, "select pg_walfile_name(pg_switch_wal())")
    eventually(lambda: sql(host, f"select last_archived_wal >= '{last}' from pg_stat_archiver") == "t", 90)
    assert repository(machine)["gaps"] == []


def test_backups_go_on_after_a_switchover(machine: Machine) -> None:
    def command(name: str) -> str:
        return sql(machine(name), "show archive_command")

    before = [command(name) for name in DATA_NODES]
    old = primary(machine)
    play("failover", "service=postgresql")
    assert primary(machine) is not old
    assert [command(name) for name in DATA_NODES] == before
    play("backup", "type=incr")
    state = repository(machine)
    timeline = sql(primary(machine), "select timeline_id from pg_control_checkpoint()")
    assert state["backups"][-1]["wal"].startswith(f"{int(timeline):08X}")
    assert state["gaps"] == []
    assert "All is well." in play("status")


def test_restore_to_a_moment(machine: Machine) -> None:
    host = primary(machine)
    sql(
        host,
        "drop table if exists counted; create table counted as select generate_series(1, 1000) as n",
    )
    # Between two commits: what the first wrote is back, what the second wrote is not.
    time.sleep(0.1)
    moment = sql(host, "select to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')")
    time.sleep(0.1)
    sql(host, "insert into counted select generate_series(1001, 1500); delete from counted where n <= 10")
    name = host.check_output("hostname")
    assert f"say confirm={name}" in play("restore", f"target_time={moment}", fails=True)
    assert sql(host, "select count(*) from counted") == "1490"

    play("restore", f"target_time={moment}", f"confirm={name}")
    rows = "select count(*), min(n), max(n), sum(n) from counted"
    assert sql(primary(machine), rows) == "1000|1|1000|500500"
    other = machine(next(one for one in DATA_NODES if one != name))
    eventually(lambda: sql(other, rows) == "1000|1|1000|500500", 20)
    assert sql(host, "select state from pg_stat_replication") == "streaming"
    # Nothing that would end another recovery is left, and the archive and the backups go on.
    for member in (host, other):
        assert sql(member, "show recovery_target_time") + sql(member, "show restore_command") == ""
        assert sql(member, "select count(*) from pg_settings where pending_restart") == "0"
    sql(host, "insert into counted values (0); select pg_switch_wal()")
    eventually(lambda: repository(machine)["backups"][-1]["type"] == "full" and not repository(machine)["running"])
    assert "All is well." in play("status")
