"""What a user and an operator of the whole cluster rely on, asked from outside."""

from __future__ import annotations

import json
import time

import pytest
import requests
from cluster import SUBNET, VIP, Api, import_components

UNITS = {
    "lb": ["haproxy", "keepalived"],
    "airflow": ["airflow-api-server", "airflow-dag-processor", "airflow-triggerer",
                "airflow-flower", "haproxy", "spark-master"],
    "worker": ["airflow-worker", "haproxy", "spark-worker"],
    "data": ["redis-server", "zookeeper", "pgbackrest"],
    "witness": ["zookeeper", "pgbackrest", "pgbackrest-backup@full.timer", "pgbackrest-backup@incr.timer",
                "redis-copy.timer"],
}  # fmt: skip


def journal(host, unit: str) -> str:
    return host.run(f"journalctl --no-pager --lines=40 --unit={unit}").stdout


def test_services_run_and_will_run_after_a_reboot(host):
    kind = host.check_output("hostname").rstrip("0123456789")
    for unit in [*UNITS[kind], "airflow-watchdog"]:
        assert host.service(unit).is_running, f"{unit}\n{journal(host, unit)}"
        assert host.service(unit).is_enabled, unit


def test_no_unit_has_failed(host):
    assert host.check_output("systemctl list-units --failed --no-legend --plain") == ""


def test_system_folders_kept_their_owner(host):
    for folder in ("/etc", "/usr", "/opt", "/var", "/var/lib"):
        assert (host.file(folder).user, host.file(folder).mode) == ("root", 0o755)


def test_every_component_imports_from_the_lock(machine):
    assert import_components(machine("airflow1")) == ""


def test_user_interface_and_login_over_the_vip(http, api):
    page = http.get(f"https://{VIP}/", timeout=10)
    assert page.status_code == 200
    assert "airflow" in page.text.lower()
    assert api().call("GET", "/monitor/health")["metadatabase"]["status"] == "healthy"


def test_wrong_password_is_refused():
    with pytest.raises(requests.HTTPError) as refused:
        Api(VIP, "wrong")
    assert refused.value.response.status_code == 401


def test_vip_is_not_trusted_without_the_generated_authority():
    with requests.Session() as session:
        session.trust_env = False
        with pytest.raises(requests.exceptions.SSLError):
            session.get(f"https://{VIP}/", timeout=10)


def test_flower_asks_for_a_password_and_shows_both_workers(http, secrets):
    assert http.get(f"https://{VIP}/flower/api/workers", timeout=10).status_code == 401
    http.auth = ("admin", secrets["secret_airflow_flower_password"])
    deadline = time.monotonic() + 60
    workers: dict[str, object] = {}
    while len(workers) < 2 and time.monotonic() < deadline:
        workers = http.get(f"https://{VIP}/flower/api/workers", params={"refresh": 1}, timeout=20).json()
        time.sleep(2)
    assert sorted(workers) == ["celery@worker1", "celery@worker2"]


def test_spark_has_one_leader_and_two_workers(http, secrets, machine):
    http.auth = ("admin", secrets["secret_haproxy_stats_password"])
    leader = http.get(f"https://{VIP}/spark/json/", timeout=10).json()
    assert leader["status"] == "ALIVE"
    assert leader["aliveworkers"] == 2
    states = [
        json.loads(machine(name).check_output(f"curl -sf http://{name}:8081/json/"))["status"]
        for name in ("airflow1", "airflow2")
    ]
    assert sorted(states) == ["ALIVE", "STANDBY"]


def test_postgresql_streams_over_tls(machine):
    primary, standby = sorted(("data1", "data2"), key=lambda name: is_standby(machine(name)))
    query = (
        "select state, ssl from pg_stat_replication join pg_stat_ssl using (pid)"
        " where application_name not like 'pg_basebackup%'"
    )
    with machine(primary).sudo("postgres"):
        assert machine(primary).check_output("psql -XAtc %s", query) == "streaming|t"
    assert is_standby(machine(standby))


def is_standby(host) -> bool:
    with host.sudo("postgres"):
        return host.check_output("psql -XAtc 'select pg_is_in_recovery()'") == "t"


def test_local_proxies_lead_to_the_primary(machine, secrets):
    for name in ("airflow1", "airflow2"):
        host = machine(name)
        script = (
            "import os,sys,psycopg2;"
            "c=psycopg2.connect(host='127.0.0.1',port=15432,dbname='airflow',user='airflow',"
            "password=sys.stdin.readline().strip(),sslmode='verify-full',sslrootcert='/etc/airflow-ha/tls/ca.crt');"
            "k=c.cursor();k.execute('select pg_is_in_recovery()');print(k.fetchone()[0])"
        )
        password = secrets["secret_postgresql_airflow_password"]
        assert host.check_output(f"echo {password} | /opt/airflow/current/bin/python -c %s", script) == "False"


def test_redis_replicates(machine, secrets):
    command = (
        f"printf 'AUTH monitor {secrets['secret_redis_monitor_password']}\\nINFO replication\\n'"
        " | redis-cli --tls --cacert /etc/airflow-ha/tls/ca.crt -h $(hostname) -p 6379"
    )
    answers = [machine(name).check_output(command) for name in ("data1", "data2")]
    assert sum("role:master" in answer for answer in answers) == 1
    assert sum("master_link_status:up" in answer for answer in answers) == 1


def test_workers_hold_no_key_to_the_metadata(machine, secrets):
    forbidden = [
        secrets[f"secret_{name}"]
        for name in (
            "postgresql_airflow_password",
            "airflow_fernet_key",
            "airflow_jwt_secret",
            "postgresql_replication_password",
        )
    ]
    for name in ("worker1", "worker2"):
        for secret in forbidden:
            found = machine(name).run("grep -rlF -- %s /etc /opt/airflow/dags /var/lib/airflow /run", secret)
            assert found.stdout == "", name


def test_no_secret_is_on_a_command_line_or_in_the_journal(host, secrets):
    processes = host.check_output("ps axww -o args")
    journal_text = host.check_output("journalctl --no-pager --quiet")
    for name, secret in secrets.items():
        assert secret not in processes, name
        assert secret not in journal_text, name


def test_secret_files_are_not_for_everyone(host, secrets):
    # One pass for all secrets, the patterns on standard input.
    patterns = "\n".join(secrets.values())
    found = host.run("printf '%%s\n' %s | grep -rlFf - /etc /opt/airflow/dags /var/lib/airflow 2>/dev/null", patterns)
    for path in found.stdout.split():
        assert host.file(path).mode & 0o137 == 0, (path, oct(host.file(path).mode))


def test_vip_moves_when_its_balancer_stops(machine, http):
    holder, other = sorted(
        ("lb1", "lb2"), key=lambda name: f" {VIP}/" not in machine(name).check_output("ip -4 address")
    )
    machine(holder).check_output("systemctl stop haproxy")
    try:
        deadline = time.monotonic() + 15
        while f" {VIP}/" not in machine(other).check_output("ip -4 address"):
            assert time.monotonic() < deadline, "the VIP did not move"
            time.sleep(0.5)
        assert http.get(f"https://{VIP}/api/v2/version", timeout=10).status_code == 200
    finally:
        machine(holder).check_output("systemctl start haproxy")


def test_either_server_alone_serves_users(machine, http):
    for name in ("airflow1", "airflow2"):
        machine(name).check_output("systemctl stop airflow-api-server")
        try:
            time.sleep(5)
            for _ in range(5):
                assert http.get(f"https://{VIP}/api/v2/version", timeout=10).status_code == 200
        finally:
            machine(name).check_output("systemctl start airflow-api-server")
            wait_for_api(http, f"{SUBNET}.{21 if name == 'airflow1' else 22}:8080")


def wait_for_api(http, address: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if http.get(f"https://{address}/api/v2/version", timeout=5).ok:
                return
        except requests.ConnectionError:
            pass
        time.sleep(1)
    pytest.fail(f"{address} does not come back")
