"""A server with everything on it, and a worker that knows as little as possible."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
from scenario import CA, SUBNET
from testinfra.host import Host

API = f"https://{SUBNET}.40:8080"
FLOWER = f"https://{SUBNET}.40:5555/flower"
UNITS = ("scheduler", "dag-processor", "triggerer", "flower", "api-server")
DAG_ID = "molecule_probe"
DAG = f'''
import os
import time

from airflow.sdk import Connection, dag, get_current_context, task


@dag(dag_id="{DAG_ID}", schedule=None, is_paused_upon_creation=False, params={{"sleep": 0}})
def probe():
    @task
    def where():
        print("molecule", "was", "here")
        time.sleep(get_current_context()["params"]["sleep"])
        return {{
            "connection": Connection.get("molecule").password,
            "path": os.environ["PATH"],
            "environment": sorted(os.environ),
        }}

    where()


probe()
'''


def digest(name: str) -> str:
    """A secret as inventory.yml makes it."""
    return hashlib.sha256(f"molecule {name}".encode()).hexdigest()


# What a worker must not know, and what it must.
SERVER_SECRETS = {
    "database": digest("postgresql airflow"),
    "JWT": digest("jwt"),
    "fernet": base64.b64encode(digest("fernet")[:32].encode()).decode(),
    "administrator": digest("admin"),
    "Flower": digest("flower"),
    "connection": digest("connection"),
}
WORKER_SECRETS = {"API": digest("api"), "broker": digest("redis airflow")}


def until(what: str, probe: Callable[[], Any], timeout: float = 120) -> Any:
    """The probe's first true answer; fails when there is none within the timeout (seconds)."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if answer := probe():
            return answer
        time.sleep(1)
    raise AssertionError(f"{what}: not within {timeout:.0f} s")


@pytest.fixture(scope="module")
def server(machine: Callable[[str], Host]) -> Host:
    return machine("airflow1")


@pytest.fixture(scope="module")
def worker(machine: Callable[[str], Host]) -> Host:
    return machine("airflow2")


@pytest.fixture(autouse=True)
def journal_on_failure(server: Host, request: pytest.FixtureRequest) -> Iterator[None]:
    """Print what the services said when a test fails."""
    before = request.session.testsfailed
    yield
    if request.session.testsfailed > before:
        print(server.run("journalctl -u 'airflow-*' -n 60 --no-pager").stdout)


@pytest.fixture(scope="module")
def api() -> Iterator[requests.Session]:
    """A session that verifies the certificate and is logged in as the administrator."""
    with requests.Session() as session:
        # Set on the session, an environment's REQUESTS_CA_BUNDLE would win.
        session.trust_env = False
        session.verify = str(CA)
        login = session.post(
            f"{API}/auth/token", json={"username": "admin", "password": SERVER_SECRETS["administrator"]}, timeout=20
        )
        login.raise_for_status()
        session.headers["Authorization"] = f"Bearer {login.json()['access_token']}"
        yield session


def healthy(session: requests.Session) -> bool:
    """Whether all components of the server report that they are well."""
    answer = session.get(f"{API}/api/v2/monitor/health", timeout=10).json()
    return all(
        answer[part]["status"] == "healthy" for part in ("metadatabase", "scheduler", "triggerer", "dag_processor")
    )


def test_services_run_and_will_run_after_a_reboot(server: Host, worker: Host) -> None:
    for host, units in ((server, UNITS), (worker, ("worker",))):
        for unit in units:
            assert host.service(f"airflow-{unit}").is_running, unit
            assert host.service(f"airflow-{unit}").is_enabled, unit
    assert not worker.file("/etc/systemd/system/airflow-scheduler.service").exists
    assert not server.file("/etc/systemd/system/airflow-worker.service").exists


def test_all_components_are_healthy_over_verified_tls(api: requests.Session) -> None:
    until("health", lambda: healthy(api))
    with pytest.raises(requests.exceptions.SSLError):
        requests.get(f"{API}/api/v2/version", timeout=10, verify=True)


def test_wrong_password_is_refused(server: Host) -> None:
    answer = requests.post(
        f"{API}/auth/token", json={"username": "admin", "password": "wrong"}, timeout=20, verify=str(CA)
    )
    assert answer.status_code == 401
    assert requests.get(f"{API}/api/v2/dags", timeout=20, verify=str(CA)).status_code == 401


def test_flower_wants_a_password_over_verified_tls() -> None:
    good = ("admin", SERVER_SECRETS["Flower"])
    workers = f"{FLOWER}/api/workers?refresh=true"
    assert requests.get(workers, timeout=20, verify=str(CA)).status_code == 401
    assert requests.get(workers, timeout=20, verify=str(CA), auth=("admin", "wrong")).status_code == 401
    assert "celery@airflow2" in requests.get(workers, timeout=20, verify=str(CA), auth=good).json()


@pytest.fixture(scope="module")
def dag(server: Host, worker: Host, api: requests.Session) -> str:
    """The URL of a DAG that was delivered to both machines and seen."""
    for host in (server, worker):
        host.check_output(
            "install -d /opt/airflow/dags && printf %s "
            f"{base64.b64encode(DAG.encode()).decode()} | base64 -d > /opt/airflow/dags/probe.py"
        )
    url = f"{API}/api/v2/dags/{DAG_ID}"
    until("the DAG", lambda: api.get(url, timeout=20).status_code == 200)
    return url


def start(api: requests.Session, dag: str, sleep: int) -> str:
    """Start a run and return its URL."""
    started = api.post(f"{dag}/dagRuns", json={"logical_date": None, "conf": {"sleep": sleep}}, timeout=20)
    assert started.status_code == 200, started.text
    return f"{dag}/dagRuns/{started.json()['dag_run_id']}"


def end(api: requests.Session, run: str) -> str:
    """Wait for the end of a run and return its state."""

    def state() -> str:
        now: str = api.get(run, timeout=20).json()["state"]
        return now if now in ("success", "failed") else ""

    return str(until("the run's end", state))


def test_a_task_runs_on_the_worker_and_its_log_is_read_from_there(api: requests.Session, dag: str) -> None:
    run = start(api, dag, sleep=0)
    state = end(api, run)
    log = api.get(f"{run}/taskInstances/where/logs/1", timeout=20).text
    assert state == "success", log
    assert "molecule was here" in log
    assert api.get(f"{run}/taskInstances/where", timeout=20).json()["hostname"] == "airflow2"
    value = api.get(f"{run}/taskInstances/where/xcomEntries/return_value", timeout=20).json()["value"]
    told = value if isinstance(value, dict) else json.loads(value)
    # A connection that only the server's environment knows: a task gets it through the API.
    assert told["connection"] == SERVER_SECRETS["connection"]
    assert told["path"].startswith("/opt/airflow/current/bin:/opt/spark/bin:")
    assert not [name for name in told["environment"] if name.startswith("AIRFLOW_CONN_")]


def test_stopping_a_worker_lets_its_task_end(worker: Host, api: requests.Session, dag: str) -> None:
    run = start(api, dag, sleep=15)
    task = f"{run}/taskInstances/where"
    until("the task's start", lambda: api.get(task, timeout=20).json()["state"] == "running")
    worker.check_output("systemctl restart airflow-worker")
    assert end(api, run) == "success"
    assert api.get(task, timeout=20).json()["try_number"] == 1
    assert worker.service("airflow-worker").is_running


def test_command_line_runs_as_the_services_do(server: Host) -> None:
    shown = server.run("airflow config get-value core executor")
    assert shown.stdout.splitlines()[-1] == "CeleryExecutor", shown.stderr
    assert server.run("runuser -u airflow -- airflow version").rc == 0
    refused = server.run("runuser -u nobody -- airflow version")
    assert refused.rc == 1
    assert "as root or airflow" in refused.stderr


def test_configuration_names_only_options_that_exist(server: Host) -> None:
    script = """
import configparser
from airflow.configuration import conf
from airflow.providers_manager import ProvidersManager

ProvidersManager().initialize_providers_configuration()
given = configparser.ConfigParser(interpolation=None)
given.read("/etc/airflow/airflow.cfg")
known = conf.configuration_description
print("unknown:", *[f"{s}.{o}" for s in given.sections() for o in given[s] if o not in known[s]["options"]])
"""
    run = f"set -a; . /etc/airflow/airflow.env; exec /opt/airflow/current/bin/python -c {shlex.quote(script)}"
    assert server.check_output(f"runuser -u airflow -- sh -c {shlex.quote(run)}").splitlines()[-1] == "unknown:"


def test_modes_of_files(server: Host, worker: Host) -> None:
    for host in (server, worker):
        for path, mode in {
            "/etc/airflow": 0o750,
            "/etc/airflow/airflow.cfg": 0o640,
            "/etc/airflow/airflow.env": 0o640,
            "/var/log/airflow": 0o2750,
            "/var/lib/airflow": 0o750,
        }.items():
            assert host.file(path).mode == mode, path
            assert host.file(path).group == "airflow", path
        assert host.file("/etc/airflow/airflow.env").user == "root"
        assert host.file("/etc").user == host.file("/usr").user == host.file("/opt").user == "root"
        assert host.run("runuser -u nobody -- cat /etc/airflow/airflow.env").rc != 0
    assert server.file("/var/lib/airflow/.bootstrap.json").mode == 0o600


def test_worker_knows_nothing_that_opens_the_cluster(worker: Host, server: Host) -> None:
    pattern = "|".join(SERVER_SECRETS.values())
    folders = "/etc /var/lib/airflow /var/log /opt/airflow/lib /usr/local /root /home /tmp /var/tmp"
    # grep: 1 is "found nothing", 2 is trouble. The journal, in which sudo notes this very command, has its own test.
    found = worker.run(f"grep -rlE {shlex.quote(pattern)} --exclude-dir=journal {folders}")
    assert (found.rc, found.stdout) == (1, ""), found.stderr
    environment = worker.file("/etc/airflow/airflow.env").content_string
    assert not [name for name in ("SQL_ALCHEMY", "FERNET", "JWT", "FLOWER", "CONN_") if name in environment]
    assert not [name for name, value in WORKER_SECRETS.items() if value not in environment]
    # The same search on a server finds what it looks for.
    assert "/etc/airflow/airflow.env" in server.run(f"grep -rlE {shlex.quote(pattern)} /etc").stdout


def test_secrets_are_neither_in_command_lines_nor_in_the_journal(server: Host, worker: Host) -> None:
    pattern = shlex.quote("|".join((SERVER_SECRETS | WORKER_SECRETS).values()))
    for host in (server, worker):
        assert host.run(f"ps -eww -o args | grep -v grep | grep -E {pattern}").stdout == ""
        # sudo notes these very commands.
        assert host.run(rf"journalctl --no-pager | grep -v ' sudo\[' | grep -E {pattern}").stdout == ""
        assert host.run(f"grep -rlE {pattern} /var/log --exclude-dir=journal").stdout == ""


def test_listens_where_it_should(server: Host, worker: Host) -> None:
    # API, scheduler's health, triggerer's logs, Flower; a worker's logs.
    for host, expected in ((server, {8080, 8974, 8794, 5555}), (worker, {8793})):
        pids = host.check_output("pgrep -u airflow").split()
        sockets = host.check_output("ss -Htlnp").splitlines()
        ours = [line for line in sockets if any(f"pid={pid}," in line for pid in pids)]
        assert {int(line.split()[3].rsplit(":", 1)[1]) for line in ours} == expected


def test_the_broker_is_reached_over_verified_tls_only(worker: Host) -> None:
    script = """
from airflow.providers.celery.executors.celery_executor_utils import app

for name, client in (("broker", app.connection().channel().client), ("result", app.backend.client)):
    connection = client.connection_pool.make_connection()
    print(name, connection.cert_reqs.name, connection.check_hostname, connection.ca_certs, client.ping())
"""
    run = f"set -a; . /etc/airflow/airflow.env; exec /opt/airflow/current/bin/python -c {shlex.quote(script)}"
    lines = worker.check_output(f"runuser -u airflow -- sh -c {shlex.quote(run)}").splitlines()
    for name in ("broker", "result"):
        assert f"{name} CERT_REQUIRED True /etc/airflow-ha/tls/ca.crt True" in lines


def test_everything_comes_back_after_an_outage_of_the_database(server: Host, api: requests.Session) -> None:
    restarts = "systemctl show -p NRestarts --value airflow-scheduler"
    before = int(server.check_output(restarts))
    database = server.check_output("systemctl list-units --plain --no-legend 'postgresql@*.service'").split()[0]
    server.check_output(f"systemctl stop {database}")
    try:
        until("the scheduler's exit", lambda: int(server.check_output(restarts)) > before)
    finally:
        server.check_output(f"systemctl start {database}")
    until("health", lambda: healthy(api))
    for unit in UNITS:
        assert server.service(f"airflow-{unit}").is_running, unit


def test_second_bootstrap_is_quick_and_changes_nothing(server: Host) -> None:
    spec = {
        "environment_file": "/etc/airflow/airflow.env",
        "user": "admin",
        "email": "admin@example.com",
        "password": SERVER_SECRETS["administrator"],
    }
    command = (
        "runuser -u airflow -- /opt/airflow/current/bin/python /opt/airflow/lib/airflow_node.py bootstrap"
        f" <<< {shlex.quote(json.dumps(spec))}"
    )
    start = time.monotonic()
    assert server.check_output(f"bash -c {shlex.quote(command)}") == "unchanged"
    assert time.monotonic() - start < 3
