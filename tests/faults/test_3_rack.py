"""A rack is gone, with the primaries in it; and what is left of everything. Cases of docs/faults.md: 13, 23, 27."""

from __future__ import annotations

import json

import requests
from cluster import CA, VIP, Api
from faultlab import (
    Load,
    Tasks,
    dags_folders,
    eventually,
    failover,
    healthy,
    kill,
    power_on,
    primary,
    reach,
    role,
    run,
)  # fmt: skip

RACK = {"data1": ("lb1", "airflow1", "data1", "worker1"), "data2": ("lb2", "airflow2", "data2", "worker2")}


def test_a_rack_with_the_primaries_is_gone(client: Api) -> None:
    host = primary()
    failover("redis", f"candidate={host}", "only_if_needed=true")
    kill(*RACK[host])
    try:
        with requests.Session() as session:
            session.trust_env, session.verify = False, str(CA)

            def answers() -> bool:
                try:
                    return session.get(f"https://{VIP}/api/v2/version", timeout=5).status_code == 200
                except requests.ConnectionError:
                    return False

            eventually(answers, 30)
        assert "cannot be reached" in failover("postgresql", "force=true")
        failover("redis", "force=true")
        Load("postgresql", on="airflow2" if host == "data1" else "airflow1").result()
        Tasks(client, count=4, seconds=1).succeed()
    finally:
        power_on()
    # The old primaries look before they start, and follow the new ones.
    eventually(lambda: role(host) == role(host, "redis") == "standby", 120)
    healthy(120)
    assert primary() != host
    assert primary("redis") != host


def test_site_yml_changes_nothing_after_all_this() -> None:
    before = {service: primary(service) for service in ("postgresql", "redis")}
    # A handover ends when the last task of the first worker does.
    for worker in ("worker1", "worker2"):
        eventually(lambda name=worker: reach(name).run("systemctl is-active airflow-worker-handover").rc != 0, 120)
    recap = run("site", dags_folders()).stdout.partition("PLAY RECAP")[2]
    hosts = [line for line in recap.splitlines() if "changed=" in line]
    assert len(hosts) == 9
    assert [line for line in hosts if "changed=0 " not in line] == [], json.dumps(hosts, indent=1)
    assert {service: primary(service) for service in before} == before
