"""The fault tests run one after the other, and each leaves the cluster as it found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster import Api
from faultlab import deliver_dag, healthy, login, run


@pytest.fixture(scope="session", autouse=True)
def dag() -> Iterator[None]:
    """A healthy cluster, and the DAG of the tests, taken away again after them."""
    deliver_dag()
    healthy()
    yield
    run("site", "--tags=dags")


@pytest.fixture(scope="session")
def client(dag: None) -> Api:
    """Airflow's API behind the VIP."""
    return login()


@pytest.fixture(autouse=True)
def well_after() -> Iterator[None]:
    """Every test leaves a healthy cluster to the next."""
    yield
    healthy()
