"""PgBouncer before one PostgreSQL: who gets in, that transactions share connections, and a server that goes away."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import pytest
from scenario import SUBNET
from testinfra.host import Host

ADDRESS = f"{SUBNET}.28"
PASSWORDS = {name: hashlib.sha256(f"molecule {name}".encode()).hexdigest() for name in ("airflow", "pipelines")}


def ask(host: Host, statement: str, user: str = "airflow", database: str = "airflow", **more: str) -> Any:
    """Testinfra's result of a statement through PgBouncer."""
    options = {"host": ADDRESS, "port": "6432", "sslmode": "verify-full", "sslrootcert": "/etc/airflow-ha/tls/ca.crt"}
    url = " ".join(f"{name}={value}" for name, value in (options | {"user": user, "dbname": database} | more).items())
    password = more.get("password", PASSWORDS.get(user, "guess"))
    return host.run("PGPASSWORD=%s psql -XAtqd %s -c %s", password, url, statement)


def backends(host: Host) -> int:
    """Connections that PostgreSQL has of the user airflow."""
    query = "select count(*) from pg_stat_activity where usename = 'airflow'"
    return int(host.check_output("runuser -u postgres -- psql -XAtqc %s", query))


def test_runs_and_comes_back_after_a_boot(host: Host) -> None:
    assert host.service("pgbouncer").is_running
    assert host.service("pgbouncer").is_enabled


def test_no_password_is_on_the_disk(host: Host) -> None:
    for name in ("users.txt", "hba.conf", "pgbouncer.ini"):
        file = host.file(f"/etc/pgbouncer/{name}")
        assert (file.user, file.group, file.mode) == ("root", "postgres", 0o640)
        assert not any(password in file.content_string for password in PASSWORDS.values())


def test_writes_over_tls_on_both_sides(host: Host) -> None:
    assert ask(host, "create table if not exists pooled (n int)").rc == 0
    assert ask(host, "select version from pg_stat_ssl where pid = pg_backend_pid()").stdout.strip() == "TLSv1.3"
    shown = ask(host, "show transaction_read_only", target_session_attrs="read-write")
    assert shown.stdout.strip() == "off", shown.stderr


@pytest.mark.parametrize(
    ("user", "database", "more"),
    [
        ("airflow", "airflow", {"sslmode": "disable"}),
        ("airflow", "airflow", {"password": "guess"}),
        ("airflow", "pipelines", {}),
        ("postgres", "airflow", {}),
        ("postgres", "pgbouncer", {}),
    ],
)
def test_nobody_else_gets_in(host: Host, user: str, database: str, more: dict[str, str]) -> None:
    assert ask(host, "select 1", user, database, **more).rc != 0


def test_clients_share_connections_between_transactions(host: Host) -> None:
    url = f"host={ADDRESS} port=6432 user=airflow dbname=airflow sslmode=require"
    script = f"""
import psycopg2
clients = [psycopg2.connect({url!r}, password={PASSWORDS["airflow"]!r}) for _ in range(30)]
for client in clients:
    client.autocommit = True
    client.cursor().execute("select 1")
pids = set()
for client in clients:
    cursor = client.cursor()
    cursor.execute("select pg_backend_pid()")
    pids.add(cursor.fetchone()[0])
print(len(pids))
"""
    assert int(host.check_output("python3 -c %s", script)) < 5
    assert backends(host) < 5


def test_a_prepared_statement_outlives_its_transaction(host: Host) -> None:
    # Both run the same statement by the protocol's own means, as drivers do, on whatever connection is free.
    options = f"-h {ADDRESS} -p 6432 -U airflow -n -c 4 -j 1 -t 50 -M prepared -f - airflow"
    bench = f"PGPASSWORD={PASSWORDS['airflow']} PGSSLMODE=require pgbench {options}"
    answer = host.run(f"echo 'insert into pooled values (:client_id);' | {bench}")
    assert "number of failed transactions: 0" in answer.stdout, answer.stderr
    assert ask(host, "select count(*) >= 200 from pooled").stdout.strip() == "t"


def test_a_postgresql_that_was_restarted_is_used_at_once(host: Host) -> None:
    host.check_output("systemctl restart postgresql@17-main")
    deadline = time.monotonic() + 5
    while ask(host, "select 1").rc != 0:
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.2)
