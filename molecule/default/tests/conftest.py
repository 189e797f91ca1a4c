"""Fixtures for the tests of the whole cluster."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator

import pytest
import requests
import yaml
from cluster import CA, PROJECT, SUBNET, VIP, Api


@pytest.fixture(scope="session")
def secrets() -> dict[str, str]:
    """The lab's secrets, decrypted."""
    file = PROJECT / "inventories/lab/group_vars/all/secrets.yml"
    password = PROJECT / "inventories/lab/.vault-password"
    command = ["ansible-vault", "view", "--vault-password-file", str(password), str(file)]
    return yaml.safe_load(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope="session")
def api(secrets: dict[str, str]) -> Callable[..., Api]:
    """A function that logs in at an address (default: the VIP)."""
    return lambda address=VIP: Api(address, secrets["secret_airflow_admin_password"])


@pytest.fixture
def http(secrets: dict[str, str]) -> Iterator[requests.Session]:
    """A client that trusts the generated CA and nothing else."""
    with requests.Session() as session:
        session.trust_env = False
        session.verify = str(CA)
        yield session


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each server's own API is tested, not only the one that the balancer happens to choose."""
    if "server" in metafunc.fixturenames:
        metafunc.parametrize("server", [f"{SUBNET}.21:8080", f"{SUBNET}.22:8080"], ids=["airflow1", "airflow2"])
