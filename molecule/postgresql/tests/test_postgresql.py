"""A primary and a standby: real streaming over TLS, who gets in and who does not, and roles that a second run keeps."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scenario import PROJECT, SUBNET
from testinfra.host import Host

SCENARIO = Path(__file__).resolve().parents[1]
MEMBERS = {"postgresql1": f"{SUBNET}.20", "postgresql2": f"{SUBNET}.21"}
CONFIG, DATA = "/etc/postgresql/17/main", "/var/lib/postgresql/17/main"
PASSWORDS = {
    name: hashlib.sha256(f"molecule {name}".encode()).hexdigest()
    for name in ("airflow", "pipelines", "replication", "watchdog")
}
Machine = Callable[[str], Host]


def sql(host: Host, statement: str, database: str = "postgres") -> str:
    """The answer of the local server to its superuser."""
    return str(host.check_output("runuser -u postgres -- psql -XAtqd %s -c %s", database, statement)).strip()


def connect(
    client: Host, server: str, user: str, database: str, password: str = "", tls: str = "verify-full"
) -> Callable[[str], Any]:
    """A function that runs a statement over the network and returns Testinfra's result."""
    url = (
        f"host={MEMBERS[server]} user={user} dbname={database} sslmode={tls} "
        "sslrootcert=/etc/airflow-ha/tls/ca.crt connect_timeout=5"
    )
    secret = password or PASSWORDS.get(user, "wrong")
    return lambda statement: client.run("PGPASSWORD=%s psql -XAtqd %s -c %s", secret, url, statement)


def roles(machine: Machine) -> tuple[str, str]:
    """Names of the primary and of the standby."""
    found = {sql(machine(name), "select pg_is_in_recovery()"): name for name in MEMBERS}
    return found["f"], found["t"]


def eventually(question: Callable[[], object], seconds: float = 20) -> None:
    """Fail unless the question becomes true in time."""
    deadline = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.2)


def streaming(machine: Machine, *members: str) -> bool:
    """True when the primary's only client streams from its own slot; members: primary and standby, where known."""
    primary, standby = members or roles(machine)
    shown = sql(
        machine(primary),
        "select r.application_name, r.state, s.ssl, l.slot_name, l.active from pg_stat_replication r "
        "join pg_stat_ssl s using (pid) join pg_replication_slots l on l.active_pid = r.pid",
    )
    return shown == f"{standby}|streaming|t|standby_{standby}|t"


def converge(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the role again."""
    command = [
        "ansible-playbook", f"--inventory={PROJECT}/molecule/shared/inventory/hosts.yml",
        f"--inventory={SCENARIO}/inventory.yml", str(SCENARIO / "converge.yml"), *arguments,
    ]  # fmt: skip
    environment = os.environ | {
        "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"),
        "ANSIBLE_ROLES_PATH": f"{PROJECT}/roles",
    }
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(autouse=True)
def log_on_failure(machine: Machine, request: pytest.FixtureRequest) -> Iterator[None]:
    """Print what the servers said when a test fails."""
    before = request.session.testsfailed
    yield
    if request.session.testsfailed > before:
        for name in MEMBERS:
            print(machine(name).run("tail -n 30 /var/log/postgresql/*.log").stdout)
            print(machine(name).run("journalctl -u 'postgresql*' -n 20 --no-pager").stdout)


def test_units_run_and_come_back_after_a_boot(host: Host) -> None:
    assert host.service("postgresql@17-main").is_running
    assert host.service("postgresql@17-main").is_enabled
    assert host.check_output("pg_lsclusters --no-header").count("\n") == 0


def test_cluster_is_made_as_it_should_be(host: Host) -> None:
    for setting, value in {
        "data_checksums": "on", "wal_log_hints": "on", "password_encryption": "scram-sha-256",
        "ssl": "on", "max_connections": "200", "max_slot_wal_keep_size": "8GB",
    }.items():  # fmt: skip
        assert sql(host, f"show {setting}") == value
    assert sql(host, "select datcollate from pg_database where datname = 'airflow'") == "C.UTF-8"
    assert sql(host, "select count(*) from pg_settings where pending_restart") == "0"


def test_secrets_are_closed_and_system_folders_kept_their_owner(host: Host) -> None:
    passfile = host.file(f"{CONFIG}/replication.pgpass")
    assert (passfile.user, passfile.mode) == ("postgres", 0o600)
    assert host.file(f"{CONFIG}/pg_hba.conf").mode == 0o640
    assert host.file(DATA).mode == 0o700
    for folder in ("/etc", "/usr/local/lib", "/var/lib", "/etc/systemd/system"):
        assert host.file(folder).user == "root"


def test_both_have_the_same_settings(machine: Machine) -> None:
    files = {machine(name).file(f"{CONFIG}/conf.d/airflow-ha.conf").content_string for name in MEMBERS}
    assert len(files) == 1
    for name in MEMBERS:
        assert "primary_conninfo" not in machine(name).file(f"{DATA}/postgresql.auto.conf").content_string


def test_a_write_on_the_primary_reaches_the_standby(machine: Machine) -> None:
    primary, standby = roles(machine)
    assert streaming(machine)
    client = machine("postgresql2")
    write = connect(client, primary, "airflow", "airflow")
    read = connect(client, standby, "airflow", "airflow")
    created = write("create table molecule as select 'seen by all' as words")
    assert created.rc == 0, created.stderr
    try:
        eventually(lambda: read("select words from molecule").stdout.strip() == "seen by all", 5)
        assert "read-only transaction" in read("delete from molecule").stderr
        assert write("select version from pg_stat_ssl where pid = pg_backend_pid()").stdout.strip() == "TLSv1.3"
    finally:
        write("drop table molecule")


@pytest.mark.parametrize(
    ("client", "user", "database", "password", "tls", "complaint"),
    [
        ("postgresql2", "airflow", "airflow", "", "disable", "no encryption"),
        ("postgresql2", "airflow", "airflow", "guess", "require", "password authentication failed"),
        ("postgresql2", "airflow", "pipelines", "", "require", "no pg_hba.conf entry"),
        ("postgresql2", "airflow", "postgres", "", "require", "no pg_hba.conf entry"),
        ("postgresql2", "postgres", "postgres", "guess", "require", "no pg_hba.conf entry"),
        ("postgresql2", "replicator", "airflow", "", "require", "no pg_hba.conf entry"),
        ("postgresql2", "watchdog", "watchdog", "", "verify-full", ""),
        # A worker: no way to Airflow's metadata or to the lease, but to what the pipelines write.
        ("postgresql1", "watchdog", "watchdog", "", "require", "no pg_hba.conf entry"),
        ("postgresql1", "airflow", "airflow", "", "require", "no pg_hba.conf entry"),
        ("postgresql1", "pipelines", "pipelines", "", "verify-full", ""),
        ("postgresql2", "pipelines", "pipelines", "", "verify-full", ""),
    ],
)
def test_only_who_needs_it_gets_in(
    machine: Machine, client: str, user: str, database: str, password: str, tls: str, complaint: str
) -> None:
    # To the other machine: a connection to oneself would come from another address.
    server = next(name for name in MEMBERS if name != client)
    result = connect(machine(client), server, user, database, password, tls)("select 1")
    assert complaint in result.stderr
    assert (result.rc == 0) is (complaint == "")


def test_passwords_are_nowhere_to_be_read(host: Host) -> None:
    assert sql(host, "select count(*) from pg_authid where rolcanlogin and rolpassword like 'SCRAM-SHA-256$%'") == "4"
    for place in ("cat /var/log/postgresql/*", "journalctl --no-pager", "ps axwwe"):
        # sudo logs what these tests themselves run, with PGPASSWORD.
        lines = [line for line in host.check_output(place).splitlines() if "PGPASSWORD=" not in line]
        assert not [line for line in lines if any(password in line for password in PASSWORDS.values())], place


def test_the_watchdogs_role_may_look_and_nothing_else(machine: Machine) -> None:
    primary, _ = roles(machine)
    shown = sql(
        machine(primary),
        "select rolcanlogin, rolsuper, rolpassword is null, pg_has_role(oid, 'pg_monitor', 'member'), "
        "(select count(*) from pg_auth_members where member = r.oid) from pg_authid r "
        "where rolname = 'airflow-watchdog'",
    )
    assert shown == "t|f|t|t|1"


def test_a_run_after_roles_were_swapped_changes_nothing(machine: Machine) -> None:
    old, new = roles(machine)
    machine(old).check_output("systemctl stop postgresql@17-main")
    sql(machine(new), "select pg_promote()")
    sql(machine(new), f"select pg_create_physical_replication_slot('standby_{old}')")
    machine(old).check_output(f"rm -r {DATA}/pg_replslot/standby_{new}")
    machine(old).check_output(f"install -m 0600 -o postgres -g postgres /dev/null {DATA}/standby.signal")
    machine(old).check_output("systemctl start postgresql@17-main")
    # The settings name all members: the old primary finds the new one by itself.
    eventually(lambda: streaming(machine))
    assert roles(machine) == (new, old)
    run = converge()
    assert re.findall(r"changed=(\d+) .*failed=(\d+)", run.stdout) == [("0", "0")] * 2, run.stdout + run.stderr
    assert roles(machine) == (new, old)
    assert streaming(machine)


def test_a_warm_standby_acknowledges_commits(machine: Machine) -> None:
    primary, standby = roles(machine)
    options = json.dumps({"postgresql_hot_standby": False, "postgresql_synchronous_mode": "on"})
    started = sql(machine(primary), "select pg_postmaster_start_time()")
    run = converge(f"-e{options}")
    assert run.returncode == 0, run.stdout + run.stderr
    assert sql(machine(primary), "select pg_postmaster_start_time()") == started, "a reload is enough for the primary"
    refused = machine(standby).run("runuser -u postgres -- psql -XAtqc 'select 1'")
    assert "Hot standby mode is disabled" in refused.stderr
    eventually(lambda: streaming(machine, primary, standby))
    eventually(lambda: sql(machine(primary), "select sync_state from pg_stat_replication") == "quorum")
    write = "timeout 3 runuser -u postgres -- psql -XAtqc 'create table waits ()'"
    machine(standby).check_output("systemctl stop postgresql@17-main")
    assert machine(primary).run(write).rc == 124, "a commit did not wait for the standby"
    machine(standby).check_output("systemctl start postgresql@17-main")
    eventually(lambda: machine(primary).run(write.replace("waits", "goes_on")).rc == 0)
    run = converge()
    assert run.returncode == 0, run.stdout + run.stderr
    eventually(lambda: streaming(machine))
