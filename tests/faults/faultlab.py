"""A cluster to hurt: load on it, ways to break it and to bring it back. Of the lab that LAB_NAME names."""

from __future__ import annotations

import functools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
# A load ends by itself after this; no test takes so long.
LOAD_MAX_S = 170
# Two workers with airflow_worker_concurrency of the lab.
SLOTS = 8


@functools.cache
def reach(name: str) -> Host:
    """Testinfra's host, as root."""
    return testinfra.get_host(f"ssh://{name}?sudo=true&controlpersist=60", ssh_config=str(LAB / "ssh" / "config"))


def playbook(name: str, *arguments: str) -> list[str]:
    """The command line of one of the project's playbooks."""
    file = name if "/" in name or name == "site" else f"playbooks/{name}"
    return ["ansible-playbook", "-i", str(INVENTORY), f"{file}.yml", *arguments]


def environment() -> dict[str, str]:
    """What playbooks need to find this lab, whoever started the tests."""
    config = str(PROJECT / "ansible.cfg")
    return {**os.environ, "LAB_NAME": LAB_NAME, "ANSIBLE_CONFIG": config, "ANSIBLE_FORCE_COLOR": "0"}


def _ansible(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=PROJECT, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
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


def member(host: str, service: str) -> dict[str, Any]:
    """What that member says of itself; its role is "off" when its machine gives no answer."""
    ask = f'echo \'{{"run": "test", "by": "test"}}\' | python3 /usr/local/lib/airflow-ha/failover {service} state'
    try:
        answer = reach(host).run(ask)
    except RuntimeError:  # Testinfra's word for an ssh that failed
        return {"role": "off"}
    return dict(json.loads(answer.stdout)) if answer.rc == 0 else {"role": "unknown"}


def role(host: str, service: str = "postgresql") -> str:
    """primary, standby, stopped, unknown, none or off."""
    return str(member(host, service)["role"])


def lock_of(host: str) -> dict[str, Any]:
    """Which failover is at work there."""
    return dict(member(host, "postgresql").get("lock") or {})


def primary(service: str = "postgresql") -> str:
    """The one primary."""
    with ThreadPoolExecutor() as pool:
        roles = dict(zip(ADDRESSES, pool.map(lambda host: role(host, service), ADDRESSES), strict=True))
    found = [host for host in roles if roles[host] == "primary"]
    assert len(found) == 1, roles
    return found[0]


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


def podman(*arguments: str) -> str:
    """Podman on the lab's own storage; needs root, as the lab does."""
    root = [] if os.geteuid() == 0 else ["sudo"]
    command = [*root, sys.executable, str(MACHINES), "podman", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def inside(name: str, *command: str) -> str:
    """What a command says on a machine whose network may be gone."""
    return podman("exec", f"{LAB_NAME}-{name}", *command)


def kill(*names: str) -> None:
    """Take the power from machines."""
    podman("kill", *(f"{LAB_NAME}-{name}" for name in names))


def power_on() -> None:
    """Start every machine that is off."""
    run("playbooks/lab/create")


class Load:
    """A write load that runs on an Airflow server beside the test, until its result is asked for."""

    def __init__(self, service: str, on: str = "airflow2") -> None:
        """service: postgresql or redis; on: the server whose local proxy it goes through."""
        script = shlex.quote((FAULTS / "load.py").read_text())
        command = f"sudo /opt/airflow/current/bin/python -c {script} {service} {LOAD_MAX_S}"
        ssh = ["ssh", "-F", str(LAB / "ssh" / "config"), on, command]
        self._process = subprocess.Popen(ssh, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        assert self._process.stdout.readline() == "begins\n"
        time.sleep(1)

    def result(self, *, loss_allowed: bool = False) -> dict[str, Any]:
        """Stop it; fails when it lost anything that was acknowledged, unless that is allowed."""
        output, _ = self._process.communicate(timeout=180)  # which closes its standard input
        found: dict[str, Any] = json.loads(output)
        assert loss_allowed or found["lost"] == [], found
        assert found["acknowledged"] > 50, found
        return found


class Tasks:
    """A run of the DAG fault_counter."""

    def __init__(self, client: Api, count: int, seconds: float) -> None:
        """Trigger it: `count` tasks of `seconds` each, of which SLOTS run at the same time."""
        self._client = client
        path = "/dags/fault_counter/dagRuns"
        body = {"logical_date": None, "conf": {"count": count, "seconds": seconds}}
        self.run_id = client.call("POST", path, json=body)["dag_run_id"]
        self._path, self._count = f"{path}/{self.run_id}", count

    def instances(self) -> dict[int, dict[str, Any]]:
        """Number to what the API says of the counting task with this number."""
        answer = self._client.call("GET", f"{self._path}/taskInstances", params={"limit": 100})
        return {item["map_index"]: item for item in answer["task_instances"] if item["task_id"] == "count"}

    def numbers(self, state: str) -> set[int]:
        """Those of the counting tasks that are in this state."""
        return {number for number, item in self.instances().items() if item["state"] == state}

    def running(self) -> None:
        """Wait until some run, and some are queued where there are more than slots."""
        eventually(lambda: self.numbers("running") and (self._count <= SLOTS or self.numbers("queued")), 60)

    def end(self, seconds: float = 150) -> str:
        """Wait for the run's end; returns its state."""

        def state() -> str:
            try:
                return str(self._client.call("GET", self._path)["state"])
            except OSError:  # the API is behind the failover too
                return "unknown"

        return str(eventually(lambda: found if (found := state()) in ("success", "failed") else "", seconds))

    def rows(self) -> dict[int, int]:
        """Number to how many rows it left."""
        query = f"select number, count(*) from fault_rows where run_id = '{self.run_id}' group by 1 order by 1"
        lines = sql(primary(), query, "pipelines").splitlines()
        return {int(number): int(count) for number, _, count in (line.partition("|") for line in lines)}

    def outcome(self) -> dict[str, set[int]]:
        """After the end: which left no row (`lost`), more than one (`doubled`), or needed another try (`repeated`)."""
        rows, instances = self.rows(), self.instances()
        return {
            "lost": {number for number in range(self._count) if number not in rows},
            "doubled": {number for number, count in rows.items() if count > 1},
            "repeated": {
                number for number, item in instances.items() if item["try_number"] > 1 or item["state"] != "success"
            },
        }

    def succeed(self, seconds: float = 150) -> None:
        """Wait for the success of all; each has left its row exactly once."""
        assert self.end(seconds) == "success", self.instances()
        found = self.outcome()
        assert (found["lost"], found["doubled"]) == (set(), set()), found


def sql(host: str, statement: str, database: str = "postgres") -> str:
    """The answer of that host's PostgreSQL to its superuser."""
    return str(reach(host).check_output("runuser -u postgres -- psql -XAtqd %s -c %s", database, statement)).strip()


def dags_folders() -> str:
    """The argument that adds the DAG fault_counter to what site.yml delivers."""
    folders = [
        {"source": str(PROJECT / "files/dags"), "target": ""},
        {"source": str(PROJECT / "files/spark"), "target": "spark"},
        {"source": str(FAULTS / "dags"), "target": "faults"},
    ]
    return f"-e{json.dumps({'dags_folders': folders})}"


def deliver_dag() -> None:
    """Deliver the DAG fault_counter, as users deliver theirs."""
    run("site", "--tags=dags", dags_folders())


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
