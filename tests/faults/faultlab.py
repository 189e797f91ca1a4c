"""A cluster to hurt: load on it, ways to break it and to bring it back. Of the lab that LAB_NAME names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import testinfra
import yaml
from cluster import LAB, LAB_NAME, PROJECT, SUBNET, VIP, Api
from testinfra.host import Host

FAULTS = Path(__file__).resolve().parent
INVENTORY = PROJECT / "inventories/lab/hosts.yml"
MACHINES = PROJECT / "playbooks/lab/machines.py"
ADDRESSES = {"data1": f"{SUBNET}.31", "data2": f"{SUBNET}.32"}
Play = Callable[..., "subprocess.CompletedProcess[str]"]


def reach(name: str) -> Host:
    """Testinfra's host, as root."""
    return testinfra.get_host(f"ssh://{name}?sudo=true&controlpersist=60", ssh_config=str(LAB / "ssh" / "config"))


def playbook(name: str, *arguments: str) -> list[str]:
    """The command line of one of the project's playbooks."""
    file = name if "/" in name or name == "site" else f"playbooks/{name}"
    return ["ansible-playbook", "-i", str(INVENTORY), f"{file}.yml", *arguments]


def _ansible(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LAB_NAME": LAB_NAME}
    return subprocess.run(
        command, cwd=PROJECT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def run(name: str, *arguments: str, fails: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a playbook to its end and insist on how it ends."""
    done = _ansible(playbook(name, *arguments))
    assert (done.returncode != 0) == fails, f"{name} {arguments}:\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return done


def failover(service: str, *variables: str, fails: bool = False) -> str:
    """Run failover.yml; return what it printed."""
    return run("failover", *(f"-e{item}" for item in (f"service={service}", *variables)), fails=fails).stdout


def status() -> dict[str, Any]:
    """What status.yml says, healthy or not."""
    file = LAB / "status.json"
    _ansible(playbook("status", f"-efile={file}"))
    return dict(json.loads(file.read_text()))


def primary(service: str = "postgresql") -> str:
    """The one primary."""
    ask = f'echo \'{{"run": "test", "by": "test"}}\' | python3 /usr/local/lib/airflow-ha/failover {service} state'
    answers = {host: reach(host).run(ask) for host in ADDRESSES}
    roles = {host: json.loads(answer.stdout)["role"] for host, answer in answers.items() if answer.rc == 0}
    (found,) = [host for host, role in roles.items() if role == "primary"]
    return found


def other(host: str) -> str:
    """The other data node."""
    return {"data1": "data2", "data2": "data1"}[host]


def eventually(question: Callable[[], Any], seconds: float = 60) -> Any:
    """The question's answer as soon as it is true; fails when that takes too long."""
    deadline = time.monotonic() + seconds
    while not (answer := question()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(1)
    return answer


def healthy(seconds: float = 90) -> None:
    """Wait until status.yml has nothing to complain of."""
    problems: list[str] = []

    def well() -> bool:
        problems[:] = status()["problems"]
        return not problems

    try:
        eventually(well, seconds)
    except AssertionError:
        pytest.fail(f"not healthy: {problems}")


def kill(*names: str) -> None:
    """Take the power from machines."""
    containers = [f"{LAB_NAME}-{name}" for name in names]
    subprocess.run([sys.executable, str(MACHINES), "podman", "kill", *containers], check=True, capture_output=True)


def power_on() -> None:
    """Start every machine that is off."""
    run("lab/create")


class Load:
    """A write load that runs on an Airflow server beside the test."""

    def __init__(self, service: str, seconds: int, on: str = "airflow2") -> None:
        """seconds: how long it writes."""
        command = f"sudo /opt/airflow/current/bin/python - {service} {seconds}"
        ssh = ["ssh", "-F", str(LAB / "ssh" / "config"), on, command]
        with (FAULTS / "load.py").open() as script:
            self._process = subprocess.Popen(ssh, stdin=script, stdout=subprocess.PIPE, text=True)
        time.sleep(2)

    def result(self, *, loss_allowed: bool = False) -> dict[str, Any]:
        """Wait for its end; fails when it lost anything that was acknowledged, unless that is allowed."""
        output, _ = self._process.communicate(timeout=180)
        found: dict[str, Any] = json.loads(output)
        assert loss_allowed or found["lost"] == [], found
        assert found["acknowledged"] > 100, found
        return found


class Tasks:
    """A run of the DAG fault_counter."""

    def __init__(self, client: Api, count: int, seconds: float) -> None:
        """Trigger it: `count` tasks of `seconds` each, more than there are slots for."""
        self._client = client
        path = "/dags/fault_counter/dagRuns"
        body = {"logical_date": None, "conf": {"count": count, "seconds": seconds}}
        self.run_id = client.call("POST", path, json=body)["dag_run_id"]
        self._path, self._count = f"{path}/{self.run_id}", count

    def states(self) -> list[str]:
        """States of the counting tasks."""
        answer = self._client.call("GET", f"{self._path}/taskInstances", params={"limit": 100})
        return [item["state"] for item in answer["task_instances"] if item["task_id"] == "count"]

    def running(self) -> None:
        """Wait until some run and some are queued."""
        eventually(lambda: "running" in self.states(), 60)

    def succeed(self, seconds: float = 150) -> None:
        """Wait for the success of all; each has left its row exactly once."""

        def state() -> str:
            try:
                return str(self._client.call("GET", self._path)["state"])
            except OSError:  # the API is behind the failover too
                return "unknown"

        eventually(lambda: state() in ("success", "failed"), seconds)
        assert state() == "success", self.states()
        query = f"select number, count(*) from fault_rows where run_id = '{self.run_id}' group by 1 order by 1"
        rows = sql(primary(), query, "pipelines").splitlines()
        assert rows == [f"{number}|1" for number in range(self._count)]


def sql(host: str, statement: str, database: str = "postgres") -> str:
    """The answer of that host's PostgreSQL to its superuser."""
    return str(reach(host).check_output("runuser -u postgres -- psql -XAtqd %s -c %s", database, statement)).strip()


def deliver_dag() -> None:
    """Deliver the DAG fault_counter, as users deliver theirs."""
    folders = [
        {"source": str(PROJECT / "files/dags"), "target": ""},
        {"source": str(PROJECT / "files/spark"), "target": "spark"},
        {"source": str(FAULTS / "dags"), "target": "faults"},
    ]
    run("site", "--tags=dags", f"-e{json.dumps({'dags_folders': folders})}")


def login() -> Api:
    """Airflow's API behind the VIP, with the DAG fault_counter ready to run."""
    file = PROJECT / "inventories/lab/group_vars/all/secrets.yml"
    password = PROJECT / "inventories/lab/.vault-password"
    command = ["ansible-vault", "view", "--vault-password-file", str(password), str(file)]
    secrets = yaml.safe_load(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found = Api(VIP, secrets["secret_airflow_admin_password"])
    eventually(lambda: "fault_counter" in [item["dag_id"] for item in found.call("GET", "/dags")["dags"]])
    found.call("PATCH", "/dags/fault_counter", json={"is_paused": False})
    return found
