"""The fault tests run one after the other, and each leaves the cluster as it found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster import Api
from faultlab import deliver_dag, healthy, login, run


@pytest.fixture(scope="session", autouse=True)
def dag() -> Iterator[None]:
    """The DAG of the tests, taken away again after them."""
    deliver_dag()
    yield
    run("site", "--tags=dags")


@pytest.fixture(scope="session")
def client(dag: None) -> Api:
    """Airflow's API behind the VIP."""
    return login()


@pytest.fixture(autouse=True)
def well_before_and_after() -> Iterator[None]:
    """Every test gets a healthy cluster and leaves one."""
    healthy()
    yield
    healthy()
