"""A whole rack is gone, with the primaries in it; and what is left after everything."""

from __future__ import annotations

import json

import requests
from cluster import CA, VIP, Api
from faultlab import Load, Tasks, eventually, failover, kill, power_on, primary, reach, run, status

RACK = {"data1": ("lb1", "airflow1", "data1", "worker1"), "data2": ("lb2", "airflow2", "data2", "worker2")}


def test_a_rack_with_the_primaries_is_gone(client: Api) -> None:
    host = primary()
    failover("redis", f"candidate={host}", "only_if_needed=true")
    tasks = Tasks(client, count=8, seconds=3)
    tasks.running()
    kill(*RACK[host])
    try:
        with requests.Session() as session:
            session.trust_env, session.verify = False, str(CA)
            eventually(lambda: session.get(f"https://{VIP}/api/v2/version", timeout=5).status_code == 200, 30)
        assert "cannot be reached" in failover("postgresql", "force=true")
        failover("redis", "force=true")
        load = Load("postgresql", on="airflow2" if host == "data1" else "airflow1")
        load.result()
        after = Tasks(client, count=4, seconds=1)
        after.succeed()
    finally:
        power_on()
    eventually(lambda: status()["healthy"], 120)
    assert primary() != host
    assert primary("redis") != host


def test_site_yml_changes_nothing_after_all_this() -> None:
    before = {service: primary(service) for service in ("postgresql", "redis")}
    # A handover ends when the last task of the first worker does.
    for worker in ("worker1", "worker2"):
        eventually(lambda name=worker: reach(name).run("systemctl is-active airflow-worker-handover").rc != 0, 600)
    folders = run("site", "--skip-tags=dags").stdout.partition("PLAY RECAP")[2]
    recap = [line for line in folders.splitlines() if "changed=" in line]
    assert len(recap) == 9
    assert [line for line in recap if "changed=0 " not in line] == [], json.dumps(recap, indent=1)
    assert {service: primary(service) for service in before} == before
