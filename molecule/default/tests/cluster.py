"""A cluster under test: where it is, its REST API, and a run of the sample pipeline on it."""

from __future__ import annotations

import datetime
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import requests
from testinfra.host import Host

PROJECT = Path(__file__).resolve().parents[3]
LAB_NAME = os.environ.get("LAB_NAME", "test")
LAB = PROJECT / ".lab" / LAB_NAME
SUBNET = {"lab": "10.77.1", "test": "10.77.2"}.get(LAB_NAME, "10.77.2")
VIP = f"{SUBNET}.100"
CA = LAB / "pki" / "ca.crt"

DAG = "xetra_daily_average"
RUN_TIMEOUT_S = 240

# One module or more behind each thing that the lock has to start.
COMPONENTS = [
    "airflow.api_fastapi.main",
    "airflow.cli.cli_parser",
    "airflow.dag_processing.manager",
    "airflow.jobs.scheduler_job_runner",
    "airflow.jobs.triggerer_job_runner",
    "airflow.providers.amazon.aws.hooks.s3",
    "airflow.providers.apache.spark.operators.spark_submit",
    "airflow.providers.celery.executors.celery_executor",
    "airflow.providers.fab.auth_manager.fab_auth_manager",
    "airflow.providers.hashicorp.secrets.vault",
    "airflow.providers.postgres.hooks.postgres",
    "flower.command",
    "psycopg",
    "psycopg2",
    "redis",
]


class Api:
    """Airflow's REST API behind one address; logs in as the administrator."""

    def __init__(self, address: str, password: str, authority: Path = CA) -> None:
        """address: host or host:port. Raises requests.HTTPError when the login is refused."""
        self.url = f"https://{address}"
        self.session = requests.Session()
        # Or REQUESTS_CA_BUNDLE of the environment would win over the generated authority.
        self.session.trust_env = False
        self.session.verify = str(authority)
        login = self.session.post(
            f"{self.url}/auth/token", json={"username": "admin", "password": password}, timeout=10
        )
        login.raise_for_status()
        self.session.headers["Authorization"] = f"Bearer {login.json()['access_token']}"

    def call(self, method: str, path: str, **arguments: Any) -> Any:
        """The decoded answer of /api/v2<path>. Raises requests.HTTPError."""
        answer = self.session.request(method, f"{self.url}/api/v2{path}", timeout=20, **arguments)
        answer.raise_for_status()
        return answer.json()

    def run_pipeline(self, day: str) -> list[dict[str, Any]]:
        """Run the sample DAG for the day (YYYY-MM-DD), wait for its success and return its task instances."""
        deadline = time.monotonic() + 60
        while DAG not in [dag["dag_id"] for dag in self.call("GET", "/dags")["dags"]]:
            assert time.monotonic() < deadline, "the DAG does not appear"
            time.sleep(2)
        self.call("PATCH", f"/dags/{DAG}", json={"is_paused": False})
        moment = datetime.datetime.now(datetime.UTC).strftime("%H:%M:%S.%f")
        run = self.call("POST", f"/dags/{DAG}/dagRuns", json={"logical_date": f"{day}T{moment}Z"})["dag_run_id"]
        deadline = time.monotonic() + RUN_TIMEOUT_S
        state = "queued"
        while state not in ("success", "failed") and time.monotonic() < deadline:
            time.sleep(2)
            state = self.call("GET", f"/dags/{DAG}/dagRuns/{run}")["state"]
        tasks: list[dict[str, Any]] = self.call("GET", f"/dags/{DAG}/dagRuns/{run}/taskInstances")["task_instances"]
        shown = [(task["task_id"], task["map_index"], task["state"], task["hostname"]) for task in tasks]
        assert state == "success", shown
        return tasks


def make_input(day: str, lab: Path = LAB) -> str:
    """Write a day that depends on chance into the lab's landing zone; return the right averages as CSV."""
    expected = lab / f"expected-{day}.csv"
    subprocess.run(
        [
            sys.executable,
            str(PROJECT / "files/sample/xetra_generator.py"),
            f"--date={day}",
            f"--seed={random.getrandbits(32)}",
            f"--output={lab / 'landing/xetra'}",
            f"--expected={expected}",
            "--other-market",
        ],
        check=True,
        capture_output=True,
    )
    return expected.read_text()


def table(host: Host, day: str) -> str:
    """The day's rows as CSV, from the database of one data node."""
    query = (
        "copy (select trading_date, ticker, round(avg_price, 10) as avg_price"
        f" from avg_xetra where trading_date = '{day}'"
        ' order by ticker collate "C") to stdout with csv header'
    )
    with host.sudo("postgres"):
        return str(host.check_output("psql -X pipelines -c %s", query)) + "\n"


def import_components(host: Host) -> str:
    """Import everything in COMPONENTS with the node's Python; returns the error, empty when there is none."""
    script = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    done = host.run(f"sudo -u airflow /opt/airflow/current/bin/python -c '{script}' {' '.join(COMPONENTS)} 2>&1")
    return "" if done.rc == 0 else str(done.stdout)
