"""One machine with everything on it: users, the pipeline, and nothing that belongs to a cluster."""

from __future__ import annotations

import hashlib

from cluster import Api, import_components, make_input, table
from scenario import LAB, SUBNET

ADDRESS = f"{SUBNET}.60"
ADMIN_PASSWORD = hashlib.sha256(b"single airflow admin").hexdigest()


def test_this_is_debian_12_with_its_own_python(host):
    assert host.system_info.codename == "bookworm"
    assert host.check_output("/opt/airflow/current/bin/python --version").startswith("Python 3.11")


def test_services_run(host):
    for unit in ("airflow-api-server", "airflow-scheduler", "airflow-dag-processor", "airflow-triggerer", "haproxy",
                 "spark-master", "spark-worker", "airflow-watchdog"):  # fmt: skip
        assert host.service(unit).is_running, host.run(f"journalctl --no-pager --lines=40 --unit={unit}").stdout
        assert host.service(unit).is_enabled


def test_nothing_of_a_cluster_is_installed(host):
    for package in ("redis-server", "keepalived", "zookeeper"):
        assert not host.package(package).is_installed
    for unit in ("airflow-worker", "airflow-flower", "zookeeper"):
        assert not host.service(unit).exists


def test_the_pipeline_gives_the_right_averages(host):
    day = "2026-02-04"
    expected = make_input(day, LAB)
    tasks = Api(ADDRESS, ADMIN_PASSWORD, LAB / "pki/ca.crt").run_pipeline(day)
    assert {task["hostname"] for task in tasks} == {"airflow1"}
    assert table(host, day) == expected


def test_every_component_imports_from_the_lock(host):
    assert import_components(host) == ""
