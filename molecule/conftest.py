"""How Testinfra reaches the machines of a scenario: by SSH, as every user does, through the lab's own client config.

MOLECULE_SCENARIO_DIRECTORY and LAB_NAME (default: "roles") say which machines and which lab.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import testinfra
import yaml
from testinfra.host import Host

PROJECT = Path(__file__).resolve().parents[1]
SSH_CONFIG = PROJECT / ".lab" / os.environ.get("LAB_NAME", "roles") / "ssh" / "config"


def _machines() -> list[str]:
    scenario = Path(os.environ["MOLECULE_SCENARIO_DIRECTORY"]) / "inventory.yml"
    inventory = scenario if scenario.exists() else PROJECT / "inventories/lab/hosts.yml"
    return sorted(yaml.safe_load(inventory.read_text())["all"]["hosts"])


def _reach(name: str) -> Host:
    return testinfra.get_host(f"ssh://{name}?sudo=true&controlpersist=60", ssh_config=str(SSH_CONFIG))


def pytest_configure(config: pytest.Config) -> None:
    """Tests that name no hosts run on every machine of the scenario, as root."""
    config.option.hosts = ",".join(f"ssh://{name}" for name in _machines())
    config.option.ssh_config = str(SSH_CONFIG)
    config.option.sudo = True


@pytest.fixture(scope="session")
def machine() -> Callable[[str], Host]:
    """A function that returns the Testinfra host of that inventory name, for tests about more than one."""
    return _reach
