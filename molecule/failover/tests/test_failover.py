"""The playbooks on two data nodes alone; under load, with everything around them, they run in tests/faults."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

PROJECT = Path(__file__).resolve().parents[3]
INVENTORIES = [PROJECT / "molecule/shared/inventory/hosts.yml", PROJECT / "molecule/failover/inventory.yml"]
SERVICES = ["postgresql", "redis"]
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
    (found,) = [n for n in ("failover1", "failover2") if state(machine(n), service)["role"] == "primary"]
    return found


def other(name: str) -> str:
    """The other member."""
    return {"failover1": "failover2", "failover2": "failover1"}[name]


@pytest.mark.parametrize("service", SERVICES)
def test_switchover(service: str, machine: Machine) -> None:
    before = primary(machine, service)
    assert "planned switchover" in play("failover", f"service={service}", "dry_run=true")
    assert primary(machine, service) == before
    play("failover", f"service={service}")
    assert primary(machine, service) == other(before)
    assert state(machine(before), service)["receiver"]["status"] == "streaming"
    assert "All is well." in play("status")


@pytest.mark.parametrize("service", SERVICES)
def test_a_fenced_primary_stays_down_until_it_rejoins(service: str, machine: Machine) -> None:
    before = primary(machine, service)
    assert "is a live primary" in play("failover", f"service={service}", "force=true", fails=True)
    play("failover", f"service={service}", "force=true", f"confirm={before}")
    assert primary(machine, service) == other(before)
    assert state(machine(before), service)["masked"]
    assert f"{before}: " in play("status", fails=True)
    play("rejoin", f"service={service}", f"host={before}")
    assert not state(machine(before), service)["masked"]
    assert "All is well." in play("status")


@pytest.mark.parametrize("service", SERVICES)
def test_a_former_primary_that_starts_finds_the_new_one(service: str, machine: Machine) -> None:
    before = primary(machine, service)
    unit = {"postgresql": "postgresql@17-main", "redis": "redis-server"}[service]
    machine(before).check_output(f"systemctl stop {unit}")
    play("failover", f"service={service}", "force=true")
    # As after a boot of a machine that could not be fenced.
    marker = "rm -f /var/lib/postgresql/17/main/standby.signal; " if service == "postgresql" else ""
    machine(before).check_output(f"{marker}systemctl unmask {unit}; systemctl start {unit}")
    assert state(machine(before), service)["role"] == "standby"
    assert primary(machine, service) == other(before)
    play("rejoin", f"service={service}", f"host={before}")


def test_what_a_broken_off_switchover_left_is_finished(machine: Machine) -> None:
    before = primary(machine, "postgresql")
    machine(before).check_output(
        "runuser -u postgres -- touch /var/lib/postgresql/17/main/standby.signal; systemctl stop postgresql@17-main"
    )
    assert "broke off" in play("failover", "service=postgresql")
    assert "All is well." in play("status")
    primary(machine, "postgresql")


def test_every_step_is_in_the_journal(machine: Machine) -> None:
    lines = machine("failover1").check_output("cat /var/lib/airflow-ha/failover.jsonl").splitlines()
    assert {json.loads(line)["service"] for line in lines} == set(SERVICES)
    assert machine("failover1").file("/var/lib/airflow-ha/failover.jsonl").mode == 0o640


def test_settings_are_for_root_alone(machine: Machine) -> None:
    for service in SERVICES:
        file = machine("failover1").file(f"/etc/airflow-ha/failover/{service}.json")
        assert (file.user, file.mode) == ("root", 0o600)
